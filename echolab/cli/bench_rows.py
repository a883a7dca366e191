"""Rows of figures, and how time and memory are measured."""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Run = Callable[[], object]


class Row(NamedTuple):
    """One figure beside another."""

    name: str
    value: float
    unit: str
    baseline: str | None = None  # what it is compared with
    baseline_value: float | None = None

    @property
    def ratio(self) -> float | None:
        """value / baseline_value"""
        return self.value / self.baseline_value if self.baseline_value else None


class Pair(NamedTuple):
    """Medians of two things that were run in turns."""

    seconds: float
    baseline_seconds: float
    peak: int  # bytes
    baseline_peak: int

    def rows(self, name: str, baseline: str) -> list[Row]:
        """Time and memory."""
        mebi = 2**20
        return [
            Row(f"{name}/time", self.seconds, "s", baseline, self.baseline_seconds),
            Row(f"{name}/peak_memory", self.peak / mebi, "MiB", baseline,
                self.baseline_peak / mebi),
        ]  # fmt: skip


def as_json(rows: Sequence[Row]) -> str:
    """The rows as a list of objects."""
    return json.dumps([{**row._asdict(), "ratio": row.ratio} for row in rows], indent=1)


def as_table(rows: Sequence[Row]) -> str:
    """The rows for people."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    cells = [("name", "value", "unit", "baseline", "value", "ratio")]
    cells += [
        (r.name, number(r.value), r.unit, r.baseline or "", number(r.baseline_value),
         number(r.ratio))
        for r in rows
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def seconds_of(run: Run, device: str) -> float:
    """Wall-clock seconds of one run, the GPU's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_of(run: Run, device: str) -> int:
    """The most bytes that torch's allocator held during a run, above what it held before.

    On GPUs the caching allocator counts them; on CPUs every allocation and release is taken from
    torch's profiler.  What a run makes counts, gradients among it; the weights do not.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        run()
    changes = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        highest = max(highest, held)
    return highest


def measure(
    run: Run, baseline: Run, pairs: int, device: str, told: Callable[[int], None] | None = None
) -> Pair:
    """Both in turns, `pairs` times, each first every other time, so that what disturbs one
    disturbs the other; memory is that of a round before them."""
    run()  # compilers and tables at work
    baseline()
    peaks = peak_of(run, device), peak_of(baseline, device)
    times: list[tuple[float, float]] = []
    for index in range(pairs):
        if index % 2:
            second = seconds_of(baseline, device)
            times.append((seconds_of(run, device), second))
        else:
            times.append((seconds_of(run, device), seconds_of(baseline, device)))
        if told:
            told(index + 1)
    ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    return Pair(ours, theirs, *peaks)


def say(words: str) -> None:
    """Beside the rows: what is being done, and what is left out and why."""
    print(words, file=sys.stderr, flush=True)
