"""Rows of `echolab bench step` for strategies: ZeRO 1 to 3 beside DDP, each in ranks of its own.

python -m echolab.bench.ranks SETTINGS.json    one rank; started by `strategy_rows`
"""

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from echolab.bench.engine import WARM, Subject, net_of, training_of
from echolab.bench.rows import Row, say
from echolab.errors import EcholabError
from echolab.launch.local import run_ranks
from echolab.training.fit import fit

BASELINE, STRATEGIES = "ddp", ("ddp", "zero1", "zero2", "zero3")
RANKS = 2


class Found(NamedTuple):
    """Of rank 0."""

    seconds: float  # median of its steps
    peak: float  # bytes: of the GPU's allocator, or of the process in main memory


def resident_peak() -> float:
    """Bytes of main memory that this process held at most.  getrusage would count its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


class Clock:
    """Measures steps, and the most memory up to the last of them."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[float] = []
        self.peaks: list[float] = []

    def __call__(self, step: int, steps: int) -> None:
        """A step has ended."""
        del step, steps
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.peaks.append(float(torch.cuda.max_memory_allocated()))
        else:
            self.peaks.append(resident_peak())
        self.marks.append(time.perf_counter())

    def found(self) -> Found:
        """Without the first steps, and without the last, which saves."""
        taken = [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return Found(statistics.median(taken[WARM - 1 : -1]), self.peaks[-2])


def main(settings: Path) -> None:
    """One rank: train, and on rank 0 write what was found beside the settings."""
    told: dict[str, Any] = json.loads(settings.read_text())
    subject = Subject(**{**told["subject"], "folder": Path(told["subject"]["folder"])})
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // told["ranks"]))
    clock = Clock(subject.device)
    machine = subject.machine(told["strategy"], told["ranks"])
    net = net_of(subject)
    fit(training_of(subject, net, told["run"], told["steps"], machine, on_step=clock))
    if os.environ.get("RANK", "0") == "0":
        settings.with_suffix(".found").write_text(json.dumps(clock.found()))


def measured(subject: Subject, strategy: str, ranks: int, steps: int) -> Found:
    """One launch; raises EcholabError where it fails."""
    settings, run = subject.folder / f"{strategy}.json", f"run-{strategy}"
    told: Mapping[str, Any] = {
        "subject": {**subject._asdict(), "folder": str(subject.folder)},
        "strategy": strategy,
        "ranks": ranks,
        "steps": steps,
        "run": run,
    }
    settings.write_text(json.dumps(told))
    code = run_ranks([sys.executable, "-P", "-W", "ignore", "-m", __name__, str(settings)], ranks)
    shutil.rmtree(subject.folder / run, ignore_errors=True)
    if code:
        raise EcholabError(f"bench step: {strategy} on {ranks} ranks ended with {code}; see above")
    return Found(*json.loads(settings.with_suffix(".found").read_text()))


def strategy_rows(subject: Subject, pairs: int) -> Iterator[Row]:
    """A step of each ZeRO stage beside DDP's, in turns; on two ranks, on one with one GPU."""
    ranks = min(RANKS, torch.cuda.device_count()) if subject.device == "cuda" else RANKS
    rounds, steps = min(pairs, 3), WARM + 2 + min(pairs, 5)
    found: dict[str, list[Found]] = {name: [] for name in STRATEGIES}
    for number in range(rounds):
        for strategy in STRATEGIES[:: -1 if number % 2 else 1]:
            say(f"measuring engine/{strategy}, {ranks} ranks, round {number + 1} of {rounds}")
            found[strategy].append(measured(subject, strategy, ranks, steps))
    times = {name: statistics.median(one.seconds for one in all_) for name, all_ in found.items()}
    peaks = {name: statistics.median(one.peak for one in all_) for name, all_ in found.items()}
    called = f"{BASELINE}, {ranks} ranks"
    for name in STRATEGIES[1:]:
        yield Row(f"engine/{name}/time", times[name], "s", called, times[BASELINE])
        mebi = peaks[name] / 2**20, peaks[BASELINE] / 2**20
        yield Row(f"engine/{name}/memory", mebi[0], "MiB", called, mebi[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
