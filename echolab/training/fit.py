"""Train a run, from the start or, if there is one, from its newest checkpoint."""

import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl

from echolab.data.shard_reader import check_same_encoders
from echolab.heartbeat import Heartbeat
from echolab.metrics.sync_clips import is_sync
from echolab.models.attention import attention_from, use_attention
from echolab.models.frozen import Frozen
from echolab.training.checkpoints.checkpoint import check_architecture, open_checkpoint
from echolab.training.config import Intervals, Machine, TrainConfig
from echolab.training.datamodule import ShardDataModule
from echolab.training.engine.activation_checkpointing import OFFLOAD, speed_up
from echolab.training.engine.ema import EMA
from echolab.training.engine.engine_report import check_alone, check_frozen_networks
from echolab.training.engine.placement import place_shared, placement_of
from echolab.training.engine.strategies import cluster_environment, strategy_of
from echolab.training.loop import TrainLoop
from echolab.training.module import DiffusionModule
from echolab.training.signals import StopSignals

__all__ = ["FitResult", "Intervals", "Machine", "TrainConfig", "fit"]


class FitResult(NamedTuple):
    """The end of an attempt of a run."""

    step: int  # optimizer steps done
    steps: int  # optimizer steps of the schedule
    reason: str  # done, until, signal, time, memory, stop or prune
    stopped_by: int  # signal number; 0 if none
    unsaved: bool  # the last steps are in no checkpoint
    checkpoint: Path | None  # the newest checkpoint

    @property
    def done(self) -> bool:
        """True if all steps of the schedule are done and saved, and the export is verified."""
        return self.reason == "done"


class quiet:
    """Silences Lightning's banners and hints, which do not apply here."""

    def __enter__(self) -> None:
        self._levels = {}
        for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
            logger = logging.getLogger(name)
            self._levels[logger] = logger.level
            logger.setLevel(logging.ERROR)
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        warnings.filterwarnings("ignore", module="lightning_fabric")

    def __exit__(self, *error: Any) -> None:
        self._warnings.__exit__(*error)
        for logger, level in self._levels.items():
            logger.setLevel(level)


def _trainer(machine: Machine, accumulation: int, clip: float, loop: pl.Callback) -> pl.Trainer:
    """Make a trainer without Lightning's saving, logging and stopping, which `loop` replaces."""
    # Disable all default features of Lightning that `loop` replaces.
    trainer = pl.Trainer(
        accelerator=machine.accelerator,
        devices=machine.devices,
        num_nodes=machine.num_nodes,
        strategy=strategy_of(machine),
        plugins=[] if machine.strategy == "single" else [cluster_environment()],
        precision=machine.precision,  # type: ignore[arg-type]
        accumulate_grad_batches=accumulation,
        gradient_clip_val=clip if machine.sharded else None,
        max_epochs=-1,  # a Lightning epoch lasts until the next rollback or the schedule's end
        reload_dataloaders_every_n_epochs=1,
        callbacks=[loop],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    # `StopSignals` already handles signals.  Lightning would replace its handlers, and broadcast
    # SIGTERM among all ranks before every micro-batch; no public setting prevents that.
    # test_lightning.py fails if Lightning changes either method.
    no_op: Any = lambda: None  # noqa: E731
    trainer._signal_connector.register_signal_handlers = no_op  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = no_op  # type: ignore[method-assign]
    return trainer


def fit(config: TrainConfig) -> FitResult:
    """Train to the end of the schedule; raise EcholabError for errors that a user can fix.

    SIGNALS on any rank, the time limit of the job and control files end the run after the current
    step, with a checkpoint; the result contains the reason.  Signal handlers and global state are
    restored at the end.
    """
    with StopSignals(config.signal_grace_seconds) as signals, quiet():
        config.check()
        heartbeat = config.heartbeat or Heartbeat(None)
        _load_initial(config)
        train_data, schedule = config.build_data(), config.schedule
        if not is_sync(config.architecture):  # without blocks and attention
            _speed_up(config)
        # Build data, module and loop, and run them in Lightning's trainer.
        data = ShardDataModule(
            train_data, schedule.place, schedule.steps, config.curriculum, heartbeat
        )
        module = _module(config, train_data.accumulation, heartbeat)
        loop = TrainLoop(config, data, module, signals=signals, heartbeat=heartbeat)
        _trainer(config.machine, train_data.accumulation, config.optim.max_grad_norm, loop).fit(
            module, data
        )
    state = loop.state
    return FitResult(
        step=state.step,
        steps=schedule.steps,
        reason=state.reason or "done",  # a finished run has no more steps, so no reason was set
        stopped_by=state.signal,
        unsaved=state.unsaved,
        checkpoint=state.checkpoint,
    )


def _load_initial(config: TrainConfig) -> None:
    """Load the weights of `init_from`, if given; a checkpoint of the run replaces them later."""
    if not config.init_from:
        return
    # The checkpoint must fit the network and the encoders of the clips.
    origin = open_checkpoint(config.init_from)
    check_architecture(origin, config.architecture)
    encoders, clips = origin.state.get("encoders") or {}, config.clips[0]
    check_same_encoders(origin.path, encoders, clips.folder, clips.encoders)
    weights = origin.tensors(EMA)
    # Ranks share a transformer's weights; a SyncNet is small, and in memory already.
    if is_sync(config.architecture):
        config.net.load_state_dict(weights, strict=False)
    else:
        where = placement_of(config.machine)
        place_shared(config.net, weights.items, where, "initial weights")


def _speed_up(config: TrainConfig) -> None:
    machine = config.machine
    device = "cuda" if machine.accelerator in ("gpu", "cuda") else machine.accelerator
    speed_up(
        config.net,
        device=device,
        attention=machine.attention,
        checkpointing=machine.activation_checkpointing,
        compiled=machine.compile,
    )
    if isinstance(config.reference, Frozen):
        use_attention(config.reference.net, attention_from(machine.attention, device))


def _module(config: TrainConfig, accumulation: int, heartbeat: Heartbeat) -> DiffusionModule:
    module = DiffusionModule(
        config.net,
        config.objectives,
        optim=config.optim,
        seed=config.seed,
        shift=config.flow_shift,
        clip_here=not config.sharded,
        loss_factor=accumulation if config.sharded else 1,
        sequence_parallel=config.machine.sequence_parallel,
        offloads=config.machine.activation_checkpointing == OFFLOAD,
        heartbeat=heartbeat,
    )
    # The reference must be outside of the module, or the engine would wrap and save it.
    check_alone(module, config.net)
    reference = config.reference
    check_frozen_networks(
        config.net, [("reference", reference)] if isinstance(reference, Frozen) else []
    )
    return module
