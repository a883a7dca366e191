"""Check each step for a loss spike before it is saved or logged, and apply the spike policy.

*record* writes an event.  *recompute* returns to the newest checkpoint before the spike and repeats
the steps: a hardware fault does not recur (arXiv:2604.00726), a spike that recurs is caused by the
data or the model.  *rollback* returns to an earlier checkpoint and skips the batches around the
spike, as PaLM did (arXiv:2204.02311, 5.1: about 100 steps back, 200 to 500 batches skipped).
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
from echolab.training.callbacks.replicas import REMEDY, describe_outliers, outlier_rank
from echolab.training.checkpoints import checkpoint as checkpoints
from echolab.training.checkpoints.checkpoint import Checkpoint
from echolab.training.checkpoints.retention import set_aside
from echolab.training.config import TrainConfig
from echolab.training.datamodule import ShardDataModule
from echolab.training.engine import engine_report
from echolab.training.guards.events import Event
from echolab.training.guards.spikes import Spike, SpikeConfig, SpikeDetector
from echolab.training.schedule import Schedule, Skip, group_of

SOURCE = "guard"  # marks events of this callback, as opposed to `echolab rollback`


def remedy(spike: Spike) -> str:
    """Return the remedy to print for a value that is not finite.

    Earlier steps, and so the newest checkpoint, may already have damaged weights.
    """
    return (
        "lower the learning rate, from an earlier checkpoint by `echolab rollback RUN to=STEP` if "
        "the newest is damaged by it; "
        f"`echolab replay RUN step={spike.step + 1}` names the clips"
    )


class ActionKind(Enum):
    """The kind of an action."""

    NONE = "none"
    RECORD = "record"
    GO_BACK = "go back"


class Action(NamedTuple):
    """The decision about a step."""

    kind: ActionKind
    event: str = ""  # the kind of event to write: spike, reproducible, recompute, rollback
    to_step: int = 0  # GO_BACK: return to the newest checkpoint up to this step
    skip: Skip | None = None  # GO_BACK: batches to skip


NOTHING = Action(ActionKind.NONE)


def decide(
    spike: Spike | None, guards: SpikeConfig, history: Sequence[Event], schedule: Schedule
) -> Action:
    """Decide what to do about a step; a pure function, so that all ranks decide the same.

    `history` contains the events of the run so far, including those before rollbacks.  Raise
    DivergedError for a value that is not finite if the policy does not roll back, or if rolling
    back did not help.
    """
    if spike is None:
        return NOTHING
    if guards.policy == "rollback":
        return _decide_rollback(spike, guards, history, schedule)
    if guards.policy == "recompute":
        # A spike at a step that was already recomputed is reproducible.
        recurs = any(e.kind == "recompute" and e.step == spike.step for e in history)
        if not recurs and _rollback_count(history) < guards.max_rollbacks:
            return Action(ActionKind.GO_BACK, "recompute", to_step=spike.step)
        if not spike.finite:
            why = (
                "twice from the same state" if recurs else f"after {guards.max_rollbacks} rollbacks"
            )
            raise DivergedError(
                f"{spike.reason}, {why} (loss_spike.max_rollbacks); {remedy(spike)}"
            )
        return Action(ActionKind.RECORD, "reproducible" if recurs else "spike")
    if not spike.finite:
        raise DivergedError(
            f"{spike.reason}; {remedy(spike)}; loss_spike.policy=recompute or rollback goes "
            "back by "
            "itself"
        )
    return Action(ActionKind.RECORD, "spike")


def _rollback_count(history: Sequence[Event]) -> int:
    """Count the rollbacks and recomputations that this callback made in the run."""
    return sum(
        e.kind in ("recompute", "rollback") and e.details.get("by") == SOURCE for e in history
    )


def _decide_rollback(
    spike: Spike, guards: SpikeConfig, history: Sequence[Event], schedule: Schedule
) -> Action:
    # The limit on rollbacks applies to the run, not to one attempt.
    done = _rollback_count(history)
    if done >= guards.max_rollbacks:
        raise DivergedError(
            f"{spike.reason}, and the run was rolled back {done} times already "
            f"(loss_spike.max_rollbacks={guards.max_rollbacks}); {remedy(spike)}"
        )
    skip = None
    if guards.skip_batches:
        # Skip half of the batches before the spike: an earlier batch may have caused it.
        batch = schedule.place(spike.step).batch
        first = max(0, batch - guards.skip_batches // 2)
        skip = Skip(group_of(spike.kind), first, guards.skip_batches)
    to = max(0, spike.step - guards.rollback_steps)
    return Action(ActionKind.GO_BACK, "rollback", to_step=to, skip=skip)


def without_checkpoint(spike: Spike) -> Action:
    """Return the action if no checkpoint before the spike exists.

    Raise DivergedError for a value that is not finite.
    """
    if not spike.finite:
        raise DivergedError(
            f"{spike.reason}, and there is no checkpoint before it to go back to; lower the "
            "learning rate, or save more often (save_every)"
        )
    return Action(ActionKind.RECORD, "spike")


def clipped(skip: Skip, schedule: Schedule, step: int) -> Skip:
    """Move the skipped range, at equal length, past the batches trained on before `step`."""
    return skip._replace(first=max(skip.first, schedule.begun(skip.kind, step)))


def event_details(spike: Spike, to: int | None = None, skip: Skip | None = None) -> dict[str, Any]:
    """Return the details of an action's event, without step and kind."""
    return {**spike.details(), "by": SOURCE, "to": to, "skip": list(skip) if skip else None}


