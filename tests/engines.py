"""Runs of a toy network whose gradient is known, by every strategy: what the ranks of tests do."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from echolab.data.train_dataset import MicroBatch
from echolab.errors import EcholabError
from echolab.heartbeat import Heartbeat
from echolab.training import distributed
from echolab.training.engine.engine_report import ClippedNorm, check_clipped, check_counts
from echolab.training.engine.master_weights import MASTER, MOMENTS, Masters, masters_of
from echolab.training.fit import Machine, _trainer, quiet
from echolab.training.module import DiffusionModule, Optim
from echolab.types import Loss

RATE = 1e-3
CLIP = Optim(max_grad_norm=1.0, eps=1e-4, weight_decay=0.0)
LAW = Optim(weight_decay=0.0)
NORM = 10.0  # of the gradient where every micro-batch pulls with 1


class Pulled(nn.Module):
    """Its output is the pull times a fixed direction times the parameters: that is the gradient."""

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((5, 7), value))  # no number of ranks divides 35
        self.bias = nn.Parameter(torch.full((3,), value))
        direction = torch.linspace(-1, 2, 38)
        self.direction = direction / direction.norm() * NORM

    def forward(self, pull: Tensor) -> Tensor:
        """Return [] for []."""
        weight, bias = self.direction[:35].view(5, 7), self.direction[35:]
        return pull * ((weight * self.weight).sum() + (bias * self.bias).sum())


class Even(nn.Module):
    """Weights between 1 and 1.01, few of them bf16 numbers; their gradient is the pull."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(1, 1.01, 12).view(4, 3))

    def forward(self, pull: Tensor) -> Tensor:
        """Return [] for []."""
        return (pull * self.weight).sum()


class Tied(nn.Module):
    """One weight under two names, behind a frozen layer that it must not move."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 5)
        self.first, self.second = nn.Linear(5, 7, bias=False), nn.Linear(5, 7)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.linspace(-0.5, 0.7 + i, parameter.numel()).view_as(parameter))
        self.frozen.requires_grad_(False)
        self.second.weight = self.first.weight

    def forward(self, pull: Tensor) -> Tensor:
        """Return [] for []."""
        given = self.frozen(torch.linspace(0, 1, 3).to(pull.dtype) * pull)
        return (self.first(given).tanh() * self.second(given)).sum()


def item(pull: float, share: float = 1.0) -> MicroBatch:
    """Return a micro-batch of one clip with this pull."""
    batch = tiny.batch(1)
    return MicroBatch(
        "sft", 0, [0], batch._replace(latents=torch.full_like(batch.latents, pull)), [0], share
    )


class Items(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """This rank's share of the micro-batches of all steps: [step][micro-batch over all ranks]."""

    def __init__(self, steps: list[list[tuple[float, float]]]) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[MicroBatch]:
        for step in self.steps:
            for pull, share in step[distributed.rank() :: distributed.world()]:
                yield item(pull, share)


class Watch(pl.Callback):
    """Sets the rate, counts, measures, and keeps weights and moments after every step."""

    def __init__(self, steps: int, accumulation: int, rate: float, clip: float) -> None:
        self.steps, self.accumulation, self.rate, self.clip = steps, accumulation, rate, clip
        self.step, self.norms = 0, list[float]()
        self.states: list[dict[str, Tensor]] = []
        self.masters: Masters

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.masters = masters_of(pl_module.net, trainer.optimizers[0])  # type: ignore[arg-type]
        self.masters.prepare()
        sharded = type(self.masters) is not Masters
        replicated = 1 if sharded else distributed.world()
        self.norm = ClippedNorm(self.masters.optimizer, replicated=replicated)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.rate

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        if (rest[-1] + 1) % self.accumulation:
            return
        self.step += 1
        check_counts(trainer, steps=self.step, accumulation=self.accumulation)
        squares = distributed.sums([float(self.norm.take())])[0]
        self.norms.append(check_clipped(squares, self.clip, self.step))
        self.states.append(
            {
                f"{part}/{name}": self.masters.full_tensor(name, self.masters.flats(part)).clone()
                for part in (MASTER, *MOMENTS)
                for name in self.masters.parameters
            }
        )
        trainer.should_stop = self.step == self.steps


def pull(
    net: nn.Module,
    machine: Machine,
    steps: list[list[tuple[float, float]]],
    optim: Optim,
    rate: float,
) -> Watch:
    """Train `net` on the micro-batches."""
    accumulation = len(steps[0]) // machine.world
    watch = Watch(len(steps), accumulation, rate, optim.max_grad_norm)
    module = DiffusionModule(
        net,
        {"sft": lambda net, batch, draws: Loss(net(batch.latents.mean()), {})},
        optim=optim,
        seed=0,
        shift=5.0,
        clip_here=not machine.sharded,
        loss_factor=accumulation if machine.sharded else 1,
        heartbeat=Heartbeat(None),
    )
    with quiet():
        trainer = _trainer(machine, accumulation, optim.max_grad_norm, watch)
        loader = torch.utils.data.DataLoader(Items(steps), batch_size=None)
        trainer.fit(module, loader)
    return watch


