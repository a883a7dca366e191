"""The training loop: Lightning runs forward and backward, an ordered list of callbacks the rest.

`TrainLoop.ordered_callbacks` defines the order.
"""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from torch.optim import Optimizer

from echolab.heartbeat import Heartbeat
from echolab.metrics.sync_clips import is_sync
from echolab.training import distributed
from echolab.training.callbacks.callback import Callback, RunState
from echolab.training.callbacks.checkpoints import Checkpoints
from echolab.training.callbacks.condition_effect import ConditionEffect
from echolab.training.callbacks.evaluation import EvaluationCallback
from echolab.training.callbacks.export_check import ExportCheck
from echolab.training.callbacks.loss_spikes import LossSpikes
from echolab.training.callbacks.metrics import LogMetrics, MeasureMetrics
from echolab.training.callbacks.reference_model import ReferenceModel
from echolab.training.callbacks.replicas import ReplicaCheck
from echolab.training.callbacks.sample_ledger import SampleLedger
from echolab.training.callbacks.step_sync import ControlFiles, Pause, StepSync
from echolab.training.callbacks.sync_validation import SyncValidation
from echolab.training.callbacks.validation import Validation
from echolab.training.checkpoints import checkpoint as checkpoints
from echolab.training.checkpoints.writer import CheckpointWriter
from echolab.training.config import TrainConfig
from echolab.training.datamodule import ShardDataModule
from echolab.training.engine import engine_report
from echolab.training.engine.ema import EMA, Ema
from echolab.training.engine.master_weights import Masters, masters_of
from echolab.training.guards.host_memory import HostMemory
from echolab.training.intervals import Intervals
from echolab.training.module import DiffusionModule
from echolab.training.resume import awaits_export_check, go_to, open_run
from echolab.training.signals import StopSignals

CUSTOM = "callbacks"  # key in the checkpoint's state of the user's callbacks, by class


