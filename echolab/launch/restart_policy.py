"""Restart policy: whether to start a run again, by a budget for each kind of failure."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from echolab.heartbeat import STEP_SECTIONS
from echolab.launch.attempts import RUNNING, Attempt

MAX_CODE_ERRORS = 1
MAX_WITHOUT_PROGRESS = 2
TIME_TO_SAVE = 600.0  # seconds of training within which an attempt should save a checkpoint
MAX_HOST_FAILURES = 2
COUNTED = ("preemption", "infrastructure", "code")  # attempts of other budgets were ended by users
HOST_CAUSES = ("killed", "exited", "hang", "stopped_process", "node_lost", "replicas")


class Decision(NamedTuple):
    """A decision on a restart, its reason in words, and the hosts to exclude."""

    restart: bool
    reason: str
    exclude: tuple[str, ...] = ()


def decide(attempts: Sequence[Attempt], max_infrastructure: int = 3) -> Decision:
    """Decide on a restart from all attempts of a run, the oldest first; the last one has ended.

    Preemptions are not counted.  Since the last attempt that saved a checkpoint,
    `max_infrastructure` machine failures and one exception in the code are allowed; damaged data
    and invalid settings are never retried.  Two attempts in a row without a new checkpoint end the
    run, not counting attempts that were preempted early.
    """
    exclude = hosts_to_exclude(attempts)
    # Some ends need no decision: still running, complete, ended by the user, or sure to fail again.
    if not attempts or attempts[-1].definition is None:
        state = RUNNING if attempts else "not started"
        return Decision(False, f"the run is {state}", exclude)
    last = attempts[-1]
    assert last.definition
    budget = last.definition.budget
    if budget in ("none", "fatal"):
        return Decision(False, last.definition.summary, exclude)
    # End the run if no attempt makes progress, for any cause.
    counted = since_progress(
        [a for a in attempts if a.definition and a.definition.budget in COUNTED]
    )
    idle = [a for a in counted if not a.progressed and _had_time_to_save(a)]
    if len(idle) >= MAX_WITHOUT_PROGRESS and last in idle:
        return Decision(False, f"{len(idle)} attempts in a row saved no checkpoint", exclude)
    if budget == "preemption":
        return Decision(True, "preemptions are not counted", exclude)
    # Count the failures since the last progress against their budgets.
    failures: Counter[str] = Counter(a.definition.budget for a in counted if a.definition)
    limits = {"code": MAX_CODE_ERRORS, "infrastructure": max_infrastructure}
    for name, limit in limits.items():
        if failures[name] > limit:
            return Decision(False, f"{failures[name]} {name} failures, {limit} allowed", exclude)
    reason = f"{budget} failure {failures[budget]} of {limits[budget]} allowed"
    return Decision(True, reason, exclude)


def since_progress(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Return the attempts from the last one that saved a checkpoint on; all if none did."""
    saved = [index for index, attempt in enumerate(attempts) if attempt.progressed]
    return list(attempts[saved[-1] if saved else 0 :])


def _had_time_to_save(attempt: Attempt) -> bool:
    preempted = attempt.definition is not None and attempt.definition.budget == "preemption"
    trained = sum(attempt.seconds.get(name, 0.0) for name in STEP_SECTIONS)
    return not preempted or trained > TIME_TO_SAVE


def hosts_to_exclude(attempts: Sequence[Attempt]) -> tuple[str, ...]:
    """Return the hosts on which two or more machine failures began."""
    # A failure of an unknown rank cannot be attributed to a host.
    failures = Counter(
        attempt.host
        for attempt in attempts
        if attempt.cause in HOST_CAUSES and attempt.rank >= 0 and attempt.host
    )
    return tuple(sorted(host for host, count in failures.items() if count >= MAX_HOST_FAILURES))