def machine_of(case: Mapping[str, Any], world: int) -> Machine:
    """Build from JSON; also in a process that trained before: Lightning then forgets the world."""
    os.environ["WORLD_SIZE"] = str(world)
    return Machine(devices=world, zero3_shard_small=True, **case)


def keep(watch: Watch, to: Path) -> None:
    """Write what was measured, for `measured`."""
    if distributed.rank() == 0:
        states = {f"{i}/{k}": t for i, state in enumerate(watch.states) for k, t in state.items()}
        save_file(states, to.with_suffix(".safetensors"))
        to.with_suffix(".json").write_text(json.dumps(watch.norms))


def measured(folder: Path, name: str) -> tuple[dict[str, Tensor], list[float]]:
    """Return states by step and name, and the norms after clipping."""
    norms = json.loads((folder / f"{name}.json").read_text())
    return load_file(folder / f"{name}.safetensors"), norms


def name_of(case: Mapping[str, Any], *more: Any) -> str:
    """Name the file of a case."""
    return "-".join(map(str, (*case.values(), *more)))


def pulls(micro_batches: int) -> list[list[tuple[float, float]]]:
    """Return (pull, share) of each micro-batch over all ranks: gradients of norm 10, 0.5, 30, 10.

    The last step is a short one: all but its first micro-batch are padding.
    """
    uneven = [1 + 0.5 * (2 * i - micro_batches + 1) / micro_batches for i in range(micro_batches)]
    full = [[(size * p, 1.0) for p in uneven] for size in (1.0, 0.05, 3.0)]
    return [*full, [(1.0, float(micro_batches))] + [(5.0, 0.0)] * (micro_batches - 1)]


def clip(
    cases: list[dict[str, Any]], accumulations: list[int], world: int, to: str, limit: float = 1.0
) -> None:
    """Run every case with every accumulation, in a rank."""
    optim = CLIP._replace(max_grad_norm=limit)
    for case in cases:
        for accumulation in accumulations:
            machine = machine_of(case, world)
            steps = pulls(machine.world * accumulation)
            watch = pull(Pulled(), machine, steps, optim, RATE)
            keep(watch, Path(to) / name_of(case, accumulation))


def tied(cases: list[dict[str, Any]], world: int, to: str) -> None:
    """Run every case in a rank; the frozen layer must not change."""
    import deepspeed

    for case in cases:
        net, plain = Tied(), Tied()
        steps = [[(0.5 * step, 1.0)] * world for step in range(1, 5)]
        keep(pull(net, machine_of(case, world), steps, CLIP, RATE), Path(to) / name_of(case))
        frozen = dict(net.frozen.named_parameters())
        cut = case["strategy"] == "zero3"
        with deepspeed.zero.GatheredParameters(list(frozen.values()), enabled=cut):
            for name, parameter in frozen.items():
                assert torch.equal(parameter, plain.frozen.get_parameter(name)), (case, name)


def sabotaged(case: dict[str, Any], world: int, patches: list[Any], message: str) -> int:
    """Train with `patches`; return 0 if this rank gets `message` as an error."""
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        try:
            pull(Pulled(), machine_of(case, world), pulls(3 * world), CLIP, RATE)
        except EcholabError as error:
            print(error)
            return int(message not in str(error))
    return 2


def unclipped(case: dict[str, Any], world: int) -> int:
    """Let the last rank not clip, in a rank."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    def nothing(*given: Any, **keywords: Any) -> Tensor:
        return torch.zeros(())

    places = [
        (DeepSpeedZeroOptimizer, "unscale_and_clip_grads"),
        (DeepSpeedZeroOptimizer_Stage3, "unscale_and_clip_grads"),
        (nn.utils, "clip_grad_norm_"),
    ]
    here = os.environ["RANK"] == str(world - 1)
    patches = [mock.patch.object(owner, name, nothing) for owner, name in places if here]
    return sabotaged(case, world, patches, "did not clip on all ranks")


def unaccumulated(case: dict[str, Any], world: int) -> int:
    """Let DeepSpeed step after every micro-batch, in a rank."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    patch = mock.patch.object(DeepSpeedEngine, "gradient_accumulation_steps", lambda engine: 1)
    report = "after 1 steps of 3 micro-batches: deepspeed's global_steps is 3, not 1"
    return sabotaged(case, world, [patch], report)


def precision(cases: list[dict[str, Any]], world: int, to: str) -> None:
    """Take 100 steps with a gradient of 0.01, in a rank."""
    for case in cases:
        machine = machine_of(case, world)
        steps = [[(0.01, 1.0)] * machine.world] * 100
        keep(pull(Even(), machine, steps, LAW, RATE), Path(to) / name_of(case))
