"""What to do about a spike: note it, do the steps again, or go back and skip batches.

*record* notes it.  *recompute* goes back to the newest checkpoint before it and does the same steps
again: a fault of the machine vanishes (arXiv:2604.00726), a spike that comes again is the data's
or the model's.  *rollback* goes back further and leaves out the batches around it, as PaLM did
(arXiv:2204.02311, 5.1: about 100 steps back, 200 to 500 batches left out).
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

from echolab.errors import DivergedError
from echolab.training.guards.events import Event
from echolab.training.guards.spikes import Guards, Spike
from echolab.training.schedule import Schedule, Skip, group_of

BY = "guard"  # who wrote the event: not the command


def remedy(spike: Spike) -> str:
    """Return what a user does about a value that is not finite.

    The weights may have been spoilt by the steps before, and so may the newest checkpoint.
    """
    return (
        "lower the learning rate, from an earlier checkpoint by `echolab rollback RUN to=STEP` if "
        f"the newest is spoilt; `echolab replay RUN step={spike.step + 1}` names the clips"
    )


class What(Enum):
    """What is done."""

    NONE = "none"
    RECORD = "record"
    GO_BACK = "go back"


class Action(NamedTuple):
    """The decision."""

    what: What
    event: str = ""  # the kind of event to write: spike, reproducible, recompute, rollback
    to_step: int = 0  # GO_BACK: the newest checkpoint of at most so many steps done
    skip: Skip | None = None  # GO_BACK: batches to leave out, as many as were not trained on before


NOTHING = Action(What.NONE)


def decide(
    spike: Spike | None, guards: Guards, history: Sequence[Event], schedule: Schedule
) -> Action:
    """What to do about a step; a function of its arguments, so that all ranks do the same.

    `history` is the events of the run so far; they outlive going back.  Raises DivergedError where
    nothing sane is left to do: values that are not finite, and no policy that goes back, or one
    that went back in vain.
    """
    if spike is None:
        return NOTHING
    if guards.policy == "rollback":
        return _rollback(spike, guards, history, schedule)
    if guards.policy == "recompute":
        again = any(e.kind == "recompute" and e.step == spike.step for e in history)
        if not again and _went_back(history) < guards.at_most:
            return Action(What.GO_BACK, "recompute", to_step=spike.step)
        if not spike.finite:
            why = "twice from the same state" if again else f"after {guards.at_most} times back"
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
    """How often the guards of this run did, for whatever reason."""
    return sum(e.kind in ("recompute", "rollback") and e.told.get("by") == BY for e in history)


def _rollback(spike: Spike, guards: Guards, history: Sequence[Event], schedule: Schedule) -> Action:
    done = _went_back(history)
    if done >= guards.at_most:
        raise DivergedError(
            f"{spike.reason}, and the run was rolled back {done} times already "
            f"(loss_spike.max_rollbacks={guards.at_most}); {remedy(spike)}"
        )
    skip = None
    if guards.skip_batches:
        batch = schedule.place(spike.step).batch
        first = max(0, batch - guards.skip_batches // 2)
        skip = Skip(group_of(spike.kind), first, guards.skip_batches)
    to = max(0, spike.step - guards.back)
    return Action(What.GO_BACK, "rollback", to_step=to, skip=skip)


def without_checkpoint(spike: Spike) -> Action:
    """The decision where there is nothing to go back to; DivergedError for what is not finite."""
    if not spike.finite:
        raise DivergedError(
            f"{spike.reason}, and there is no checkpoint before it to go back to; lower the "
            "learning rate, or save more often (save_every)"
        )
    return Action(What.RECORD, "spike")


def clipped(skip: Skip, schedule: Schedule, step: int) -> Skip:
    """The same batches less those that were trained on before `step`, as many all the same."""
    return skip._replace(first=max(skip.first, schedule.begun(skip.kind, step)))


def told(spike: Spike, to: int | None = None, skip: Skip | None = None) -> dict[str, Any]:
    """What the event of a decision says beside step and kind."""
    return {**spike.told(), "by": BY, "to": to, "skip": list(skip) if skip else None}
