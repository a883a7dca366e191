"""What to do about a spike: record it, recompute the steps, or roll back and skip batches.

*record* writes an event.  *recompute* goes back to the newest checkpoint before it and does the
same steps again: a hardware fault vanishes (arXiv:2604.00726), a spike that comes again is caused
by the data or the model.  *rollback* goes back further and skips the batches around it, as PaLM did
(arXiv:2204.02311, 5.1: about 100 steps back, 200 to 500 batches skipped).
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

from echolab.errors import DivergedError
from echolab.training.guards.events import Event
from echolab.training.guards.spikes import Spike, SpikeConfig
from echolab.training.schedule import Schedule, Skip, group_of

BY = "guard"  # who wrote the event: not the command


def remedy(spike: Spike) -> str:
    """Return what a user does about a value that is not finite.

    The weights may have been damaged by the steps before, and so may the newest checkpoint.
    """
    return (
        "lower the learning rate, from an earlier checkpoint by `echolab rollback RUN to=STEP` if "
        f"the newest is spoilt; `echolab replay RUN step={spike.step + 1}` names the clips"
    )


class What(Enum):
    """The kind of a decision."""

    NONE = "none"
    RECORD = "record"
    GO_BACK = "go back"


class Action(NamedTuple):
    """A decision."""

    what: What
    event: str = ""  # the kind of event to write: spike, reproducible, recompute, rollback
    to_step: int = 0  # GO_BACK: the newest checkpoint of at most so many steps done
    skip: Skip | None = None  # GO_BACK: batches to leave out, as many as were not trained on before


NOTHING = Action(What.NONE)


def decide(
    spike: Spike | None, guards: SpikeConfig, history: Sequence[Event], schedule: Schedule
) -> Action:
    """Decide what to do about a step; a function of its arguments, so that all ranks do the same.

    `history` is the events of the run so far; they survive a rollback.  Raise DivergedError if
    nothing sane is left to do: values that are not finite, and no policy that goes back, or one
    that went back in vain.
    """
    if spike is None:
        return NOTHING
    if guards.policy == "rollback":
        return _rollback(spike, guards, history, schedule)
    if guards.policy == "recompute":
        # The same step was recomputed before: then the spike is reproducible.
        again = any(e.kind == "recompute" and e.step == spike.step for e in history)
        if not again and _went_back(history) < guards.max_rollbacks:
            return Action(What.GO_BACK, "recompute", to_step=spike.step)
        if not spike.finite:
            why = (
                "twice from the same state" if again else f"after {guards.max_rollbacks} times back"
            )
            raise DivergedError(
                f"{spike.reason}, {why} (loss_spike.max_rollbacks); {remedy(spike)}"
            )
        return Action(What.RECORD, "reproducible" if again else "spike")
    if not spike.finite:
        raise DivergedError(
            f"{spike.reason}; {remedy(spike)}; loss_spike.policy=recompute or rollback goes "
            "back by "
            "itself"
        )
    return Action(What.RECORD, "spike")


def _went_back(history: Sequence[Event]) -> int:
    """Return how often the guards of this run went back, for any reason."""
    return sum(e.kind in ("recompute", "rollback") and e.details.get("by") == BY for e in history)


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
    return Action(What.GO_BACK, "rollback", to_step=to, skip=skip)


def without_checkpoint(spike: Spike) -> Action:
    """Decide if no checkpoint is there to go back to; raise DivergedError if not finite."""
    if not spike.finite:
        raise DivergedError(
            f"{spike.reason}, and there is no checkpoint before it to go back to; lower the "
            "learning rate, or save more often (save_every)"
        )
    return Action(What.RECORD, "spike")


def clipped(skip: Skip, schedule: Schedule, step: int) -> Skip:
    """Return as many batches, but none that were trained on before `step`."""
    return skip._replace(first=max(skip.first, schedule.begun(skip.kind, step)))


def event_details(spike: Spike, to: int | None = None, skip: Skip | None = None) -> dict[str, Any]:
    """Return the details of a decision's event, besides step and kind."""
    return {**spike.details(), "by": BY, "to": to, "skip": list(skip) if skip else None}
