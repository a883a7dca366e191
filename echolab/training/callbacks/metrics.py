"""The metrics of a run: measured before the step is saved, logged after it.

Slow ranks are named with their host and section of the step.  Only sections without collectives are
compared: in the others the fast ranks wait for the slow.
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
SHARE = 0.05  # of the step: shorter sections are ignored
LIMIT = 0.75  # of the score
WINDOWS = 3  # in a row


class Straggler(NamedTuple):
    """A rank that has been slow for some windows in a row."""

    rank: int
    host: str
    section: str
    score: float  # seconds of the fastest rank / its own, in the last window
    seconds: float  # its own, in the last window
    best: float  # the fastest rank's

    @property
    def words(self) -> str:
        """One line for people."""
        return (
            f"rank {self.rank} on {self.host} is slow in {self.section}: {self.seconds:.3g} s, "
            f"the fastest rank {self.best:.3g} s (score {self.score:.2f})"
        )


def scores(
    windows: Sequence[Mapping[str, float]], sections: Sequence[str] = OWN_PACE
) -> list[dict[str, float]]:
    """Return best / own in 0 to 1 for each rank and section, given its seconds by section.

    A section counts for a rank that spends at least SHARE of its step in it.
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
    """Compares the ranks' seconds from one call of `look` to the next."""

    def __init__(self, hosts: Sequence[str], sections: Sequence[str] = OWN_PACE) -> None:
        """Set the `hosts` by rank.

        Leave out of `sections` those with collectives: `forward` has some under ZeRO 3 and if ranks
        share a clip.
        """
        self.hosts, self.sections = list(hosts), tuple(sections)
        self._last = dict.fromkeys(STEP, 0.0)
        self._low: dict[tuple[int, str], int] = {}  # windows in a row

    def start(self, seconds: Mapping[str, float]) -> None:
        """Begin a window; what came before, such as the first step, is left out."""
        self._last = {name: seconds[name] for name in STEP}

    def look(self, seconds: Mapping[str, float]) -> tuple[dict[str, float], list[Straggler]]:
        """Return values for the log, and ranks that have just been slow for WINDOWS windows.

        `seconds` is `Heartbeat.seconds`.  Collective: one all-reduce of a few numbers for each
        rank.
        """
        own = [seconds[name] - self._last[name] for name in STEP]
        self.start(seconds)
        world, rank, width = distributed.world(), distributed.rank(), len(STEP)
        if world == 1:
            return {}, []
        # Each rank fills its own row; the sum over ranks is the table.
        flat = [0.0] * (world * width)
        flat[rank * width : (rank + 1) * width] = own
        flat = distributed.sums(flat)
        rows = [flat[first : first + width] for first in range(0, len(flat), width)]
        return self.judge([dict(zip(STEP, row, strict=True)) for row in rows])

    def judge(
        self, windows: Sequence[Mapping[str, float]]
    ) -> tuple[dict[str, float], list[Straggler]]:
        """Return the same, given all ranks' seconds of one window."""
        stragglers, low = [], {}
        of_ranks = scores(windows, self.sections)
        for rank, own in enumerate(of_ranks):
            for section, score in own.items():
                if score >= LIMIT:
                    continue
                # Slow in several windows in a row, reported once.
                low[rank, section] = self._low.get((rank, section), 0) + 1
                if low[rank, section] == WINDOWS:
                    spent = windows[rank][section]
                    best = score * spent
                    host = self.hosts[rank]
                    stragglers.append(Straggler(rank, host, section, score, spent, best))
        self._low = low
        worst = min((score for own in of_ranks for score in own.values()), default=1.0)
        return {"perf/straggler_score": worst}, stragglers


USEFUL = ("forward", "backward", "optimizer")  # sections


class MeasureMetrics(Callback):
    """Averages over the steps since the last log: losses, rates, waiting time."""

    def __init__(
        self,
        intervals: Intervals,
        data: ShardDataModule,
        heartbeat: Heartbeat,
        custom: Sequence[Callback] = (),
    ) -> None:
        """Take the clock of `heartbeat`; `custom` are callbacks that may add values."""
        self.intervals, self.data, self.heartbeat, self.custom = intervals, data, heartbeat, custom
        self._step, self._time, self._waited = 0, 0.0, 0.0

    def on_start(self, state: RunState) -> None:
        """Start the clock."""
        self._step, self._time = state.step, time.monotonic()
        self._waited = self.heartbeat.seconds["data_wait"]

    def on_rollback(self, state: RunState) -> None:
        """Drop the values of the steps that were undone, and start the clock."""
        state.module.meter = Meter()
        self.on_start(state)

    def after_step(self, state: RunState) -> None:
        """Put the values of a step that logs into `state.metrics`; collective."""
        if not _logs(self.intervals, state):
            return
        # Means over the steps since the last log.
        now, spent = time.monotonic(), self.heartbeat.seconds
        done, seconds = state.step - self._step, max(now - self._time, 1e-9)
        values = state.module.meter.flush()
        values["train/lr"] = state.schedule.lr(state.step - 1)
        values["perf/steps_per_second"] = done / seconds
        # Waiting time is a mean over the ranks too.
        waited = spent["data_wait"] - self._waited
        values |= distributed.means({"perf/data_wait_seconds": (waited, done)})
        values["perf/goodput"] = goodput(spent)
        # The state of the curriculum and of the data.
        supervised = state.schedule.supervised_steps(state.step)
        for task, probability in self.data.curriculum.probabilities(supervised).items():
            values[f"tasks/probability/{task}"] = probability
        values |= self.data.progress(state.step)
        # The user's own values last: theirs win.
        for callback in self.custom:
            values |= callback.metrics(state)
        state.metrics = values
        self._step, self._time, self._waited = state.step, now, spent["data_wait"]


class LogMetrics(Callback):
    """Logs on rank 0.  A failure there is raised after the next step, once all ranks have saved."""

    def __init__(
        self, config: TrainConfig, intervals: Intervals, memory: HostMemory, heartbeat: Heartbeat
    ):
        """Gather the hosts of all ranks; collective."""
        self.config, self.intervals = config, intervals
        self.memory, self.heartbeat = memory, heartbeat
        # Sections with collectives inside say nothing about one rank's speed.
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
        if not _logs(self.intervals, state):
            return
        # Slow ranks become events of the run.
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
        """Raise on rank 0 what kept it from logging the end."""
        raise_log_error(state)


def _logs(intervals: Intervals, state: RunState) -> bool:
    return intervals.due(intervals.log_every, state.step) or state.ends


def goodput(seconds: Mapping[str, Any]) -> float:
    """Return the share of this attempt so far that was spent in steps."""
    return sum(seconds[name] for name in USEFUL) / max(sum(seconds.values()), 1e-9)
