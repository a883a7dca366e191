"""The metrics of a run: measured before a step is saved, logged after the save.

Slow ranks are reported with their host and the section of the step in which they are slow.  Only
sections without collectives are compared: in a section with a collective, fast ranks wait for slow
ranks.
"""

import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from echolab.errors import FencedError
from echolab.heartbeat import Heartbeat
from echolab.training import distributed
from echolab.training.callbacks.callback import Callback, RunState
from echolab.training.callbacks.checkpoints import raise_log_error
from echolab.training.config import TrainConfig
from echolab.training.datamodule import ShardDataModule
from echolab.training.guards.host_memory import HostMemory
from echolab.training.intervals import Intervals
from echolab.training.module import Meter

OWN_PACE = ("data_wait", "forward")  # sections in which no rank waits for another
STEP = ("data_wait", "forward", "backward", "optimizer", "vote")
SHARE = 0.05  # sections that take a smaller share of the step are ignored
LIMIT = 0.75  # a rank with a lower score is slow
WINDOWS = 3  # consecutive slow windows that make a rank a straggler


class Straggler(NamedTuple):
    """A rank that was slow in WINDOWS consecutive windows."""

    rank: int
    host: str
    section: str
    score: float  # seconds of the fastest rank / seconds of this rank, in the last window
    seconds: float  # seconds of this rank in the last window
    best: float  # seconds of the fastest rank in the last window

    @property
    def words(self) -> str:
        """A one-line description."""
        return (
            f"rank {self.rank} on {self.host} is slow in {self.section}: {self.seconds:.3g} s, "
            f"the fastest rank {self.best:.3g} s (score {self.score:.2f})"
        )


def scores(
    windows: Sequence[Mapping[str, float]], sections: Sequence[str] = OWN_PACE
) -> list[dict[str, float]]:
    """Return the score (fastest / own seconds, 0 to 1) of each rank by section.

    `windows` has the seconds by section of each rank.  A rank has no score for a section that takes
    less than SHARE of its step.
    """
    best = {name: min(window[name] for window in windows) for name in sections}
    return [
        {
            name: best[name] / window[name]
            for name in sections
            if window[name] > 0 and window[name] >= SHARE * sum(window[n] for n in STEP)
        }
        for window in windows
    ]


class Stragglers:
    """Compares the ranks' seconds in each section between two calls of `look`."""

    def __init__(self, hosts: Sequence[str], sections: Sequence[str] = OWN_PACE) -> None:
        """Compare `sections`; `hosts` has the host name of each rank.

        `sections` must not contain a section with collectives, such as `forward` under ZeRO 3 or
        with sequence parallelism.
        """
        self.hosts, self.sections = list(hosts), tuple(sections)
        self._last = dict.fromkeys(STEP, 0.0)
        self._slow_windows: dict[tuple[int, str], int] = {}  # consecutive, by rank and section

    def start(self, seconds: Mapping[str, float]) -> None:
        """Begin a window; earlier time, such as the first step, is ignored."""
        self._last = {name: seconds[name] for name in STEP}

    def look(self, seconds: Mapping[str, float]) -> tuple[dict[str, float], list[Straggler]]:
        """End the window; return values to log, and new stragglers.

        A straggler is returned once, when it has been slow for WINDOWS windows.  `seconds` is
        `Heartbeat.seconds`.  Collective: one all-reduce of a few numbers for each rank.
        """
        elapsed = [seconds[name] - self._last[name] for name in STEP]
        self.start(seconds)
        world, rank, width = distributed.world(), distributed.rank(), len(STEP)
        if world == 1:
            return {}, []
        # Each rank fills its own row; the sum over ranks is the table.
        flat = [0.0] * (world * width)
        flat[rank * width : (rank + 1) * width] = elapsed
        flat = distributed.sums(flat)
        rows = [flat[first : first + width] for first in range(0, len(flat), width)]
        return self.judge([dict(zip(STEP, row, strict=True)) for row in rows])

    def judge(
        self, windows: Sequence[Mapping[str, float]]
    ) -> tuple[dict[str, float], list[Straggler]]:
        """Return values to log and new stragglers, given all ranks' seconds of one window."""
        stragglers, low = [], {}
        of_ranks = scores(windows, self.sections)
        for rank, rank_scores in enumerate(of_ranks):
            for section, score in rank_scores.items():
                if score >= LIMIT:
                    continue
                # Report a rank once, when it has been slow in WINDOWS consecutive windows.
                low[rank, section] = self._slow_windows.get((rank, section), 0) + 1
                if low[rank, section] == WINDOWS:
                    spent = windows[rank][section]
                    best = score * spent
                    host = self.hosts[rank]
                    stragglers.append(Straggler(rank, host, section, score, spent, best))
        self._slow_windows = low
        worst = min(
            (score for rank_scores in of_ranks for score in rank_scores.values()), default=1.0
        )
        return {"perf/straggler_score": worst}, stragglers


