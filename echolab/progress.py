"""Show progress: a rich bar on a terminal, else a plain line every few seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[int, str], None]  # (number of parts done, note to show)

LINE_SECONDS = 10.0


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """Show the progress of `total` parts on standard error; yield a function to update it."""
    # Write plain lines to a log file, which a bar would fill with control characters.
    if sys.stderr.isatty():
        # On a terminal show a bar with parts, rate and times.
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bars:
            task = bars.add_task(title, total=total, rate="", note="")
            rate = _make_rate()

            def advance(done: int, note: str = "") -> None:
                bars.update(task, completed=done, rate=f"{rate(done):.3g}/s", note=note)

            yield advance
    else:
        yield _line_progress(title, total)


def _make_rate() -> Callable[[int], float]:
    """Return a function that computes parts per second since its first call."""
    # Exclude parts of an earlier, resumed run, which would inflate the rate.
    begin: tuple[float, int] | None = None

    def rate(done: int) -> float:
        nonlocal begin
        now = time.monotonic()
        begin = begin or (now, done)
        return (done - begin[1]) / max(now - begin[0], 1e-3)

    return rate


def _line_progress(title: str, total: int) -> Advance:
    rate, shown = _make_rate(), time.monotonic()

    def advance(done: int, note: str = "") -> None:
        nonlocal shown
        # Always print the last line, others at most every few seconds.
        speed = rate(done)
        if done < total and time.monotonic() - shown < LINE_SECONDS:
            return
        shown = time.monotonic()
        remaining = f", {(total - done) / speed:.0f} s left" if speed > 0 and done < total else ""
        print(f"{title}: {done}/{total}, {speed:.3g}/s{remaining} {note}".rstrip(), file=sys.stderr)

    return advance
