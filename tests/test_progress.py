"""Progress: plain lines in a log, a bar on a terminal."""

import io
import sys

import pytest

from echolab import progress as module
from echolab.progress import progress


class Clock:
    """Time that the test advances."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def test_lines_come_every_few_seconds_and_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("drawing", 100) as advance:
        for done in range(1, 101):
            clock.now += 0.5
            advance(done, "fine" if done == 100 else "")
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert output.out == ""
    assert [line.split(",")[0] for line in lines] == [
        "drawing: 20/100", "drawing: 40/100", "drawing: 60/100", "drawing: 80/100",
        "drawing: 100/100",
    ]  # fmt: skip
    assert lines[0].endswith("2/s, 40 s left") and lines[-1].endswith("fine")


def test_earlier_progress_does_not_count_as_speed(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("fitting", 1000) as advance:
        clock.now += 20
        advance(900, "")  # continued
        clock.now += 10
        advance(910, "")
    lines = capsys.readouterr().err.splitlines()
    assert "left" not in lines[0]
    assert lines[1] == "fitting: 910/1000, 1/s, 90 s left"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress("fitting", 3) as advance:
        for done in (1, 2, 3):
            advance(done, f"loss {done}")
    assert "fitting" in screen.getvalue() and "3/3" in screen.getvalue()
    assert "loss 3" in screen.getvalue()
