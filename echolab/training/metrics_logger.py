"""What a run tells: what its engine does, when it starts, and its figures at every log."""

import time
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from echolab.heartbeat import Heartbeat
from echolab.training import distributed
from echolab.training.config import Training
from echolab.training.datamodule import ShardDataModule
from echolab.training.engine import engine_report as engine
from echolab.training.engine.master_weights import Masters
from echolab.training.meter import means
from echolab.training.module import DiffusionModule
from echolab.training.schedule import Schedule

USEFUL = ("forward", "backward", "optimizer")


def tell_plan(
    training: Training,
    trainer: pl.Trainer,
    module: DiffusionModule,
    masters: Masters,
    average: list[Tensor],
    accumulation: int,
) -> None:
    """What the live engine does; EcholabError where it is not what was asked for."""
    plan = engine.plan_of(trainer, module.net, masters, average)
    blocks = len(module.net.blocks)  # type: ignore[arg-type]
    asked = engine.expected_plan(training.machine, accumulation, training.optim.clip, blocks)
    engine.check(plan, asked)
    engine.check_hooks(module, training.machine)
    if training.say and distributed.rank() == 0:
        training.say(plan.lines())


class Telling:
    """Figures since the last log, of one attempt from step `step` on."""

    def __init__(
        self, module: DiffusionModule, data: ShardDataModule, heartbeat: Heartbeat, step: int
    ):
        self.module, self.data, self.heartbeat = module, data, heartbeat
        self._step, self._at, self._waited = step, time.monotonic(), heartbeat.seconds["data_wait"]

    def values(self, step: int, schedule: Schedule) -> dict[str, float]:
        """Means of the steps since the last time, and the live state; collective."""
        now, spent = time.monotonic(), self.heartbeat.seconds
        done, seconds = step - self._step, max(now - self._at, 1e-9)
        values = self.module.meter.flush()
        values["train/lr"] = schedule.lr(step - 1)
        values["perf/steps_per_second"] = done / seconds
        values |= means({"perf/data_wait_seconds": (spent["data_wait"] - self._waited, done)})
        values["perf/goodput"] = goodput(spent)
        supervised = schedule.supervised_steps(step)
        for task, probability in self.data.curriculum.probabilities(supervised).items():
            values[f"tasks/probability/{task}"] = probability
        self._step, self._at, self._waited = step, now, spent["data_wait"]
        return values | self.data.progress(step)


def goodput(seconds: Mapping[str, Any]) -> float:
    """Share of an attempt so far that went into steps."""
    return sum(seconds[name] for name in USEFUL) / max(sum(seconds.values()), 1e-9)
