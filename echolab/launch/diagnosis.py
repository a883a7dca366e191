"""Which rank is to blame: a pure function over what was seen of all ranks when a run failed."""

import re
import signal
from collections.abc import Sequence
from typing import Any, NamedTuple

from echolab.launch.exit_codes import DONE, PRUNED, STOPPED_SAVED, STOPPED_UNSAVED
from echolab.training.signals import SIGNALS as STOPPING

SPINNING = 0.5  # of one core, while the stacks were dumped
CROWDED = 0.05  # of one core that many processes want, of one that is running
# What is left in a rank whose peer went away, or never came: never the beginning of a failure.
ECHO = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|connection reset by peer|broken pipe|"
    r"socket (closed|timeout)|sendbytes failed|recvvalue failed|closed by peer|"
    r"timed out (waiting|after)|wait timeout|watchdog|nccl (error|operation|communicator)|"
    r"ncclremoteerror|remote process exited|connectfullmesh failed|gloo.*(tcp|pair|context)|"
    r"application timeout|tcpstore|barrier.*timeout|process group.*abort",
    re.IGNORECASE | re.DOTALL,
)
# The innermost Python frame of a rank that waits for others.
WAITS = re.compile(
    r'File "[^"]*(torch/distributed/|torch/autograd/graph\.py|deepspeed/comm/|'
    r"deepspeed/utils/(comms_logging|nvtx|timer)\.py|torch/nn/parallel/distributed\.py|"
    r'torch/cuda/(__init__|streams)\.py|training/(ranks|vote)\.py)[^"]*"'
)


class Failure(NamedTuple):
    """An exception that a rank told before it ended."""

    kind: str  # the type
    message: str
    cause: str  # of exit_codes.CAUSES
    time: float  # seconds since 1970, by its own clock
    trace: str = ""
    shared: bool = False  # found by all ranks together: who told it is not who has it
    rank: int | None = None  # which has it, of one that is shared


class Observation(NamedTuple):
    """A rank at the moment when its run failed, before anything was killed."""

    rank: int
    host: str
    section: str
    step: int
    switches: int
    stay: float  # seconds in the section
    exit: int | None = None  # code, -n for signal n, None while alive
    died: float = 0.0  # time.time() at which its end was noticed
    state: str = ""  # as processes.Seen
    busy: float = 0.0  # cores it kept busy while its stack was dumped
    late: float = 0.0  # the deadline that it broke, 0 where it broke none
    stack: str = ""
    failure: Failure | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        told = self._asdict()
        return told | {"failure": self.failure._asdict() if self.failure else None}


def observation_from(told: dict[str, Any]) -> Observation:
    """From JSON."""
    failure = told.get("failure")
    return Observation(**{**told, "failure": Failure(**failure) if failure else None})


class Verdict(NamedTuple):
    """Who, and why."""

    rank: int  # -1 for a fault that is no rank's, as far as is known
    cause: str  # of exit_codes.CAUSES
    detail: str  # a few words more


def main_thread(stack: str) -> list[str]:
    """Frames of the main thread, innermost first: the last thread that faulthandler writes."""
    threads = re.split(r"^(?:Current thread|Thread) [^\n]*\n", stack, flags=re.MULTILINE)
    return [line.strip() for line in threads[-1].splitlines() if line.strip().startswith("File")]


def in_collective(stack: str) -> bool:
    """Whether a rank waits for the others, by its main thread."""
    frames = main_thread(stack)
    return bool(frames) and WAITS.match(frames[0]) is not None


def is_echo(failure: Failure) -> bool:
    """Whether an exception only says that another rank is gone."""
    return failure.cause == "code" and ECHO.search(f"{failure.kind} {failure.message}") is not None


def culprit(seen: Sequence[Observation]) -> Verdict | None:
    """The rank that the failure began with; None where none failed and none is late.

    In this order, each the surer sign: died by a signal; its own exception, the earliest; told to
    stop before it could listen; stopped; ended without a word; late, and then outside of any
    collective, behind in steps, behind in sections, busy.  What followed from a lost peer is last.
    """
    if found := _died(seen, asked=False):
        return found
    failed = [o for o in seen if o.failure]
    own = [o for o in failed if o.failure and not is_echo(o.failure)]
    if own:
        return _exception(min(own, key=_when))
    if found := _died(seen, asked=True):
        return found
    if stopped := [o for o in seen if o.state == "T"]:
        return Verdict(stopped[0].rank, "stopped_process", f"in {stopped[0].section}")
    if wordless := [o for o in seen if o.exit is not None and not o.failure and _unexpected(o)]:
        first = min(wordless, key=lambda o: (o.died, o.rank))
        ending = "SIGABRT" if first.exit == -signal.SIGABRT else f"exit code {first.exit}"
        return Verdict(first.rank, "exited", ending)
    waiting = [o for o in seen if o.exit is None and o.section != "pause"]
    if waiting and (any(o.late for o in seen) or failed):
        return _hang(min(waiting, key=_behind))
    return _exception(min(failed, key=_when)) if failed else None


def _died(seen: Sequence[Observation], *, asked: bool) -> Verdict | None:
    """The first that died by a signal, of those by which a stop is asked for or of the others.

    SIGABRT is not counted: it is how libraries end a rank whose peer went away.
    """
    dead = [o for o in seen if o.exit is not None and o.exit < 0 and o.exit != -signal.SIGABRT]
    dead = [o for o in dead if (-(o.exit or 0) in STOPPING) is asked]
    if not dead:
        return None
    first = min(dead, key=lambda o: (o.died, o.rank))
    name = signal.Signals(-(first.exit or 0)).name
    return Verdict(first.rank, "preempted_unsaved" if asked else "killed", name)


def _when(seen: Observation) -> tuple[float, int]:
    return (seen.failure.time if seen.failure else 0.0, seen.rank)


def _unexpected(seen: Observation) -> bool:
    return seen.exit not in (DONE, STOPPED_SAVED, STOPPED_UNSAVED, PRUNED)


def _exception(seen: Observation) -> Verdict:
    failure = seen.failure
    assert failure
    rank = seen.rank
    if failure.shared:
        rank = -1 if failure.rank is None else failure.rank
    return Verdict(rank, failure.cause, f"{failure.kind}: {failure.message}")


def witness(rank: int, cause: str, seen: Sequence[Observation]) -> Observation | None:
    """What was seen of the rank to blame; else, of a fault of all, of the first that told it."""
    own = next((o for o in seen if o.rank == rank), None)
    telling = [o for o in seen if o.failure and o.failure.shared and o.failure.cause == cause]
    return own or min(telling, key=_when, default=None)


def _behind(seen: Observation) -> tuple[bool, int, int, float, int]:
    # Without a stack nothing is known of collectives: such a rank answers nobody.
    return (in_collective(seen.stack), seen.step, seen.switches, -round(seen.busy, 1), seen.rank)


def _hang(seen: Observation) -> Verdict:
    if in_collective(seen.stack):
        how = "waiting in a collective that others did not join"
    elif seen.busy > SPINNING or (seen.state == "R" and seen.busy > CROWDED):
        how = f"computing without end ({seen.busy:.0%} of a core)"
    elif seen.state == "D":
        how = "waiting for the disk (state D)"
    else:
        how = "blocked"
    cause = "teardown" if seen.section == "teardown" else "hang"
    return Verdict(seen.rank, cause, f"{how}, in {seen.section} for {seen.stay:.0f} s")
