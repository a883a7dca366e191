"""Whether to start a run again: a budget for each kind of failure, over all its attempts."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from echolab.launch.attempts import RUNNING, Attempt
from echolab.launch.section_timeouts import STEP

CODE_ERRORS = 1
WITHOUT_PROGRESS = 2
CHANCE_SECONDS = 600.0  # of steps in which an attempt that is preempted should have saved
HOST_FAILURES = 2
COUNTED = ("preemption", "infrastructure", "code")  # the others ended by a person's hand
OF_A_HOST = ("killed", "exited", "hang", "stopped_process", "node_lost", "replicas")


class Decision(NamedTuple):
    """Go on or stop, in words, and the hosts to leave out."""

    go_on: bool
    why: str
    exclude: tuple[str, ...] = ()


def decide(attempts: Sequence[Attempt], infrastructure: int = 3) -> Decision:
    """Over the attempts of a run, the oldest first; the last has ended.

    Preemption is free.  `infrastructure` failures and one exception in the code are, since the last
    attempt that made a checkpoint; damaged data and wrong settings are not.  Two attempts in a row
    without a new checkpoint end it, but for those that were preempted before they had a chance.
    """
    exclude = hosts_to_exclude(attempts)
    if not attempts or attempts[-1].why is None:
        state = RUNNING if attempts else "not started"
        return Decision(False, f"the run is {state}", exclude)
    last = attempts[-1]
    assert last.why
    if last.why.budget in ("none", "fatal"):
        return Decision(False, last.why.says, exclude)
    row = since_progress([a for a in attempts if a.why and a.why.budget in COUNTED])
    idle = [a for a in row if not a.progressed and _had_a_chance(a)]
    if len(idle) >= WITHOUT_PROGRESS and last in idle:
        return Decision(False, f"{len(idle)} attempts in a row made no checkpoint", exclude)
    if last.why.budget == "preemption":
        return Decision(True, "preemption is free", exclude)
    counts: Counter[str] = Counter(a.why.budget for a in row if a.why)
    for budget, allowed in (("code", CODE_ERRORS), ("infrastructure", infrastructure)):
        if counts[budget] > allowed:
            return Decision(
                False, f"{counts[budget]} {budget} failures, {allowed} allowed", exclude
            )
    used = counts[last.why.budget]
    allowed = CODE_ERRORS if last.why.budget == "code" else infrastructure
    return Decision(True, f"{last.why.budget} failure {used} of {allowed} allowed", exclude)


def since_progress(attempts: Sequence[Attempt]) -> list[Attempt]:
    """The attempts from the last on that made a checkpoint before it ended; all, if none did."""
    made = [number for number, attempt in enumerate(attempts) if attempt.progressed]
    return list(attempts[made[-1] if made else 0 :])


def _had_a_chance(attempt: Attempt) -> bool:
    preempted = attempt.why is not None and attempt.why.budget == "preemption"
    return not preempted or sum(attempt.seconds.get(name, 0.0) for name in STEP) > CHANCE_SECONDS


def hosts_to_exclude(attempts: Sequence[Attempt]) -> tuple[str, ...]:
    """Those that two or more failures of the machinery began on."""
    blamed = Counter(a.host for a in attempts if a.cause in OF_A_HOST and a.rank >= 0 and a.host)
    return tuple(sorted(host for host, count in blamed.items() if count >= HOST_FAILURES))
