"""What happens around a step, in one place because the order matters.

Before: the learning rate, and the reference of a preference epoch that begins.
After:  average, log, validate, save, and the vote whether to stop.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from echolab.diffusion.phases import Allocator
from echolab.errors import EcholabError
from echolab.training import checkpoint as checkpoints
from echolab.training import ranks
from echolab.training.checkpoint import Checkpoint
from echolab.training.datamodule import HeldOut, ShardDataModule
from echolab.training.ema import Ema
from echolab.training.ledger import StepLedger
from echolab.training.masters import Masters, masters_of
from echolab.training.meter import means
from echolab.training.module import DiffusionModule
from echolab.training.preference import References
from echolab.training.schedule import Schedule
from echolab.training.stopping import StopSignals
from echolab.types import Batch

Sink = Callable[[int, dict[str, float]], None]
KEEP = 2  # newest checkpoints beside those of epoch boundaries


class Intervals:
    """Every how many steps; 0 is never."""

    def __init__(self, log: int = 10, save: int = 500, validate: int = 0) -> None:
        self.log, self.save, self.validate = log, save, validate


class Steps(pl.Callback):
    """Counts the optimizer steps of the run, over all attempts, and keeps its state."""

    def __init__(
        self,
        *,
        folder: Path,
        schedule: Schedule,
        data: ShardDataModule,
        ema: Ema,
        every: Intervals,
        signals: StopSignals,
        references: References,
        identity: Mapping[str, Any],
        agreed: str = "",
        held_out: HeldOut | None = None,
        phases: Allocator | None = None,
        log: Sink | None = None,
        ledger: Path | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> None:
        self.folder, self.schedule, self.data, self.ema = folder, schedule, data, ema
        self.every, self.signals, self.references = every, signals, references
        self.agreed = agreed
        self.identity = dict(identity)  # what a checkpoint must agree on with the run
        self.held_out, self.phases, self.sink, self.on_step = held_out, phases, log, on_step
        self.step = 0  # optimizer steps done
        self.stopped_by = 0  # the signal that ended the run early
        self.saved: Path | None = None
        self.resumed: Checkpoint | None = None
        self.ledger_folder = ledger
        self.ledger: StepLedger | None = None
        self._held: list[Batch] | None = None
        self._since = (0, 0.0, 0.0)  # step, time and seconds waited for data at the last log

    # -- the beginning ------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Rank 0 decides from which checkpoint to go on; the others follow."""
        del stage
        told = json.dumps([self.agreed, self.identity, self.schedule.state_dict()])
        if not ranks.agree(told):
            raise EcholabError("the ranks were given different settings; start them all alike")
        wanted = -1
        if ranks.rank() == 0:
            found, rejected = checkpoints.latest_valid(self.folder)
            for line in rejected:
                print(f"echolab: passed over: {line}", file=sys.stderr)
            wanted = found.step if found else -1
            self.resumed = found
        wanted = ranks.from_first(wanted)
        if wanted < 0:
            return
        path = checkpoints.folder_of(self.folder, wanted)
        found = self.resumed or checkpoints.open_checkpoint(path)
        self._check(found)
        self.resumed, self.step, self.saved = found, wanted, path
        self.data.first_step = wanted
        self.data.curriculum.load_state_dict(found.state["curriculum"])
        self.references.load_state_dict(found.state["objectives"])

    def _check(self, found: Checkpoint) -> None:
        checkpoints.check_architecture(found, self.identity["architecture"])
        checkpoints.check_adapters(found, self.identity.get("adapters"))
        self.schedule.check_continues(found.state["schedule"], found.step)
        for key in ("clips", "seed", "batch_size", "order"):
            if (was := found.state.get(key)) != self.identity[key]:
                raise EcholabError(
                    f"{found.path}: {key} was {was}, now {self.identity[key]}; "
                    "give the old value, or a new run folder"
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Weights, moments and average; the checkpoint a first preference epoch refers to."""
        assert isinstance(pl_module, DiffusionModule)
        self.module = pl_module
        self.masters: Masters = masters_of(pl_module.net, trainer.optimizers[0])
        if self.resumed:
            checkpoints.restore(self.resumed, pl_module.net, self.masters, self.ema)
        else:
            self.masters.prepare()
            self.ema.start(self.masters)
            if self.schedule.needs_reference(0):
                self.save()
        if self.ledger_folder:
            self.ledger = StepLedger(self.ledger_folder, self.data, self.step)
            pl_module.on_draws = self.ledger.add
        self.signals.take_back()
        self._since = (self.step, time.monotonic(), self.data.waited)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before the first micro-batch of a step."""
        if batch_idx % self.data.feed.accumulation:
            return
        rate = self.schedule.lr(self.step)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = rate
        position = self.schedule.locate(self.step)
        if position.epoch.kind != "sft":
            start = self.step - position.within
            boundary = checkpoints.folder_of(self.folder, start)
            self.references.enter(boundary, fresh=position.within == 0, device=pl_module.device)

    # -- after each step ----------------------------------------------------------------------

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """After the last micro-batch of a step."""
        if (batch_idx + 1) % self.data.feed.accumulation:
            return
        self.ema.update(self.masters)
        self.step += 1
        if not self.module.clip_here:
            norm = trainer.strategy.deepspeed_engine.get_global_grad_norm()  # type: ignore[attr-defined]
            self.module.meter.add_value("gradient_norm", torch.as_tensor(norm))
        signal, broken = ranks.largest(
            [self.signals.received, int(not bool(torch.isfinite(outputs["loss"]).all()))]
        )
        if broken:
            raise EcholabError(
                f"step {self.step}: the loss is not finite; nothing was saved after step "
                f"{self.saved and self.saved.name}; lower the learning rate and run again"
            )
        if self.ledger:
            self.ledger.commit(batch.step, batch.kind)
        self._after(signal)
        if signal:
            self.stopped_by = signal
            trainer.should_stop = True

    def _after(self, signal: int) -> None:
        last = self.step == self.schedule.steps
        if self._due(self.every.log) or last or signal:
            self._log()
        if self.held_out and (self._due(self.every.validate) or (last and self.every.validate)):
            self._tell(self.validate())
        if self._due(self.every.save) or self.schedule.is_boundary(self.step) or signal:
            self.save()
        if self.on_step and ranks.rank() == 0:
            self.on_step(self.step, self.schedule.steps)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _tell(self, values: dict[str, float]) -> None:
        if self.sink and ranks.rank() == 0:
            self.sink(self.step, values)

    def _log(self) -> None:
        """Means since the last log, and the live state."""
        now = time.monotonic()
        done, seconds = self.step - self._since[0], now - self._since[1]
        values = self.module.meter.flush()
        values["train/lr"] = self.schedule.lr(self.step - 1)
        values["perf/steps_per_second"] = done / max(seconds, 1e-9)
        values |= means({"perf/data_wait_seconds": (self.data.waited - self._since[2], done)})
        supervised = self.schedule.supervised_steps(self.step)
        for task, probability in self.data.curriculum.probabilities(supervised).items():
            values[f"tasks/probability/{task}"] = probability
        values |= self.data.progress(self.step)
        self._since = (self.step, now, self.data.waited)
        self._tell(values)

    def validate(self) -> dict[str, float]:
        """Held-out errors of the averaged weights, by task and noise level; collective."""
        assert self.held_out and self.phases
        if self._held is None:
            self._held = [
                self.module.transfer_batch_to_device(batch, self.module.device, 0)
                for batch in self.data.held_out_batches(self.held_out)
            ]
        totals: dict[str, tuple[float, int]] = {}
        self.module.net.eval()
        with self.ema.applied(self.masters):
            for batch in self._held:
                found = self.module.held_out_errors(batch, self.phases, self.held_out.sigmas)
                for sigma, error in found.items():
                    for name in ("loss", f"error/{batch.tasks[0]}", f"error/sigma_{sigma:g}"):
                        total, count = totals.get(f"val/{name}", (0.0, 0))
                        totals[f"val/{name}"] = (total + float(error.sum()), count + len(error))
        self.module.net.train()
        return means(totals)

    # -- the state ----------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint, then remove those that are neither new nor of a boundary."""
        self.saved = checkpoints.save(self.folder, self.state(), self.masters, self.ema)
        if ranks.rank() == 0:
            steps = [step for step in checkpoints.saved_steps(self.folder) if step <= self.step]
            for step in steps[KEEP:]:
                boundary = self.schedule.is_boundary(step) or self.schedule.needs_reference(step)
                if not boundary:
                    checkpoints.discard(checkpoints.folder_of(self.folder, step))

    def state(self) -> dict[str, Any]:
        """All that the future depends on beside the tensors, as JSON."""
        return {
            "step": self.step,
            "optimizer_updates": self.masters.updates,
            "ema": {"decay": self.ema.decay, "updates": self.ema.updates},
            "schedule": self.schedule.state_dict(),
            "curriculum": self.data.curriculum.state_dict(
                self.schedule.supervised_steps(self.step)
            ),
            "objectives": self.references.state_dict(),
            "origin": {"world": ranks.world(), "masters": type(self.masters).__name__},
            **self.identity,
        }
