"""Show the progress of long work: a rich bar on a terminal, else a plain line every few seconds."""

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

Advance = Callable[[int, str], None]  # parts done, a note to show

LINE_SECONDS = 10.0


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """Show work of `total` parts on standard error; yield a function that takes the parts done."""
    # A log file gets lines: a bar would fill it with control characters.
    if sys.stderr.isatty():
        # On a terminal: a bar with parts, rate and times.
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
            rate = _rate()

            def advance(done: int, note: str = "") -> None:
                bars.update(task, completed=done, rate=f"{rate(done):.3g}/s", note=note)

            yield advance
    else:
        yield _lines(title, total)


def _rate() -> Callable[[int], float]:
    """Return a function for parts a second since its first call; earlier parts do not count."""
    # Parts that an earlier run finished would make this one look fast.
    begin: tuple[float, int] | None = None

    def rate(done: int) -> float:
        nonlocal begin
        now = time.monotonic()
        begin = begin or (now, done)
        return (done - begin[1]) / max(now - begin[0], 1e-3)

    return rate


def _lines(title: str, total: int) -> Advance:
    rate, shown = _rate(), time.monotonic()

    def advance(done: int, note: str = "") -> None:
        nonlocal shown
        # The last line always, others at most every few seconds.
        speed = rate(done)
        if done < total and time.monotonic() - shown < LINE_SECONDS:
            return
        shown = time.monotonic()
        remaining = f", {(total - done) / speed:.0f} s left" if speed > 0 and done < total else ""
        print(f"{title}: {done}/{total}, {speed:.3g}/s{remaining} {note}".rstrip(), file=sys.stderr)

    return advance