NORM_TOLERANCE = 1e-5  # relative difference allowed between the ranks' norms of one gradient


class LossSpikes(Callback):
    """Compares loss and gradient norm with the last steps and acts on spikes (`decide`).

    All ranks get the same values, so they decide the same.
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
        # Step counts, to detect steps that DeepSpeed skipped.
        self._steps = 0  # steps of this attempt, including undone steps
        self._skipped = 0  # steps that DeepSpeed skipped and a rollback undid

    def after_step(self, state: RunState) -> None:
        """Check the step; set `state.rollback` if it must be undone.

        Raise DivergedError if the policy cannot recover the run, EcholabError if the gradient was
        not clipped or the engine skipped the step, ReplicaError if the norms of the ranks differ.
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
        # If Lightning or DeepSpeed count fewer steps than this loop, they skipped a step.
        engine_report.check_counts(
            self.trainer,
            steps=self._steps,
            accumulation=self.data.train_data.accumulation,
            skipped=self._skipped,
        )

    def on_rollback(self, state: RunState) -> None:
        """Accept the steps that DeepSpeed skipped so far, since they are undone."""
        self._skipped = engine_report.skipped(self.trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the last losses and gradient norms, by kind of epoch."""
        return self.detector.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the last losses and gradient norms from a checkpoint."""
        self.detector.load_state_dict(saved)

    def _judge(self, state: RunState) -> tuple[Action, Spike | None]:
        vote, step = state.vote, state.step - 1  # step index from 0, as in the ledger
        self._check_norms(vote, state.gradient_norm, step)
        loss = vote.loss / distributed.world() if not vote.not_finite else math.nan
        number, _, epoch, _ = state.schedule.locate(step)
        norm = vote.norm / distributed.world()
        spike = self.detector.observe(epoch.kind, loss, norm, step=step, epoch=number)
        finite = math.isfinite(state.loss) and math.isfinite(state.gradient_norm)
        rank = _first_nonfinite_rank(finite) if vote.not_finite else None
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
                f"{describe_outliers(norms)} ({', '.join(dict.fromkeys(norms))}); {REMEDY}",
                rank=outlier_rank(norms),
            )

    def _prepare_rollback(self, state: RunState, action: Action, spike: Spike) -> Checkpoint | None:
        """Return the checkpoint to resume from, after recording the event and skipping batches.

        Return None if there is no checkpoint before the spike; collective.
        """
        folder = self.checkpoints.folder
        # Wait for pending removals, which could remove the checkpoint to resume from.
        self.checkpoints.publish(state)
        self.checkpoints.writer.close()
        checkpoint = checkpoints.newest(folder, action.to_step)
        # If none is old enough, use the oldest checkpoint.
        checkpoint = checkpoint or checkpoints.oldest(folder, spike.step)
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


def _first_nonfinite_rank(finite: bool) -> int | None:
    faults = distributed.gather_text("" if finite else "not")
    return next((rank for rank, fault in enumerate(faults) if fault), None)
