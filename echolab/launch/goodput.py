"""Goodput: seconds that moved the run on, of those that it held machines; what took the rest."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from echolab.launch.attempts import Attempt
from echolab.launch.section_timeouts import STEP

LOSSES = ("waiting", "init", "data_wait", "eval", "save", "pause", "rework", "hang", "other")
PRIOR_SECONDS = 24 * 3600.0  # between failures, before any was seen
SHORTEST, LONGEST = 300.0, 4 * 3600.0  # seconds between checkpoints


class Goodput(NamedTuple):
    """Seconds of one rank, which stands for all."""

    useful: float
    allocated: float
    losses: dict[str, float]  # by LOSSES; with `useful` they make `allocated`

    @property
    def share(self) -> float:
        """Useful of allocated; 0 where nothing was allocated."""
        return self.useful / self.allocated if self.allocated else 0.0


def account(attempts: Sequence[Attempt]) -> Goodput:
    """Over all attempts, the oldest first.

    Useful is the time in steps that a later attempt did not have to do again.  Where a rank hangs,
    the last stay of the first rank, which waits for it or is it, is lost whole.
    """
    useful, allocated = 0.0, 0.0
    losses = dict.fromkeys(LOSSES, 0.0)
    for number, attempt in enumerate(attempts):
        whole = attempt.elapsed
        seconds = dict(attempt.seconds)
        hang = 0.0
        if attempt.cause in ("hang", "stopped_process"):
            hang = min(attempt.last_stay, seconds.get(attempt.last_section, 0.0))
            seconds[attempt.last_section] = seconds.get(attempt.last_section, 0.0) - hang
        steps = sum(seconds.get(name, 0.0) for name in STEP)
        again = steps * lost_share(attempt, attempts[number + 1 :])
        for name in ("init", "data_wait", "eval", "save", "pause"):
            losses[name] += seconds.get(name, 0.0)
        losses["waiting"] += attempt.waited
        losses["rework"] += again
        losses["hang"] += hang
        known = sum(seconds.values()) - seconds.get("teardown", 0.0) + hang + attempt.waited
        losses["other"] += max(whole - known, 0.0)
        useful += steps - again
        allocated += max(whole, known)
    return Goodput(useful, allocated, losses)


def lost_share(attempt: Attempt, later: Sequence[Attempt]) -> float:
    """Share of an attempt's steps that were lost: those after where the next one began."""
    begun = attempt.first_step if attempt.first_step >= 0 else 0
    done = attempt.last_step - begun
    if done <= 0:
        return 0.0
    following = next((a for a in later if a.first_step >= 0), None)
    if following is not None:
        kept = following.first_step
    elif attempt.cause == "done" or attempt.why is None:
        return 0.0
    else:
        kept = max(attempt.checkpoint, 0)
    return min(max(attempt.last_step - kept, 0), done) / done


def checkpoint_interval(attempts: Sequence[Attempt]) -> float:
    """Seconds between checkpoints that lose least: sqrt(2 x save x mean time between failures).

    Young's formula; bounded, and with a prior of one failure a day.
    """
    save = max((a.save_seconds for a in attempts), default=0.0)
    failures = sum(1 for a in attempts if a.why and a.why.budget == "infrastructure")
    allocated = sum(a.elapsed for a in attempts)
    between = (allocated + PRIOR_SECONDS) / (failures + 1)
    return min(max(math.sqrt(2 * save * between), SHORTEST), LONGEST)
