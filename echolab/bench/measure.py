"""Rows of figures, and how time, memory and arithmetic are measured."""

import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from echolab.geometry import WAN
from echolab.models.audio import WINDOW

Run = Callable[[], object]


class Row(NamedTuple):
    """One figure, and the figure that it is compared with."""

    name: str
    value: float
    unit: str
    baseline: str | None = None  # what it is compared with
    baseline_value: float | None = None

    @property
    def ratio(self) -> float | None:
        """value / baseline_value"""
        return self.value / self.baseline_value if self.baseline_value else None


class Cost(NamedTuple):
    """The cost of one run, or the medians of several."""

    seconds: float  # wall time, including the work of the GPU
    processor_seconds: float  # CPU time of all threads, unaffected by other processes
    peak: int = 0  # bytes


class Pair(NamedTuple):
    """The costs of two functions that were run alternately."""

    ours: Cost
    baseline: Cost

    def rows(self, name: str, baseline: str, device: str) -> list[Row]:
        """Return the rows of time and memory."""
        ours, other, mebi = self.ours, self.baseline, 2**20
        rows = [Row(f"{name}/time", ours.seconds, "s", baseline, other.seconds)]
        if device == "cpu":
            taken = ours.processor_seconds, other.processor_seconds
            rows.append(Row(f"{name}/processor_time", taken[0], "s", baseline, taken[1]))
        peaks = ours.peak / mebi, other.peak / mebi
        return [*rows, Row(f"{name}/peak_memory", peaks[0], "MiB", baseline, peaks[1])]


def as_json(rows: Sequence[Row]) -> str:
    """Return the rows as a JSON list of objects."""
    return json.dumps([{**row._asdict(), "ratio": row.ratio} for row in rows], indent=1)


def as_table(rows: Sequence[Row]) -> str:
    """Return the rows as a table of text."""

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


def cost_of(run: Run, device: str) -> Cost:
    """Measure the time of one run."""
    if device == "cuda":
        torch.cuda.synchronize()
    start, processor = time.perf_counter(), time.process_time()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return Cost(time.perf_counter() - start, time.process_time() - processor)


def peak_of(run: Run, device: str) -> int:
    """Return the most bytes that torch's allocator held in a run, above what it held before.

    On GPUs the caching allocator counts the bytes; on CPUs torch's profiler records every
    allocation and release.  Tensors made in the run count, including gradients; weights do not.
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
    # Add up allocations in the order of time.
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        highest = max(highest, held)
    return highest


def measure(run: Run, baseline: Run, pairs: int, device: str) -> Pair:
    """Run both alternately, `pairs` times, and return their median costs.

    The order changes every time, so that disturbances affect both equally.  Memory is measured in
    a separate round before.
    """
    run()  # warm up compilers and tables
    baseline()
    peaks = peak_of(run, device), peak_of(baseline, device)
    costs: dict[Run, list[Cost]] = {run: [], baseline: []}
    # Alternate which of both runs first.
    for index in range(pairs):
        for measured in (run, baseline)[:: -1 if index % 2 else 1]:
            costs[measured].append(cost_of(measured, device))
    ours, other = (
        Cost(
            statistics.median(cost.seconds for cost in costs[measured]),
            statistics.median(cost.processor_seconds for cost in costs[measured]),
            peak,
        )
        for measured, peak in zip((run, baseline), peaks, strict=True)
    )
    return Pair(ours, other)


def say(message: str) -> None:
    """Print on standard error what is measured, and what is skipped and why."""
    print(message, file=sys.stderr, flush=True)


# -- arithmetic ------------------------------------------------------------------------------------

# Counted by the shapes of a pass: a multiplication with its addition is two operations; norms,
# activations and softmax are not counted, as usual for model FLOPs utilization (MFU; PaLM, arXiv
# 2204.02311, appendix B).
FORMULA = (
    "forward FLOPs of a clip = "
    "layers (12 S D^2 + 4 S D ffn + 4 S^2 D + 4 (L + I + A) D^2 + 4 S (L + I + w) D) "
    "+ 2 S D patch (in + out) + 2 L (text D + D^2) + 2 I (image^2 + image D) + 2 A audio D "
    "+ 2 (freq D + 7 D^2); S tokens, L text, I image, A audio tokens, w = 17 of them a frame; "
    "a training step is 3 forwards, recomputation not counted"
)


class Shapes(NamedTuple):
    """The tokens of a clip."""

    tokens: int  # S
    text: int  # L
    image: int  # I
    audio: int  # A; 0 without the branch


def forward_flops(architecture: Mapping[str, Any], shapes: Shapes) -> int:
    """Return the FLOPs of one clip's forward pass through a network of this architecture.

    A branch counts if it has tokens; the audio branch is that of the preview model.
    """
    dim, ffn = architecture["dim"], architecture["ffn_dim"]
    tokens, text, image, audio = shapes
    # Tokens that are projected to keys and values, and those that a query attends to.
    context = text + image + audio
    attended = text + image + (WINDOW if audio else 0)
    # One block: projections, FFN and attention scores.
    block = 12 * tokens * dim**2 + 4 * tokens * dim * ffn + 4 * tokens**2 * dim
    block += 4 * context * dim**2 + 4 * tokens * attended * dim
    # Patch embedding and head, and the embeddings of the conditions.
    values = math.prod(architecture.get("patch_size", (1, WAN.patch, WAN.patch)))
    values *= architecture["in_channels"] + architecture["out_channels"]
    ends = 2 * tokens * dim * values
    ends += 2 * text * dim * (architecture["text_dim"] + dim)
    ends += 2 * (architecture["freq_dim"] * dim + 7 * dim**2)
    if image:
        ends += 2 * image * architecture["image_dim"] * (architecture["image_dim"] + dim)
    if audio:
        ends += 2 * audio * architecture["audio_dim"] * dim
    return int(architecture["num_layers"] * block + ends)


def step_flops(architecture: Mapping[str, Any], shapes: Shapes) -> int:
    """Return the FLOPs of a training step on one clip; the backward counts as two forwards."""
    return 3 * forward_flops(architecture, shapes)
