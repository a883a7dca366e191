"""Each step is judged before anything keeps it: accepted, recorded, undone, or the run ends."""

import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl

from echolab.errors import DivergedError, EcholabError, ReplicaError
from echolab.training import distributed
from echolab.training.callbacks.callback import Callback
from echolab.training.callbacks.checkpoints import Checkpoints
from echolab.training.checkpoints import checkpoint as checkpoints
from echolab.training.checkpoints.checkpoint import Checkpoint
from echolab.training.checkpoints.retention import set_aside
from echolab.training.config import TrainConfig
from echolab.training.datamodule import ShardDataModule
from echolab.training.engine import engine_report
from echolab.training.guards import spike_policy
from echolab.training.guards.replica_check import REMEDY, odd, odd_rank
from echolab.training.guards.spike_policy import Action, What
from echolab.training.guards.spikes import Spike, SpikeDetector
from echolab.training.run_state import RunState, Vote
from echolab.training.schedule import Skip

NORM_TOLERANCE = 1e-5  # share by which the ranks' norms of the same gradient may differ


class LossSpikes(Callback):
    """Judges loss and gradient by those of the last steps, as `guards/spike_policy` says.

    Every rank is given the same numbers, so every rank decides the same.
    """

    state_key = "spikes"

    def __init__(
        self,
        config: TrainConfig,
        trainer: pl.Trainer,
        data: ShardDataModule,
        checkpoints: Checkpoints,
    ) -> None:
        spike_config = config.loss_spike
        self.config, self.trainer, self.data, self.checkpoints = config, trainer, data, checkpoints
        self.detector = SpikeDetector(
            threshold=spike_config.threshold,
            window=spike_config.window,
            min_history=spike_config.min_history,
        )
        self._steps = 0  # of this attempt, those that were undone included
        self._skipped = 0  # of these, by DeepSpeed, before a rollback

    def after_step(self, state: RunState) -> None:
        """Judge the step; set `state.rollback` if it is to be undone.

        Raise DivergedError if no policy can save the run, EcholabError if the gradient was not
        clipped or the engine skipped the step, ReplicaError if the norms of the ranks differ.
        """
        self._steps += 1
        try:
            action, spike = self._judge(state)
        except EcholabError:
            self.checkpoints.publish(state)  # it was begun while all was well
            raise
        if action.what is What.GO_BACK and spike:
            state.rollback = self._prepare_rollback(state, action, spike)
            if state.rollback:
                return
        if action.what is What.RECORD and spike:
            self._record(state, spike, action.event)
        # Lightning and DeepSpeed must count the steps as this loop does, or one was left out.
        engine_report.check_counts(
            self.trainer,
            steps=self._steps,
            accumulation=self.data.train_data.accumulation,
            skipped=self._skipped,
        )

    def on_rollback(self, state: RunState) -> None:
        """Accept the steps that DeepSpeed skipped, since they are undone."""
        self._skipped = engine_report.skipped(self.trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the last losses and norms, by kind of epoch."""
        return self.detector.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from the losses and norms of a checkpoint."""
        self.detector.load_state_dict(saved)

    def _judge(self, state: RunState) -> tuple[Action, Spike | None]:
        vote, step = state.vote, state.step - 1  # of the ledger, which counts from 0
        self._check_norms(vote, state.gradient_norm, step)
        loss = vote.loss / distributed.world() if not vote.not_finite else math.nan
        number, _, epoch, _ = state.schedule.locate(step)
        norm = vote.norm / distributed.world()
        spike = self.detector.observe(epoch.kind, loss, norm, step=step, epoch=number)
        finite = math.isfinite(state.loss) and math.isfinite(state.gradient_norm)
        rank = _first_not_finite(finite) if vote.not_finite else None
        try:
            events = state.events.events
            return spike_policy.decide(spike, self.config.loss_spike, events, state.schedule), spike
        except DivergedError as error:
            error.rank, error.step = rank, step
            raise

    def _check_norms(self, vote: Vote, norm: float, step: int) -> None:
        if vote.not_finite:
            return
        engine_report.check_clipped(vote.clipped, self.config.optim.max_grad_norm, step + 1)
        spread = distributed.world() * vote.norm_squared - vote.norm**2
        if spread > (NORM_TOLERANCE * vote.norm) ** 2:
            norms = distributed.gather_text(f"{norm:.9g}")
            raise ReplicaError(
                f"step {step + 1}: the norm of the gradient is not the same on all ranks: "
                f"{odd(norms)} ({', '.join(dict.fromkeys(norms))}); {REMEDY}",
                rank=odd_rank(norms),
            )

    def _prepare_rollback(self, state: RunState, action: Action, spike: Spike) -> Checkpoint | None:
        """Return the checkpoint to continue from, in order to repeat its steps or skip batches.

        Return None if there is none; collective.
        """
        folder = self.checkpoints.folder
        # Nothing may be removed any more, or the checkpoint to continue from might be.
        self.checkpoints.publish(state)
        self.checkpoints.writer.close()
        checkpoint = checkpoints.newest(folder, action.to_step)
        checkpoint = checkpoint or checkpoints.oldest(folder, spike.step)  # none is old enough
        if checkpoint is None:
            self._record(state, spike, spike_policy.without_checkpoint(spike).event)
            return None
        if distributed.rank() == 0:
            set_aside(folder, checkpoint.step)
        skip = action.skip and spike_policy.clipped(action.skip, state.schedule, checkpoint.step)
        self._record(state, spike, action.event, checkpoint.step, skip)
        if skip:
            state.schedule = state.schedule.skipping(skip, checkpoint.step)
            self.data.place = state.schedule.place
        return checkpoint

    def _record(
        self,
        state: RunState,
        spike: Spike,
        event: str,
        to: int | None = None,
        skip: Skip | None = None,
    ) -> None:
        state.events.add(spike.step, event, **spike_policy.event_details(spike, to, skip))


def _first_not_finite(finite: bool) -> int | None:
    faults = distributed.gather_text("" if finite else "not")
    return next((rank for rank, fault in enumerate(faults) if fault), None)
