"""Judge each step before anything keeps it: accepted, recorded, undone, or the run ends.

*record* writes an event.  *recompute* returns to the newest checkpoint before the spike and repeats
the steps: a hardware fault vanishes (arXiv:2604.00726), a spike that comes again is caused by the
data or the model.  *rollback* returns further and skips the batches around the spike, as PaLM did
(arXiv:2204.02311, 5.1: about 100 steps back, 200 to 500 batches skipped).
"""

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import pytorch_lightning as pl

from echolab.errors import DivergedError, EcholabError, ReplicaError
from echolab.training import distributed
from echolab.training.callbacks.callback import Callback, RunState, Vote
from echolab.training.callbacks.checkpoints import Checkpoints
from echolab.training.callbacks.replicas import REMEDY, odd, odd_rank
from echolab.training.checkpoints import checkpoint as checkpoints
from echolab.training.checkpoints.checkpoint import Checkpoint
from echolab.training.checkpoints.retention import set_aside
from echolab.training.config import TrainConfig
from echolab.training.datamodule import ShardDataModule
from echolab.training.engine import engine_report
from echolab.training.guards.events import Event
from echolab.training.guards.spikes import Spike, SpikeConfig, SpikeDetector
from echolab.training.schedule import Schedule, Skip, group_of

SOURCE = "guard"  # written by this callback, not by `echolab rollback`


def remedy(spike: Spike) -> str:
    """Return what a user does about a value that is not finite.

    The weights may have been damaged by the steps before, and so may the newest checkpoint.
    """
    return (
        "lower the learning rate, from an earlier checkpoint by `echolab rollback RUN to=STEP` if "
        "the newest is damaged by it; "
        f"`echolab replay RUN step={spike.step + 1}` names the clips"
    )


class ActionKind(Enum):
    """The kind of a decision."""

    NONE = "none"
    RECORD = "record"
    GO_BACK = "go back"


class Action(NamedTuple):
    """A decision."""

    kind: ActionKind
    event: str = ""  # the kind of event to write: spike, reproducible, recompute, rollback
    to_step: int = 0  # GO_BACK: the newest checkpoint of at most so many steps done
    skip: Skip | None = None  # GO_BACK: batches to skip, none of them trained on before


NOTHING = Action(ActionKind.NONE)


def decide(
    spike: Spike | None, guards: SpikeConfig, history: Sequence[Event], schedule: Schedule
) -> Action:
    """Decide what to do about a step; a function of its arguments, so that all ranks do the same.

    `history` is the events of the run so far; they survive a rollback.  Raise DivergedError if
    no policy can recover: values that are not finite, and no policy that goes back, or one that
    went back in vain.
    """
    if spike is None:
        return NOTHING
    if guards.policy == "rollback":
        return _rollback(spike, guards, history, schedule)
    if guards.policy == "recompute":
        # The same step was recomputed before: then the spike is reproducible.
        again = any(e.kind == "recompute" and e.step == spike.step for e in history)
        if not again and _went_back(history) < guards.max_rollbacks:
            return Action(ActionKind.GO_BACK, "recompute", to_step=spike.step)
        if not spike.finite:
            why = (
                "twice from the same state" if again else f"after {guards.max_rollbacks} rollbacks"
            )
            raise DivergedError(
                f"{spike.reason}, {why} (loss_spike.max_rollbacks); {remedy(spike)}"
            )
        return Action(ActionKind.RECORD, "reproducible" if again else "spike")
    if not spike.finite:
        raise DivergedError(
            f"{spike.reason}; {remedy(spike)}; loss_spike.policy=recompute or rollback goes "
            "back by "
            "itself"
        )
    return Action(ActionKind.RECORD, "spike")


def _went_back(history: Sequence[Event]) -> int:
    """Return how often the guards of this run went back, for any reason."""
    return sum(
        e.kind in ("recompute", "rollback") and e.details.get("by") == SOURCE for e in history
    )


def _rollback(
    spike: Spike, guards: SpikeConfig, history: Sequence[Event], schedule: Schedule
) -> Action:
    # The budget of rollbacks is for the run, not for the attempt.
    done = _went_back(history)
    if done >= guards.max_rollbacks:
        raise DivergedError(
            f"{spike.reason}, and the run was rolled back {done} times already "
            f"(loss_spike.max_rollbacks={guards.max_rollbacks}); {remedy(spike)}"
        )
    skip = None
    if guards.skip_batches:
        # Half of the skipped batches lie before the spike: its cause may be older than it.
        batch = schedule.place(spike.step).batch
        first = max(0, batch - guards.skip_batches // 2)
        skip = Skip(group_of(spike.kind), first, guards.skip_batches)
    to = max(0, spike.step - guards.rollback_steps)
    return Action(ActionKind.GO_BACK, "rollback", to_step=to, skip=skip)


def without_checkpoint(spike: Spike) -> Action:
    """Decide if no checkpoint is there to go back to; raise DivergedError if not finite."""
    if not spike.finite:
        raise DivergedError(
            f"{spike.reason}, and there is no checkpoint before it to go back to; lower the "
            "learning rate, or save more often (save_every)"
        )
    return Action(ActionKind.RECORD, "spike")


def clipped(skip: Skip, schedule: Schedule, step: int) -> Skip:
    """Return as many batches, but none that were trained on before `step`."""
    return skip._replace(first=max(skip.first, schedule.begun(skip.kind, step)))


def event_details(spike: Spike, to: int | None = None, skip: Skip | None = None) -> dict[str, Any]:
    """Return the details of a decision's event, besides step and kind."""
    return {**spike.details(), "by": SOURCE, "to": to, "skip": list(skip) if skip else None}


NORM_TOLERANCE = 1e-5  # share by which the ranks' norms of the same gradient may differ


class LossSpikes(Callback):
    """Judges loss and gradient by those of the last steps, as `decide` says.

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
        # Counts by which steps that DeepSpeed skipped are noticed.
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
            self.checkpoints.publish(state)  # the pending checkpoint precedes the bad step
            raise
        if action.kind is ActionKind.GO_BACK and spike:
            state.rollback = self._prepare_rollback(state, action, spike)
            if state.rollback:
                return
        if action.kind is ActionKind.RECORD and spike:
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
            return decide(spike, self.config.loss_spike, events, state.schedule), spike
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
            self._record(state, spike, without_checkpoint(spike).event)
            return None
        if distributed.rank() == 0:
            set_aside(folder, checkpoint.step)
        skip = action.skip and clipped(action.skip, state.schedule, checkpoint.step)
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
        state.events.add(spike.step, event, **event_details(spike, to, skip))


def _first_not_finite(finite: bool) -> int | None:
    faults = distributed.gather_text("" if finite else "not")
    return next((rank for rank, fault in enumerate(faults) if fault), None)
