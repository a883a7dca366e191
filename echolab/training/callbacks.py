"""What happens around a step, in one place because the order matters.

Before: the learning rate, and the reference of a preference epoch that begins.
After:  average, vote, guard, save, log, validate; then the run goes on, goes back, or ends.
A save comes before all that may take long, hang or fail without it.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from echolab.data.ledger import LEDGER
from echolab.errors import EcholabError, FencedError
from echolab.heartbeat import Heartbeat
from echolab.training import distributed, lineage
from echolab.training.checkpoints import checkpoint as checkpoints
from echolab.training.checkpoints import resume
from echolab.training.checkpoints.checkpoint import Checkpoint
from echolab.training.checkpoints.retention import set_aside
from echolab.training.checkpoints.saving import Saving
from echolab.training.checkpoints.writer import CheckpointWriter
from echolab.training.config import Intervals, Training
from echolab.training.control_files import Requests, asked
from echolab.training.datamodule import ShardDataModule
from echolab.training.engine import engine_report as engine
from echolab.training.engine.ema import EMA, Ema
from echolab.training.engine.master_weights import Masters, masters_of
from echolab.training.evaluation import Evaluation
from echolab.training.guards import spike_policy
from echolab.training.guards.monitor import Guarding
from echolab.training.guards.spike_policy import Action, What
from echolab.training.guards.spikes import Spike
from echolab.training.ledger import StepLedger
from echolab.training.meter import Meter
from echolab.training.metrics_logger import Telling, tell_plan
from echolab.training.module import DiffusionModule
from echolab.training.reference_model import References
from echolab.training.signals import StopSignals
from echolab.training.step_sync import CutShort, Vote, count, of_step, wait


class Steps(pl.Callback):
    """Counts the optimizer steps of the run, over all attempts, and keeps its state."""

    def __init__(
        self, training: Training, data: ShardDataModule, signals: StopSignals, heartbeat: Heartbeat
    ) -> None:
        self.training, self.data, self.signals, self.heartbeat = training, data, signals, heartbeat
        self.schedule, self.every = training.schedule, training.every or Intervals()
        self.folder = training.folder / "checkpoints"
        self.identity = training.identity(data.feed)  # what a checkpoint must agree on
        optim = training.optim
        self.ema = Ema(optim.ema_decay, optim.ema_more, optim.ema_widths)
        self.references = References(
            training.objectives, training.reference, training.reference_checkpoint
        )
        self.requests = Requests(training.folder, training.fenced)
        self.step = 0  # optimizer steps done
        self.made = 0  # by this attempt, those included that were gone back over
        self.skipped = 0  # of these, by DeepSpeed, before training went back
        self.reason = ""  # why the run ended early; empty while it goes on
        self.signal = 0  # its number, where a signal is the reason
        self.unsaved = False  # ended with steps that no checkpoint has
        self.unlogged: Exception | None = None  # what kept rank 0 from logging
        self.resumed: Checkpoint | None = None
        self.ledger: StepLedger | None = None
        self.newest: Path | None = None  # checkpoint, at the end

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """All ranks make sure that they do the same, and go on from the same checkpoint."""
        told = distributed.gather_text(json.dumps(dict(self.training.origins)))[0]
        self.identity["origins"] = json.loads(told)
        resume.check_alike(self.training.agreed, self.identity, self.schedule.state_dict())
        self.guarding = Guarding(self.training)
        self.schedule = self.schedule.leaving_out(self.guarding.history.skips)
        self.data.place = self.schedule.place
        found = checkpoints.newest(self.folder)
        if found:
            resume.check_continues(found, self.identity, self.schedule)
            self._go_on_with_data(found)
            self._go_on_from(found)
        if self.training.on_begin and distributed.rank() == 0 and self.step < self.schedule.steps:
            self.training.on_begin(self.step)
        self.heartbeat.enter("init", self.step)

    def _go_on_with_data(self, found: Checkpoint) -> None:
        """Draw from the data that are given now; other data than before are an event."""
        self.data.feed = resume.going_on_with(found, self.training, self.data.feed, self.schedule)
        identity = self.training.identity(self.data.feed)
        self.identity = {**identity, "origins": found.state.get("origins", identity["origins"])}
        was, now = lineage.saved_data(found.state)[-1], identity["data"][0]
        changed = lineage.changed_data(was, now)
        if changed and found.step < self.schedule.steps:
            told = {key: {"was": was[key], "now": now[key]} for key in changed}
            self.guarding.history.add(found.step, "data", **told)

    def _go_on_from(self, found: Checkpoint) -> None:
        """Everything but the tensors."""
        self.resumed, self.step, self.newest = found, found.step, found.path
        self.schedule = self.schedule.continuing(found.state["schedule"], found.step)
        data = lineage.continued(found.state, self.identity["data"][-1], found.step)
        self.identity = {**self.identity, "data": data}
        self.data.go_to(found.step)
        self.data.curriculum.load_state_dict(found.state["curriculum"])
        self.references.load_state_dict(found.state["objectives"])
        self.guarding.detector.load_state_dict(found.state["spikes"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Repeat the checks at the end of a run that was killed in them; there is no step left."""
        if self.resumed and resume.awaits_check(self.resumed, self.training):
            self._prepare(trainer, pl_module)
            cut = self._validate() if self.every.validate else None
            self._end(cut or Vote())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Weights, moments and average; the checkpoint a first preference epoch refers to."""
        self._prepare(trainer, pl_module)
        replicated = 1 if self.training.machine.sharded else distributed.world()
        self.clipped = engine.ClippedNorm(self.masters.optimizer, replicated=replicated)
        self.guarding.start(self.module.net, self.heartbeat.seconds)
        if not self.resumed and self.schedule.needs_reference(0):
            self.saving.now()
        self._begin_ledger()
        self.telling = Telling(self.module, self.data, self.heartbeat, self.step)

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the weights, moments and averages; make what saves and evaluates them."""
        assert isinstance(pl_module, DiffusionModule)
        self.module = pl_module
        self.masters: Masters = masters_of(pl_module.net, trainer.optimizers[0])
        if self.resumed:
            checkpoints.restore(self.resumed, self.masters, self.ema)
        else:
            self.masters.prepare()
            self.ema.start(self.masters)
        average, accumulation = self.ema.flats[EMA], self.data.feed.accumulation
        tell_plan(self.training, trainer, pl_module, self.masters, average, accumulation)
        own = (self.folder, self.masters, self.ema)
        self.writer = CheckpointWriter(
            *own, keep=self.schedule.keeps, snapshot=self.every.keeps_snapshot,
            check=self.training.check_ours,
        )  # fmt: skip
        if not self.resumed:  # going on, it had its room before
            self.writer.check_start()
        check_frozen = partial(self.guarding.check_frozen, pl_module.net)
        self.saving = Saving(self.writer, self.heartbeat, self.state, check_frozen, self.newest)
        self.evaluation = Evaluation(self.training, self.data, pl_module, self.masters, self.ema)
        if self.training.held_out and self.every.validate:
            self.evaluation.prepare()

    def _begin_ledger(self) -> None:
        if self.training.ledger:
            folder, skipped = self.training.folder / LEDGER, self.schedule.skipped
            self.ledger = StepLedger(folder, self.data, self.step, skipped)
            self.module.on_draws = self.ledger.add

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
            if self.references.enter(boundary, fresh=position.within == 0, device=pl_module.device):
                self.guarding.reference_entered()

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
        self.heartbeat.enter("vote", self.step + 1)
        self.ema.update(self.masters)
        self.step, self.made = self.step + 1, self.made + 1
        loss, norm = self.module.take_loss() / self.data.feed.accumulation, self.module.take_norm()
        own = of_step(loss, norm, self.clipped.take()) | self.module.take_margin() | self._asked()
        vote = count(own | {"written": float(self.writer.written())})
        if vote.fenced:
            raise self.training.taken()
        if not self._sane(trainer, vote, loss, norm):
            return
        self.references.observe(batch.kind, vote.margin, vote.margin_share)
        if self.ledger:
            self.ledger.commit(batch.step, batch.kind)
        if vote.unlogged:
            self.saving.now()
            self._raise_unlogged()
        self._after(vote)
        if self.training.on_step and distributed.rank() == 0:
            self.training.on_step(self.step, self.schedule.steps)
        trainer.should_stop = self.reason != ""

    def _asked(self) -> dict[str, float]:
        ends, needed = self.training.job_ends, self.saving.needed
        own = asked(self.signals, self.requests, job_ends=ends, needed=needed)
        own["unlogged"] = float(self.unlogged is not None)
        return own | {"memory": float(self.guarding.memory.over())}

    def _poll(self) -> None:
        """Raise CutShort on every rank if one is asked to end the run; called between batches.

        Memory can wait for the next step: ended for it, a last check would never come to its end.
        """
        vote = count(self._asked() | {"memory": 0.0})
        if vote.fenced or vote.reason:
            raise CutShort(vote)
        self.heartbeat.enter("eval")

    def _sane(self, trainer: pl.Trainer, vote: Vote, loss: Tensor, norm: Tensor) -> bool:
        """Guard the step; False where training went back.  Raises on every rank or on none."""
        own = (float(loss), float(norm))
        try:
            action, spike = self.guarding.judge(vote, own, self.step - 1, self.schedule)
        except EcholabError:
            self.saving.publish()  # what was begun while all was well is not lost
            raise
        if action.what is What.GO_BACK and self._go_back(action, spike):
            self.skipped = engine.skipped(trainer)
            return False
        self.guarding.record(action, spike)
        accumulation = self.data.feed.accumulation
        engine.check_counts(
            trainer, steps=self.made, accumulation=accumulation, skipped=self.skipped
        )
        return True

    def _go_back(self, action: Action, spike: Spike | None) -> bool:
        """To an earlier checkpoint, to do its steps again or others instead; False: there is none.

        Lightning asks for another loader, since the present one ends.
        """
        assert spike is not None
        self.saving.publish()
        self.writer.close()  # or the one to go back to might still be removed
        found = checkpoints.newest(self.folder, action.to_step)
        found = found or checkpoints.oldest(self.folder, spike.step)  # none is old enough
        if found is None:
            self.guarding.note(spike, spike_policy.without_checkpoint(spike).event)
            return False
        if distributed.rank() == 0:
            set_aside(self.folder, found.step)
        skip = action.skip and spike_policy.clipped(action.skip, self.schedule, found.step)
        self.guarding.note(spike, action.event, found.step, skip)
        if skip:
            self.schedule = self.schedule.skipping(skip, found.step)
            self.data.place = self.schedule.place
        self._go_on_from(found)
        checkpoints.restore(found, self.masters, self.ema)
        self.saving.saved = found.path
        self.module.meter = Meter()
        self._begin_ledger()
        self.telling = Telling(self.module, self.data, self.heartbeat, self.step)
        return True

    def _after(self, vote: Vote) -> None:
        last = self.step in (self.schedule.steps, self.training.until)
        ends = bool(vote.reason) or last
        logs = self._due(self.every.log) or ends
        values = self.telling.values(self.step, self.schedule) if logs else {}
        if self._due(self.every.replicas):
            held = (self.module.net, self.masters, self.ema)
            self.guarding.check_replicas(*held, self.step, self.schedule.state_dict())
        self._save_if_due(vote, ends)
        if logs:
            self._tell(values | self.guarding.look(self.step, self.heartbeat.seconds))
        validates = self._due(self.every.validate) or (last and self.every.validate)
        if validates and not vote.reason and (cut := self._validate()):
            vote = cut
            self._save_if_due(vote, ends=True)
        if vote.pause and not ends:
            self.heartbeat.enter("pause")
            vote = wait(self._asked)
            if vote.fenced:
                raise self.training.taken()
        if vote.save:
            self.requests.clear("SAVE")
        if vote.reason or last:  # also in a pause
            self._end(vote)

    def _validate(self) -> Vote | None:
        """Log the held-out errors; return the vote that cut this short, if one did."""
        if not self.training.held_out:
            return None
        self.saving.publish()  # this may take long, and leave no time for it later
        self.heartbeat.enter("eval")
        try:
            self._tell(self.evaluation.held_out(self._poll))
        except CutShort as cut:
            self._say_cut("validation", cut.vote, "its errors are not recorded for this step")
            return cut.vote
        return None

    def _say_cut(self, what: str, vote: Vote, result: str) -> None:
        if vote.fenced:
            raise self.training.taken()
        if distributed.rank() == 0:
            print(
                f"echolab: {self.training.folder}: {what} at step {self.step} was cut short "
                f"({vote.reason}); {result}",
                file=sys.stderr,
                flush=True,
            )

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _save_if_due(self, vote: Vote, ends: bool) -> None:
        """Behind the training where it goes on; at once where it ends, or where it needs it."""
        if self.writer.pending and vote.written == distributed.world():
            self.saving.publish()
        pruned = vote.prune and not self.schedule.keeps(self.step)
        if self.saving.has_saved(self.step):
            pass
        elif vote.late or pruned:
            self.unsaved = True
            self.saving.publish()  # what is being written may still come to its end
        elif ends or vote.pause or self.schedule.needs_reference(self.step):
            self.saving.now()
        elif self._due(self.every.save) or self.schedule.keeps(self.step) or vote.save:
            self.saving.begin()
        self.heartbeat.enter("vote")

    def _end(self, vote: Vote) -> None:
        """Say why; a run is done once its export has been seen to be what was trained."""
        self.training.check_ours()  # a validation before may have taken long
        done = self.step == self.schedule.steps and not self.unsaved
        if done and self.training.parity and self.saving.saved:
            self.heartbeat.enter("eval")
            try:
                self._tell(self.evaluation.parity(self.saving.saved, self._poll))
            except CutShort as cut:
                self._say_cut("the check of the export", cut.vote, "the next start repeats it")
                vote, done = cut.vote, False
        if self.unlogged:
            self._raise_unlogged()
        self.writer.close()
        if self.ledger:
            self.ledger.close()
        self.newest = self.saving.saved
        self.reason = "done" if done else vote.reason or "until"
        self.signal = vote.signal if self.reason == "signal" else 0
        self.requests.clear("STOP", "PRUNE")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Before Lightning tidies up, which may hang, and makes SystemExit of KeyboardInterrupt."""
        if self.training.on_failure:
            self.training.on_failure(exception)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell the supervisor."""
        self.heartbeat.enter("teardown")

    def _tell(self, values: dict[str, float]) -> None:
        """Log on rank 0.  What goes wrong there is raised once all ranks have saved."""
        if self.training.log and distributed.rank() == 0:
            try:
                self.training.log(self.step, values)
            except (FencedError, KeyboardInterrupt):
                raise
            except Exception as error:
                self.unlogged = error

    def _raise_unlogged(self) -> None:
        """Raise on rank 0; the supervisor ends the others, which know nothing of it."""
        if self.unlogged:
            raise self.unlogged

    def state(self) -> dict[str, Any]:
        """All that the future depends on beside the tensors, as JSON."""
        supervised = self.schedule.supervised_steps(self.step)
        return {
            "step": self.step,
            "optimizer_updates": self.masters.updates,
            "ema": self.ema.state_dict(),
            "schedule": self.schedule.state_dict(),
            "curriculum": self.data.curriculum.state_dict(supervised),
            "objectives": self.references.state_dict(),
            "spikes": self.guarding.detector.state_dict(),
            "origin": {"world": distributed.world(), "masters": type(self.masters).__name__},
            **self.identity,
        }
