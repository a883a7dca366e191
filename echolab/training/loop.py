"""The training loop: Lightning runs forward and backward, an ordered list of callbacks the rest."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from torch.optim import Optimizer

from echolab.heartbeat import Heartbeat
from echolab.training import distributed
from echolab.training.callbacks.callback import Callback, RunState
from echolab.training.callbacks.checkpoints import Checkpoints
from echolab.training.callbacks.export_check import ExportCheck
from echolab.training.callbacks.loss_spikes import LossSpikes
from echolab.training.callbacks.metrics import LogMetrics, MeasureMetrics
from echolab.training.callbacks.reference_model import ReferenceModel
from echolab.training.callbacks.replicas import ReplicaCheck
from echolab.training.callbacks.sample_ledger import SampleLedger
from echolab.training.callbacks.step_sync import ControlFiles, Pause, StepSync
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

CUSTOM = "callbacks"  # key of the checkpoint's state: states of the user's callbacks, by class


class TrainLoop(pl.Callback):
    """Calls each callback around each optimizer step; Lightning's hooks come per micro-batch."""

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
        # These exist once the ranks are connected, and once the optimizer is on its device.
        self._state: RunState | None = None
        self._masters: Masters | None = None
        self.callbacks: list[Callback] = []

    @property
    def state(self) -> RunState:
        """The state of this attempt, from `setup` on."""
        assert self._state
        return self._state

    @property
    def masters(self) -> Masters:
        """The fp32 weights and their optimizer, once the first step is near."""
        assert self._masters
        return self._masters

    # -- the order ----------------------------------------------------------------------------

    def ordered_callbacks(self, trainer: pl.Trainer) -> list[Callback]:
        """Return the callbacks, in the order in which they act on a step; collective."""
        config, intervals, data = self.config, self.intervals, self.data
        replicas, checkpoints, sync, log = self._shared_callbacks()
        evaluated: dict[str, Any] = {
            "masters": self.masters, "ema": self.ema, "sync": sync, "log": log
        }  # fmt: skip
        return [
            # Before the step: its learning rate.  The reference is below.
            LearningRate(trainer.optimizers[0]),
            # The average follows each step at once: what is saved or validated includes it.
            EmaUpdate(self.ema, self.masters),
            # The vote: everything below decides by its sums, so that all ranks decide the same.
            sync,
            # A bad step is undone before anything below keeps it.  Nothing below runs then.
            LossSpikes(config, trainer, data, checkpoints),
            # The objective's running margin, and the ledger, count accepted steps only.
            ReferenceModel(config, self.masters, self.ema, checkpoints, replicas),
            *([SampleLedger(config.run_dir, data)] if config.log_samples else []),
            # Measured here, so that the time of checks and saves belongs to the next interval.
            MeasureMetrics(intervals, data, self.heartbeat, config.callbacks),
            # Weights that differ between ranks must not be saved.
            replicas,
            # The save comes before all that can take long, hang or fail.
            checkpoints,
            # A tracker that hangs or fails costs no checkpoint.
            log,
            # Takes long; a request to end interrupts it.
            Validation(config, intervals, data, checkpoints=checkpoints, **evaluated),
            # The user's own: the step is safe, and what they raise or wait for cannot lose it.
            *config.callbacks,
            # Waits until a user removes the file, so nothing may be left to do.
            Pause(sync),
            # Acts only in `on_end`, which runs in reverse order: first, while everything is open.
            ExportCheck(config, **evaluated),
        ]

    def _shared_callbacks(self) -> tuple[ReplicaCheck, Checkpoints, StepSync, LogMetrics]:
        """Make the callbacks that others call."""
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
        if not self.state.resumed:  # a resumed run had disk space before
            writer.check_start()
        return writer

    def _clipped_norm(self) -> engine_report.ClippedNorm:
        replicated = 1 if self.config.machine.sharded else distributed.world()
        return engine_report.ClippedNorm(self.masters.optimizer, replicated=replicated)

    # -- start --------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make all ranks agree on the settings and on the checkpoint to continue from."""
        self._state = open_run(self.config, self.data, self.module)
        begins = self.state.step < self.state.schedule.steps
        if self.config.on_begin and distributed.rank() == 0 and begins:
            self.config.on_begin(self.state.step)
        self.heartbeat.enter("init", self.state.step)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Repeat the checks at the end of a run that was killed in them; no step is left."""
        state = self.state
        if state.resumed and awaits_export_check(state.resumed, self.config):
            self._prepare(trainer)
            # The user's own callbacks were started and ended by the attempt that made the steps.
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
        """Print what the engine does; raise EcholabError if it is not what the settings say."""
        config, net = self.config, self.module.net
        plan = engine_report.plan_of(trainer, net, self.masters, self.ema.flats[EMA])
        blocks = len(net.blocks)  # type: ignore[arg-type]
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
        """Continue from the checkpoint `state.rollback`.

        The present loader ends, so that Lightning requests another.
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
        """Finish all callbacks, and say why the run ends: done only if its export is verified."""
        state = self.state
        self.config.check_ours()  # a validation before can have taken long
        for callback in reversed(self.callbacks):
            callback.on_end(state)
        complete = state.step == state.schedule.steps and not state.unsaved
        done = complete and not state.unverified
        state.reason = "done" if done else state.vote.reason or "until"
        state.signal = state.vote.signal if state.reason == "signal" else 0

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Report it before Lightning cleans up, which can hang, and hides a KeyboardInterrupt."""
        if self.config.on_failure:
            self.config.on_failure(exception)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mark the section for the supervisor."""
        self.heartbeat.enter("teardown")

    # -- what a checkpoint keeps ----------------------------------------------------------------

    def checkpoint_state(self) -> dict[str, Any]:
        """Return all that the future depends on except the tensors, as JSON."""
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
    """Sets the schedule's rate before each step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def before_step(self, state: RunState) -> None:
        """Set the rate of this step in all parameter groups."""
        rate = state.schedule.lr(state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate


class EmaUpdate(Callback):
    """Updates the averages.  `checkpoint.restore` reads them and their count of updates again."""

    state_key = "ema"

    def __init__(self, ema: Ema, masters: Masters) -> None:
        self.ema, self.masters = ema, masters

    def after_step(self, state: RunState) -> None:
        """Update all averages by the weights of this step."""
        self.ema.update(self.masters)

    def state_dict(self) -> dict[str, Any]:
        """Return the decays and the number of updates."""
        return self.ema.state_dict()
