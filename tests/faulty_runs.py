"""A small run whose loss is wrong at chosen calls, on one rank or several."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import runs
import tiny

from echolab.errors import ReplicaError
from echolab.training.config import ALONE, Intervals, Machine
from echolab.training.guards.spikes import SpikeConfig
from echolab.types import Batch, Draws, Loss

STEPS = 12
EVERY = Intervals(log_every=1, save_every=3, replica_check_every=2)


class Faulty:
    """The supervised objective, whose loss is multiplied where `bad` says so."""

    def __init__(self, bad: Callable[[Batch], float]) -> None:
        self.bad, self.plain = bad, runs.Supervised(runs.PHASES)

    def __call__(self, net: Any, batch: Batch, draws: Draws) -> Loss:
        loss = self.plain(net, batch, draws)
        return loss._replace(value=loss.value * self.bad(batch))


class Once:
    """A hardware fault: only the 8th loss is wrong."""

    def __init__(self, factor: float) -> None:
        self.calls, self.factor = 0, factor

    def __call__(self, batch: Batch) -> float:
        self.calls += 1
        return self.factor if self.calls == 8 else 1.0


def train(
    root: Path,
    bad: Callable[[Batch], float],
    machine: Machine = ALONE,
    save: int = 3,
    **guards: Any,
) -> list[dict[str, Any]]:
    result, rows = runs.train(
        root,
        runs.schedule(("sft", STEPS)),
        objectives={"sft": Faulty(bad)},
        intervals=Intervals(log_every=1, save_every=save, replica_check_every=2),
        loss_spike=SpikeConfig(**{"min_history": 4, "window": 16, **guards}),
        log_samples=True,
        net=tiny.net(trained=True),
        machine=machine,
    )
    assert result.done and result.step == STEPS
    return rows


def rank(root: str, strategy: str, world: int, wrong: int) -> int:
    """Train as a rank of a run that repeats steps; rank `wrong` has one loss that is not finite."""
    own = int(os.environ["RANK"]) == wrong
    bad = Once(float("nan")) if own else lambda batch: 1.0
    machine = Machine(strategy, devices=world, zero3_shard_small=True)
    train(Path(root), bad, policy="recompute", machine=machine)
    return 0


def with_a_wrong_gradient(root: str) -> int:
    """Train as one of two DDP ranks; rank 1's gradient changes after averaging.

    Return 3 if detected.
    """
    from echolab.training.module import DiffusionModule

    clip = DiffusionModule.on_before_optimizer_step

    def wrong(self: DiffusionModule, optimizer: Any) -> None:
        if os.environ["RANK"] == "1" and self.global_step == 4:
            for parameter in self.net.parameters():
                parameter.grad *= 1.5
        clip(self, optimizer)

    DiffusionModule.on_before_optimizer_step = wrong  # type: ignore[method-assign]
    try:
        train(Path(root), lambda batch: 1.0, machine=Machine("ddp", devices=2))
    except ReplicaError as error:
        print(error)
        os._exit(3)
    return 0