USEFUL = ("forward", "backward", "optimizer")  # sections that count as goodput


class MeasureMetrics(Callback):
    """Measures losses, speed and waiting time, averaged over the steps since the last log."""

    def __init__(
        self,
        intervals: Intervals,
        data: ShardDataModule,
        heartbeat: Heartbeat,
        custom: Sequence[Callback] = (),
    ) -> None:
        """Use the section times of `heartbeat`; `custom` are callbacks that may add values."""
        self.intervals, self.data, self.heartbeat, self.custom = intervals, data, heartbeat, custom
        self._step, self._time, self._waited = 0, 0.0, 0.0

    def on_start(self, state: RunState) -> None:
        """Start the clock."""
        self._step, self._time = state.step, time.monotonic()
        self._waited = self.heartbeat.seconds["data_wait"]

    def on_rollback(self, state: RunState) -> None:
        """Discard the values of the steps that were undone, and restart the clock."""
        state.module.meter = Meter()
        self.on_start(state)

    def after_step(self, state: RunState) -> None:
        """Put the values of a step that logs into `state.metrics`; collective."""
        if not _is_logged(self.intervals, state):
            return
        # Average over the steps since the last log.
        now, spent = time.monotonic(), self.heartbeat.seconds
        done, seconds = state.step - self._step, max(now - self._time, 1e-9)
        values = state.module.meter.flush()
        values["train/lr"] = state.schedule.lr(state.step - 1)
        values["perf/steps_per_second"] = done / seconds
        # Average the waiting time over the ranks too.
        waited = spent["data_wait"] - self._waited
        values |= distributed.means({"perf/data_wait_seconds": (waited, done)})
        values["perf/goodput"] = goodput(spent)
        # Add the state of the curriculum and of the data.
        supervised = state.schedule.supervised_steps(state.step)
        tasks = {} if state.kind == "sync" else self.data.curriculum.probabilities(supervised)
        for task, probability in tasks.items():
            values[f"tasks/probability/{task}"] = probability
        values |= self.data.progress(state.step)
        # Add the values of the user's callbacks last, so that they take precedence.
        for callback in self.custom:
            values |= callback.metrics(state)
        state.metrics = values
        self._step, self._time, self._waited = state.step, now, spent["data_wait"]


class LogMetrics(Callback):
    """Logs on rank 0.  A logging error is raised after the next step, once all ranks have saved."""

    def __init__(
        self, config: TrainConfig, intervals: Intervals, memory: HostMemory, heartbeat: Heartbeat
    ):
        """Gather the hosts of all ranks; collective."""
        self.config, self.intervals = config, intervals
        self.memory, self.heartbeat = memory, heartbeat
        # Sections with collectives do not show the speed of a single rank.
        machine = config.machine
        waits = machine.strategy == "zero3" or machine.sequence_parallel > 1
        self.stragglers = Stragglers(
            distributed.gather_text(socket.gethostname()),
            [name for name in OWN_PACE if not (waits and name == "forward")],
        )

    def on_start(self, state: RunState) -> None:
        """Start to compare the speed of the ranks."""
        self.stragglers.start(self.heartbeat.seconds)

    def after_step(self, state: RunState) -> None:
        """Log `state.metrics`, the slowest rank and host memory; collective."""
        if not _is_logged(self.intervals, state):
            return
        # Record stragglers as events of the run.
        values, slow = self.stragglers.look(self.heartbeat.seconds)
        for straggler in slow:
            details = {k: v for k, v in straggler._asdict().items() if k != "rank"}
            state.events.add(
                state.step,
                "straggler",
                slow_rank=straggler.rank,
                words=straggler.words,
                **details,
            )
        self.log(state, state.metrics | values | self.memory.values())

    def log(self, state: RunState, values: dict[str, float]) -> None:
        """Log `values` at this step on rank 0; keep an error in `state.log_error`."""
        if self.config.log_metrics and distributed.rank() == 0:
            try:
                self.config.log_metrics(state.step, values)
            except (FencedError, KeyboardInterrupt):
                raise
            except Exception as error:
                state.log_error = error

    def on_end(self, state: RunState) -> None:
        """Raise on rank 0 the error of its last log, if any."""
        raise_log_error(state)


def _is_logged(intervals: Intervals, state: RunState) -> bool:
    return intervals.due(intervals.log_every, state.step) or state.ends


def goodput(seconds: Mapping[str, Any]) -> float:
    """Return the share of this attempt's time so far that was spent in training steps."""
    return sum(seconds[name] for name in USEFUL) / max(sum(seconds.values()), 1e-9)
