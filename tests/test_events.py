"""The file of events: complete lines only, in order, and the same on all ranks."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echolab.errors import ConfigError, DataError, StorageError
from echolab.training.guards.events import EVENTS, Event, History, Skip, append, read, skips


@given(cut=st.integers(0, 400), again=st.booleans())
def test_a_truncated_file_keeps_its_complete_lines(
    tmp_path_factory: pytest.TempPathFactory, cut: int, again: bool
) -> None:
    folder = tmp_path_factory.mktemp("events")
    wrote = [append(folder, step, "spike", reason="ü" * step, usual=None) for step in range(4)]
    assert read(folder) == wrote and [event.id for event in wrote] == [1, 2, 3, 4]
    data = (folder / EVENTS).read_bytes()
    ends = [position for position, byte in enumerate(data) if byte == ord("\n")]
    (folder / EVENTS).write_bytes(data[:cut])
    complete = sum(cut >= end for end in ends)
    assert read(folder) == wrote[:complete]
    if again:
        new = append(folder, 9, "rollback", to=3)
        assert read(folder) == [*wrote[:complete], new] and new.id == complete + 1


def test_skipped_batches_are_collected_from_all_events(tmp_path: Path) -> None:
    assert skips(tmp_path) == () and read(tmp_path) == []
    append(tmp_path, 9, "rollback", to=3, skip=["sft", 5, 4])
    append(tmp_path, 12, "spike", reason="x")
    append(tmp_path, 9, "rollback", to=3, skip=Skip("preference", 0, 2))
    append(tmp_path, 9, "rollback", to=3, skip=["sft", 5, 4])  # said twice
    append(tmp_path, 20, "rollback", to=3, skip=None)
    assert skips(tmp_path) == (Skip("sft", 5, 4), Skip("preference", 0, 2))
    append(tmp_path, 20, "rollback", to=3, skip=["sft", -1, 2])
    with pytest.raises(ConfigError, match="first 0 or more"):
        skips(tmp_path)


def test_a_history_has_the_earlier_and_the_added_events(tmp_path: Path) -> None:
    first = append(tmp_path, 4, "spike", reason="x")
    history = History(tmp_path)
    history.add(7, "rollback", to=3, skip=["sft", 5, 4])
    assert history.events == read(tmp_path) and history.events[0] == first
    assert isinstance(history.events[1], Event) and history.events[1].details["to"] == 3


def test_an_invalid_event_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / EVENTS).write_text('{"id": 1}\n')
    with pytest.raises(DataError, match=r"events.jsonl: line 1 is no event .*put back"):
        read(tmp_path)
    with pytest.raises(StorageError, match="could not be written"):
        append(tmp_path / "nowhere", 1, "spike")
    with pytest.raises(ValueError):
        append(tmp_path / "none", 1, "spike", value=float("nan"))
