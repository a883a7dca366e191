"""The metrics log: strict JSON lines, which several attempts continue."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echolab.errors import DataError
from echolab.tracking.metrics import MetricsLog, read_metrics, series


def test_logged_rows_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path, attempt=0)
    log.log(1, {"train/loss": 2.0})
    log.log(2, {"train/loss": math.nan, "val/loss": 1.5})
    assert len(path.read_text().splitlines()) == 2, "rows are flushed as they come"
    rows = read_metrics(path)
    assert [(row["step"], row["attempt"]) for row in rows] == [(1, 0), (2, 0)]
    assert math.isnan(rows[1]["train/loss"])
    assert series(rows, "train/loss") == ([1], [2.0])
    assert series(rows, "val/loss") == ([2], [1.5])


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m", attempt=0)
    log.log(1, {"a": math.inf, "b": -math.inf, "c": math.nan})
    assert "NaN" not in (tmp_path / "m").read_text() and "Inf" not in (tmp_path / "m").read_text()


@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=4),
)
def test_attempts_together_equal_a_run_that_was_never_stopped(
    tmp_path_factory: pytest.TempPathFactory, total: int, stops: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    start, attempt = 0, 0
    for killed, saved in stops:  # killed at a step, resumed from a checkpoint at or before it
        killed = max(start, min(killed, total))
        log = MetricsLog(path, attempt)
        for step in range(start + 1, killed + 1):
            log.log(step, {"loss": step + 0.5})
        if killed > start and saved % 2:
            with path.open("a") as file:
                file.write('{"step": 99, "att')  # died inside a line
        start, attempt = min(saved, killed), attempt + 1
    log = MetricsLog(path, attempt)
    for step in range(start + 1, total + 1):
        log.log(step, {"loss": step + 0.5})
    steps = [row["step"] for row in read_metrics(path)]
    if start < total:
        assert steps == list(range(1, total + 1))


def test_older_rows_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for attempt, steps in ((0, (1, 2, 3)), (1, (2, 3, 4))):
        log = MetricsLog(path, attempt)
        for step in steps:
            log.log(step, {"loss": attempt})
    assert len(path.read_text().splitlines()) == 6
    assert series(read_metrics(path), "loss") == ([1, 2, 3, 4], [0.0, 1.0, 1.0, 1.0])


def test_repeated_checks_keep_the_row_of_the_last_step(tmp_path: Path) -> None:
    """An attempt may begin at the last step, with only the checks of the end."""
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path, 1).log(6, {"train/loss": 0.5})
    MetricsLog(path, 1).log(6, {"val/loss": 0.25})
    MetricsLog(path, 2).log(6, {"val/loss": 0.25})
    MetricsLog(path, 2).log(6, {"parity/difference": 0.0})
    rows = read_metrics(path)
    for name, value in (("train/loss", 0.5), ("val/loss", 0.25), ("parity/difference", 0.0)):
        assert series(rows, name) == ([6], [value])


def test_a_file_that_is_no_metrics_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"a": 1}) + "\n")
    with pytest.raises(DataError, match=r"x\.jsonl"):
        read_metrics(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="no such file"):
        read_metrics(tmp_path / "missing.jsonl")