class TrainLoop(pl.Callback):
    """Calls each callback once per optimizer step; Lightning calls its hooks per micro-batch."""

    def __init__(
        self,
        config: TrainConfig,
        data: ShardDataModule,
        module: DiffusionModule,
        *,
        signals: StopSignals,
        heartbeat: Heartbeat,
    ) -> None:
        self.config, self.data, self.module = config, data, module
        self.signals, self.heartbeat = signals, heartbeat
        self.intervals = config.intervals or Intervals()
        optim = config.optim
        self.ema = Ema(
            optim.ema_decay,
            optim.extra_ema_decays,
            optim.posthoc_ema_stds,
            keeps_reference=config.mixes_reference,
        )
        # Set in `setup`, when the ranks are connected, and after the optimizer is created.
        self._state: RunState | None = None
        self._masters: Masters | None = None
        self.callbacks: list[Callback] = []

    @property
    def state(self) -> RunState:
        """The state of this attempt; available from `setup` on."""
        assert self._state
        return self._state

    @property
    def masters(self) -> Masters:
        """The fp32 weights and their optimizer; available from `_prepare` on."""
        assert self._masters
        return self._masters

    # -- the order ----------------------------------------------------------------------------

    def ordered_callbacks(self, trainer: pl.Trainer) -> list[Callback]:
        """Return the callbacks in the order in which they act on a step; collective."""
        config, intervals, data = self.config, self.intervals, self.data
        replicas, checkpoints, sync, log = self._shared_callbacks()
        evaluated: dict[str, Any] = {
            "masters": self.masters, "ema": self.ema, "sync": sync, "log": log
        }  # fmt: skip
        return [
            # Sets the learning rate before the step.  (`ReferenceModel` also acts before it.)
            LearningRate(trainer.optimizers[0]),
            # Update the averages first, so that saved or validated averages include this step.
            EmaUpdate(self.ema, self.masters),
            # Vote: everything below decides by the summed votes, so that all ranks decide the same.
            sync,
            # Undo a bad step before it is saved or logged; callbacks below are then not called.
            LossSpikes(config, trainer, data, checkpoints),
            # The objective's running margin and the ledger include only accepted steps.
            ReferenceModel(config, self.masters, self.ema, checkpoints, replicas),
            *([SampleLedger(config.run_dir, data)] if config.log_samples else []),
            # Measure here, so that the time of checks and saves counts in the next interval.
            MeasureMetrics(intervals, data, self.heartbeat, config.callbacks),
            # Check the replicas before saving: weights that differ must not be saved.
            replicas,
            # Save before anything that can take long, hang or fail.
            checkpoints,
            # Log after the save: a tracker that hangs or fails loses no checkpoint.
            log,
            # These take long; a request to end the run interrupts them.
            *self._held_out_checks(checkpoints=checkpoints, **evaluated),
            # The user's callbacks: the step is saved, so their errors or delays cannot lose it.
            *config.callbacks,
            # Pause after all other work of the step, since it may take arbitrarily long.
            Pause(sync),
            # Acts only in `on_end`, where it is first, since `on_end` runs in reverse order.
            ExportCheck(config, **evaluated),
        ]

    def _held_out_checks(self, **shared: Any) -> list[Callback]:
        """Make the callbacks that measure the weights on held-out clips, the quickest first."""
        config, intervals, data = self.config, self.intervals, self.data
        if is_sync(config.architecture):
            return [SyncValidation(config, intervals, data, **shared)]
        return [
            # Held-out errors, and whether the network uses each of its conditions.
            ConditionEffect(config, intervals, data, **shared),
            # Sampling takes longest.
            EvaluationCallback(config, data, **shared),
        ]

    def _shared_callbacks(self) -> tuple[ReplicaCheck, Checkpoints, StepSync, LogMetrics]:
        """Make the callbacks that other callbacks use."""
        config, heartbeat = self.config, self.heartbeat
        memory = HostMemory(config.max_host_memory_gb)
        replicas = ReplicaCheck(
            self.module.net,
            self.masters,
            self.ema,
            reference=config.reference,
            intervals=self.intervals,
        )
        checkpoints = Checkpoints(
            self._writer(), self.intervals, heartbeat=heartbeat, replica_check=replicas,
            collect_state=self.checkpoint_state,
        )  # fmt: skip
        sync = StepSync(
            config, self.data.train_data.accumulation, signals=self.signals, memory=memory,
            files=ControlFiles(config.run_dir, config.fenced), heartbeat=heartbeat,
            checkpoints=checkpoints, clipped=self._clipped_norm(),
        )  # fmt: skip
        return replicas, checkpoints, sync, LogMetrics(config, self.intervals, memory, heartbeat)

    def _writer(self) -> CheckpointWriter:
        writer = CheckpointWriter(
            self.config.run_dir / "checkpoints",
            self.masters,
            self.ema,
            keep=self.state.schedule.keeps,
            snapshot=self.intervals.keeps_snapshot,
            check=self.config.check_ours,
        )
        if not self.state.resumed:  # a resumed run already had enough disk space
            writer.check_start()
        return writer

    def _clipped_norm(self) -> engine_report.ClippedNorm:
        replicated = 1 if self.config.machine.sharded else distributed.world()
        return engine_report.ClippedNorm(self.masters.optimizer, replicated=replicated)

    # -- start --------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that all ranks have the same settings, and find the checkpoint to resume from."""
        self._state = open_run(self.config, self.data, self.module)
        begins = self.state.step < self.state.schedule.steps
        if self.config.on_begin and distributed.rank() == 0 and begins:
            self.config.on_begin(self.state.step)
        self.heartbeat.enter("init", self.state.step)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Repeat validation and export check of a finished run that was not verified."""
        state = self.state
        if state.resumed and awaits_export_check(state.resumed, self.config):
            self._prepare(trainer)
            # The attempt that made the last steps has already ended the user's callbacks.
            custom = self.config.callbacks
            self.callbacks = [callback for callback in self.callbacks if callback not in custom]
            state.ends = True
            next(c for c in self.callbacks if isinstance(c, Validation)).run(state)
            self._end()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the weights, and start all callbacks."""
        self._prepare(trainer)
        for callback in self.callbacks:
            callback.on_start(self.state)

    def _prepare(self, trainer: pl.Trainer) -> None:
        """Restore weights, moments and averages, check the engine, and build the callbacks."""
        resumed = self.state.resumed
        self._masters = masters_of(self.module.net, trainer.optimizers[0])
        if resumed:
            checkpoints.restore(resumed, self.masters, self.ema)
        else:
            self.masters.prepare()
            self.ema.start(self.masters)
        self._check_engine(trainer)
        self.callbacks = self.ordered_callbacks(trainer)
        if resumed:
            self._load_states(resumed.state)

    def _check_engine(self, trainer: pl.Trainer) -> None:
        """Print the plan of the engine; raise EcholabError if it differs from the settings."""
        config, net = self.config, self.module.net
        plan = engine_report.plan_of(trainer, net, self.masters, self.ema.flats[EMA])
        blocks = len(engine_report.blocks_of(net))
        requested = engine_report.expected_plan(
            config.machine, self.data.train_data.accumulation, config.optim.max_grad_norm, blocks
        )
        engine_report.check(plan, requested)
        engine_report.check_hooks(self.module, config.machine)
        if config.print_lines and distributed.rank() == 0:
            config.print_lines(plan.lines())

    # -- steps --------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Call the callbacks before the first micro-batch of a step."""
        if batch_idx % self.data.train_data.accumulation:
            return
        for callback in self.callbacks:
            callback.before_step(self.state)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Call the callbacks after the last micro-batch of a step."""
        if (batch_idx + 1) % self.data.train_data.accumulation:
            return
        state = self.state
        state.step += 1
        state.kind, state.metrics = batch.kind, {}
        self.heartbeat.enter("vote", state.step)
        for callback in self.callbacks:
            callback.after_step(state)
            if state.rollback:
                self._roll_back()
                return
        if state.ends:
            self._end()
        if self.config.on_step and distributed.rank() == 0:
            self.config.on_step(state.step, state.schedule.steps)
        trainer.should_stop = state.reason != ""

    def _roll_back(self) -> None:
        """Restore the checkpoint `state.rollback` and continue from there.

        This ends the current loader, so that Lightning requests a new one.
        """
        state, checkpoint = self.state, self.state.rollback
        assert checkpoint
        go_to(state, self.data, checkpoint)
        checkpoints.restore(checkpoint, self.masters, self.ema)
        self._load_states(checkpoint.state)
        for callback in self.callbacks:
            callback.on_rollback(state)
        state.rollback = None

    # -- end ----------------------------------------------------------------------------------

    def _end(self) -> None:
        """Finish all callbacks and set the reason why the run ends."""
        state = self.state
        self.config.check_ours()  # another process may have taken over during a long validation
        for callback in reversed(self.callbacks):
            callback.on_end(state)
        complete = state.step == state.schedule.steps and not state.unsaved
        done = complete and not state.unverified
        state.reason = "done" if done else state.vote.reason or "until"
        state.signal = state.vote.signal if state.reason == "signal" else 0

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Report the error before Lightning's cleanup, which may hang or hide KeyboardInterrupt."""
        if self.config.on_failure:
            self.config.on_failure(exception)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enter section `teardown` of the heartbeat."""
        self.heartbeat.enter("teardown")

    # -- state in a checkpoint ------------------------------------------------------------------

    def checkpoint_state(self) -> dict[str, Any]:
        """Return all state that the rest of the run depends on, except tensors, as JSON."""
        state = self.state
        supervised = state.schedule.supervised_steps(state.step)
        saved = {c.state_key: c.state_dict() for c in self.callbacks if c.state_key}
        custom = {_class_path(c): c.state_dict() for c in self.config.callbacks}
        return {
            "step": state.step,
            "optimizer_updates": self.masters.updates,
            "schedule": state.schedule.state_dict(),
            "curriculum": self.data.curriculum.state_dict(supervised),
            **saved,
            **({CUSTOM: custom} if any(custom.values()) else {}),
            "origin": {"world": distributed.world(), "masters": type(self.masters).__name__},
            **state.identity,
        }

    def _load_states(self, saved: Mapping[str, Any]) -> None:
        for callback in self.callbacks:
            if callback.state_key:
                callback.load_state_dict(saved[callback.state_key])
        for callback in self.config.callbacks:
            if _class_path(callback) in saved.get(CUSTOM, {}):
                callback.load_state_dict(saved[CUSTOM][_class_path(callback)])


def _class_path(callback: Callback) -> str:
    kind = type(callback)
    return f"{kind.__module__}:{kind.__qualname__}"


class LearningRate(Callback):
    """Sets the scheduled learning rate before each step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def before_step(self, state: RunState) -> None:
        """Set the learning rate of this step in all parameter groups."""
        rate = state.schedule.lr(state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate


class EmaUpdate(Callback):
    """Updates the averages.  `checkpoint.restore` restores them and their number of updates."""

    state_key = "ema"

    def __init__(self, ema: Ema, masters: Masters) -> None:
        self.ema, self.masters = ema, masters

    def after_step(self, state: RunState) -> None:
        """Update all averages with the weights of this step; collective for running statistics."""
        self.masters.average_buffers()
        self.ema.update(self.masters)

    def state_dict(self) -> dict[str, Any]:
        """Return the decays and the number of updates."""
        return self.ema.state_dict()
