"""Trains one run, from nothing or from where it was stopped: the same call either way."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import nn

from echolab.data.batches import read_tensors
from echolab.data.ledger import LEDGER
from echolab.data.micro_batches import stock
from echolab.data.plan import ORDER, Order
from echolab.data.quarantine import QUARANTINE, Tolerant
from echolab.data.shards import ShardDataset
from echolab.diffusion.phases import Allocator
from echolab.errors import ConfigError
from echolab.models.attention import attention_from, use_attention
from echolab.models.frozen import Frozen
from echolab.tasks.curriculum import Curriculum
from echolab.training.callbacks import Intervals, Sink, Steps
from echolab.training.checkpoint import check_architecture, open_checkpoint
from echolab.training.datamodule import Feed, HeldOut, ShardDataModule
from echolab.training.ema import Ema
from echolab.training.memory import speed_up
from echolab.training.module import DiffusionModule, Objective, Optim
from echolab.training.preference import Reference, References
from echolab.training.quiet import quiet
from echolab.training.schedule import Schedule
from echolab.training.stopping import StopSignals
from echolab.training.strategies import STRATEGIES, cluster_environment, strategy_from


class Machine(NamedTuple):
    """Where it runs.  `devices` is ranks a node; they must have been started already."""

    strategy: str = "single"
    devices: int = 1
    nodes: int = 1
    accelerator: str = "cpu"
    precision: str = "32-true"
    shard_small: bool = False  # ZeRO 3 cuts small tensors too: for tests
    attention: str = "auto"  # of attention.NAMES
    checkpointing: str = "none"  # or of memory.KEPT
    compile: bool = False  # the blocks
    sequence_parallel: int = 1  # ranks that share a clip


ALONE, OPTIM = Machine(), Optim()


class FitResult(NamedTuple):
    """How a run ended."""

    step: int  # optimizer steps done
    steps: int  # of the whole schedule
    stopped_by: int  # signal number; 0 where none
    checkpoint: Path | None  # the newest

    @property
    def done(self) -> bool:
        """Whether the whole schedule is behind us."""
        return self.step == self.steps


def _cut(batch_size: int, micro_batch_size: int | None, machine: Machine) -> int:
    """Micro-batches a step and rank; raises ConfigError where it does not divide."""
    world, together = machine.devices * machine.nodes, machine.sequence_parallel
    if together < 1 or world % together:
        raise ConfigError(
            f"trainer.sequence_parallel={together}: must divide the number of ranks, {world}"
        )
    world //= together
    micro = micro_batch_size or batch_size // world
    if micro < 1 or batch_size % (world * micro):
        raise ConfigError(
            f"batch_size={batch_size}: not a multiple of {world} ranks x micro_batch_size={micro}"
        )
    return batch_size // (world * micro)


def _trainer(machine: Machine, accumulation: int, clip: float, steps: Steps) -> pl.Trainer:
    """Lightning runs the loop; saving, logging, counting and stopping are ours."""
    if machine.strategy not in STRATEGIES:
        raise ConfigError(
            f"trainer.strategy={machine.strategy}: unknown; one of {', '.join(STRATEGIES)}"
        )
    alone = machine.strategy == "single"
    if alone and machine.devices * machine.nodes > 1:
        raise ConfigError("trainer.strategy=single: for one rank; take ddp, zero1, zero2 or zero3")
    zero = machine.strategy.startswith("zero")
    return pl.Trainer(
        accelerator=machine.accelerator,
        devices=machine.devices,
        num_nodes=machine.nodes,
        strategy=strategy_from(machine.strategy, shard_small=machine.shard_small),
        plugins=[] if alone else [cluster_environment()],
        precision=machine.precision,  # type: ignore[arg-type]
        accumulate_grad_batches=accumulation,
        gradient_clip_val=clip if zero else None,
        max_epochs=1,  # one Lightning epoch is the rest of the schedule
        callbacks=[steps],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )


class Training(NamedTuple):
    """Everything a training run is made of.

    `folder` is the run's: checkpoints lie in `folder/checkpoints`, and the newest whole one is gone
    on from, bit for bit, whatever the number of ranks or the strategy was.  Without one, training
    starts from the averaged weights of the checkpoint `initial`, or from `net` as it is.
    `objectives` has one entry for each kind of epoch; preference objectives hold `reference`,
    which is loaded at the start of each of their epochs with the averaged weights of that moment,
    or always with those of `reference_checkpoint`.
    """

    net: nn.Module
    architecture: Mapping[str, Any]
    folder: Path
    clips: Sequence[ShardDataset]  # one for each size of clips, or more, mixed by weight
    schedule: Schedule
    curriculum: Curriculum
    objectives: Mapping[str, Objective]
    batch_size: int  # clips of the largest size a step, over all ranks
    seed: int = 0
    shift: float = 5.0
    pairs: Sequence[ShardDataset] = ()
    weights: Sequence[float] | None = None  # of `clips`; None: by the numbers of their samples
    pair_weights: Sequence[float] | None = None
    order: Order = ORDER
    ledger: bool = False  # whether `folder/ledger` tells the samples of each step
    skip_budget: float = 0.0  # share of bad samples to go on with, listed in quarantine.jsonl
    reference: Reference | None = None
    reference_checkpoint: Path | None = None
    initial: Path | None = None
    adapters: Mapping[str, Any] | None = None  # of an adapted `net`: settings and base
    held_out: HeldOut | None = None
    phases: Allocator | None = None  # for the held-out error
    optim: Optim = OPTIM
    machine: Machine = ALONE
    micro_batch_size: int | None = None
    workers: int = 0
    every: Intervals | None = None
    agreed: str = ""  # must be equal on all ranks: a digest of the settings, say
    log: Sink | None = None  # (step, values), on rank 0
    on_step: Callable[[int, int], None] | None = None  # (step, steps), on rank 0

    @property
    def quarantine(self) -> Path | None:
        """Where bad samples are listed, if any are borne with."""
        return self.folder / QUARANTINE if self.skip_budget else None

    @property
    def sharded(self) -> bool:
        """Whether DeepSpeed holds the weights."""
        return self.machine.strategy.startswith("zero")

    def check(self) -> None:
        """ConfigError for parts that do not fit each other."""
        missing = {epoch.kind for epoch in self.schedule.epochs} - set(self.objectives)
        if missing:
            raise ConfigError(f"schedule: no objective for {', '.join(sorted(missing))} epochs")
        if self.held_out and not self.phases:
            raise ConfigError("held_out: needs phases too")
        accelerator = self.machine.accelerator
        if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
            raise ConfigError(f"trainer.accelerator={accelerator}: no GPU here; take trainer=cpu")
        for clips in self.clips:
            reader = Tolerant(clips, skip_budget=self.skip_budget, quarantine=self.quarantine)
            first = reader.read(0, partial(read_tensors, clips))[0] if len(clips) else {}
            for name in ("text", "image", "audio"):
                wanted = self.architecture.get(f"{name}_dim")
                if wanted and name in first and first[name].shape[-1] != wanted:
                    raise ConfigError(
                        f"model.{name}_dim={wanted}: the clips of {clips.folder} have "
                        f"{first[name].shape[-1]}; take the model= that fits their encoders"
                    )
        if any(clips.encoders != self.clips[0].encoders for clips in self.clips):
            names = ", ".join(str(clips.folder) for clips in self.clips)
            raise ConfigError(f"data.clips: {names} were encoded by different networks")

    def feed(self) -> Feed:
        """The batches, planned; raises EcholabError where that cannot be."""
        shared: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.seed}
        shared |= {"skip_budget": self.skip_budget, "quarantine": self.quarantine}
        clips = stock(self.clips, kind="encoded", weights=self.weights, order=self.order, **shared)
        pairs = None
        if self.pairs:  # few and met often: their epochs always run on into each other
            order = self.order._replace(remainder="carry")
            pairs = stock(
                self.pairs, kind="preference", weights=self.pair_weights, order=order, **shared
            )
        accumulation = _cut(self.batch_size, self.micro_batch_size, self.machine)
        together = self.machine.sequence_parallel
        return Feed(
            clips,
            pairs,
            self.batch_size,
            accumulation,
            self.workers,
            self.seed,
            together,
            self.quarantine,
        )

    def identity(self, feed: Feed) -> dict[str, Any]:
        """What a checkpoint must agree on with the run."""
        return {
            "architecture": dict(self.architecture),
            "adapters": dict(self.adapters) if self.adapters else None,
            "clips": [clips.fingerprint for clips in self.clips],
            "encoders": dict(self.clips[0].encoders),
            "pairs": [pairs.fingerprint for pairs in self.pairs],
            "order": feed.clips.plan.state(),
            "seed": self.seed,
            "batch_size": self.batch_size,
        }


def fit(training: Training) -> FitResult:
    """Train through the rest of the schedule; raises EcholabError for what a user can mend.

    SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 on any rank end the run after the step, with a checkpoint;
    the result says by which.  Handlers and global state are afterwards as they were before.
    """
    training.check()
    if training.initial:
        origin = open_checkpoint(training.initial)
        check_architecture(origin, training.architecture)
        training.net.load_state_dict(origin.tensors("ema"))
    machine, optim = training.machine, training.optim
    feed = training.feed()
    _speed_up(training)
    schedule = training.schedule
    data = ShardDataModule(feed, schedule.place, schedule.steps, training.curriculum)
    module = _module(training, feed.accumulation)
    with StopSignals() as signals, quiet():
        steps = _steps(training, data, signals)
        _trainer(machine, feed.accumulation, optim.clip, steps).fit(module, data)
    return FitResult(steps.step, schedule.steps, steps.stopped_by, steps.saved)


def _speed_up(training: Training) -> None:
    machine = training.machine
    device = "cuda" if machine.accelerator in ("gpu", "cuda") else machine.accelerator
    speed_up(
        training.net,
        device=device,
        attention=machine.attention,
        checkpointing=machine.checkpointing,
        compiled=machine.compile,
    )
    if isinstance(training.reference, Frozen):
        use_attention(training.reference.net, attention_from(machine.attention, device))


def _module(training: Training, accumulation: int) -> DiffusionModule:
    return DiffusionModule(
        training.net,
        training.objectives,
        optim=training.optim,
        seed=training.seed,
        shift=training.shift,
        clip_here=not training.sharded,
        loss_factor=accumulation if training.sharded else 1,
        sequence_parallel=training.machine.sequence_parallel,
    )


def _steps(training: Training, data: ShardDataModule, signals: StopSignals) -> Steps:
    return Steps(
        folder=training.folder / "checkpoints",
        schedule=training.schedule,
        data=data,
        ema=Ema(training.optim.ema_decay),
        every=training.every or Intervals(),
        signals=signals,
        references=References(
            training.objectives, training.reference, training.reference_checkpoint
        ),
        identity=training.identity(data.feed),
        agreed=training.agreed,
        held_out=training.held_out,
        phases=training.phases,
        log=training.log,
        ledger=training.folder / LEDGER if training.ledger else None,
        on_step=training.on_step,
    )
