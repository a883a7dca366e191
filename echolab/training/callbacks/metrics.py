"""What a run logs: measured before the step is saved, written after."""

import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from echolab.errors import FencedError
from echolab.heartbeat import Heartbeat
from echolab.training import distributed
from echolab.training.callbacks.callback import Callback
from echolab.training.callbacks.checkpoints import raise_log_error
from echolab.training.config import TrainConfig
from echolab.training.datamodule import ShardDataModule
from echolab.training.guards.host_memory import HostMemory
from echolab.training.guards.stragglers import OWN_PACE, Stragglers
from echolab.training.intervals import Intervals
from echolab.training.module import Meter
from echolab.training.run_state import RunState

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
        now, spent = time.monotonic(), self.heartbeat.seconds
        done, seconds = state.step - self._step, max(now - self._time, 1e-9)
        values = state.module.meter.flush()
        values["train/lr"] = state.schedule.lr(state.step - 1)
        values["perf/steps_per_second"] = done / seconds
        waited = spent["data_wait"] - self._waited
        values |= distributed.means({"perf/data_wait_seconds": (waited, done)})
        values["perf/goodput"] = goodput(spent)
        supervised = state.schedule.supervised_steps(state.step)
        for task, probability in self.data.curriculum.probabilities(supervised).items():
            values[f"tasks/probability/{task}"] = probability
        values |= self.data.progress(state.step)
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
