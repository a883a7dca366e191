"""Diagnosis: find the rank in which a failure began, from the observations of all ranks.

Lost nodes are recognized in `attempts`, which merges the records of all nodes.
"""

import re
import signal
from collections.abc import Sequence
from typing import Any, NamedTuple

from echolab.launch.exit_codes import DONE, PRUNED, STOPPED_SAVED, STOPPED_UNSAVED
from echolab.training.signals import SIGNALS as STOP_SIGNALS

# A rank is computing if it uses more than this many cores while the stacks are dumped:
SPINNING = 0.5  # in any process state
CONTENDED = 0.05  # in state R (running), since other processes may share its core
# Messages of exceptions that a rank raises because a peer ended or never joined: they follow from
# another failure.
SECONDARY = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|connection reset by peer|broken pipe|"
    r"socket (closed|timeout)|sendbytes failed|recvvalue failed|closed by peer|"
    r"timed out (waiting|after)|wait timeout|watchdog|nccl (error|operation|communicator)|"
    r"ncclremoteerror|remote process exited|connectfullmesh failed|gloo.*(tcp|pair|context)|"
    r"application timeout|tcpstore|barrier.*timeout|process group.*abort",
    re.IGNORECASE | re.DOTALL,
)
# Matches the innermost Python frame of a rank that waits in a collective.
COLLECTIVE = re.compile(
    r'File "[^"]*(torch/distributed/|torch/autograd/graph\.py|deepspeed/comm/|'
    r"deepspeed/utils/(comms_logging|nvtx|timer)\.py|torch/nn/parallel/distributed\.py|"
    r'torch/cuda/(__init__|streams)\.py|training/(distributed|step_sync)\.py)[^"]*"'
)


class Failure(NamedTuple):
    """An exception that a rank recorded before it ended."""

    error_type: str
    message: str
    cause: str  # key of exit_codes.CAUSES
    time: float  # seconds since 1970, by the rank's clock
    traceback: str = ""
    shared: bool = False  # all ranks raised it together: the recording rank need not be at fault
    rank: int | None = None  # rank at fault in a shared failure, None if unknown


class Observation(NamedTuple):
    """State of one rank when the run failed, before any process was killed."""

    rank: int
    host: str
    section: str
    step: int
    switches: int  # number of sections entered
    stay: float  # seconds in the current section
    exit_code: int | None = None  # -n for signal n, None while alive
    ended_at: float = 0.0  # time.time() when the supervisor noticed the rank's end
    process_state: str = ""  # as processes.ProcessState.state
    cpu_usage: float = 0.0  # cores in use while the stacks were dumped
    timeout: float = 0.0  # timeout in seconds that the rank exceeded, 0 if none
    stack: str = ""
    failure: Failure | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the observation as JSON values."""
        return self._asdict() | {"failure": self.failure._asdict() if self.failure else None}


def observation_from(values: dict[str, Any]) -> Observation:
    """Build an observation from JSON values."""
    failure = values.get("failure")
    return Observation(**{**values, "failure": Failure(**failure) if failure else None})


class Verdict(NamedTuple):
    """Result of a diagnosis."""

    rank: int  # rank at fault, -1 if unknown
    cause: str  # key of exit_codes.CAUSES
    detail: str


def main_thread(stack: str) -> list[str]:
    """Return the frames of the main thread, innermost first; faulthandler lists it last."""
    threads = re.split(r"^(?:Current thread|Thread) [^\n]*\n", stack, flags=re.MULTILINE)
    return [line.strip() for line in threads[-1].splitlines() if line.strip().startswith("File")]


def in_collective(stack: str) -> bool:
    """Return whether the main thread of a rank waits for other ranks."""
    frames = main_thread(stack)
    return bool(frames) and COLLECTIVE.match(frames[0]) is not None


def is_secondary_failure(failure: Failure) -> bool:
    """Return whether an exception only reports that another rank ended."""
    text = f"{failure.error_type} {failure.message}"
    return failure.cause == "code" and SECONDARY.search(text) is not None


def find_root_cause(observations: Sequence[Observation]) -> Verdict | None:
    """Return the rank in which the failure began; None if no rank failed and none is overdue.

    Evidence is checked from the most to the least certain: killed by a signal; the earliest
    exception that is not secondary; ended by a stop signal before it had a handler; suspended; exit
    without an error file; a hang.  In a hang the rank at fault is outside of a collective, then
    behind in steps, then behind in sections, then busy.  Secondary exceptions come last.
    """
    if verdict := _killed_verdict(observations, by_stop_signal=False):
        return verdict
    # The earliest exception that does not follow from another rank's failure.
    failed = [o for o in observations if o.failure]
    primary = [o for o in failed if o.failure and not is_secondary_failure(o.failure)]
    if primary:
        return _exception_verdict(min(primary, key=_failure_time))
    if verdict := _killed_verdict(observations, by_stop_signal=True):
        return verdict
    if stopped := [o for o in observations if o.process_state == "T"]:
        return Verdict(stopped[0].rank, "stopped_process", f"in {stopped[0].section}")
    # An unplanned exit without an error file.
    silent = [
        o for o in observations if o.exit_code is not None and not o.failure and _is_unplanned(o)
    ]
    if silent:
        first = min(silent, key=lambda o: (o.ended_at, o.rank))
        aborted = first.exit_code == -signal.SIGABRT
        return Verdict(
            first.rank, "exited", "SIGABRT" if aborted else f"exit code {first.exit_code}"
        )
    # A hang: choose the living rank that the others wait for.
    alive = [o for o in observations if o.exit_code is None and o.section != "pause"]
    if alive and (any(o.timeout for o in observations) or failed):
        return _hang_verdict(min(alive, key=_progress))
    return _exception_verdict(min(failed, key=_failure_time)) if failed else None


def _killed_verdict(observations: Sequence[Observation], *, by_stop_signal: bool) -> Verdict | None:
    """Return the first rank that a stop signal killed, or without `by_stop_signal` another signal.

    SIGABRT does not count: libraries use it to end a rank whose peer ended.
    """
    killed = [
        o
        for o in observations
        if o.exit_code is not None and o.exit_code < 0 and o.exit_code != -signal.SIGABRT
    ]
    killed = [o for o in killed if (-(o.exit_code or 0) in STOP_SIGNALS) is by_stop_signal]
    if not killed:
        return None
    first = min(killed, key=lambda o: (o.ended_at, o.rank))
    name = signal.Signals(-(first.exit_code or 0)).name
    return Verdict(first.rank, "preempted_unsaved" if by_stop_signal else "killed", name)


def _failure_time(observation: Observation) -> tuple[float, int]:
    return (observation.failure.time if observation.failure else 0.0, observation.rank)


def _is_unplanned(observation: Observation) -> bool:
    return observation.exit_code not in (DONE, STOPPED_SAVED, STOPPED_UNSAVED, PRUNED)


def _exception_verdict(observation: Observation) -> Verdict:
    failure = observation.failure
    assert failure
    # All ranks record a shared failure; the failure itself names the rank at fault, if known.
    rank = observation.rank
    if failure.shared:
        rank = -1 if failure.rank is None else failure.rank
    return Verdict(rank, failure.cause, f"{failure.error_type}: {failure.message}")


def root_cause_observation(
    rank: int, cause: str, observations: Sequence[Observation]
) -> Observation | None:
    """Return the observation of the root-cause rank.

    For a shared failure of unknown rank, return the observation of the rank that recorded it first.
    """
    matching = next((o for o in observations if o.rank == rank), None)
    shared = [
        o for o in observations if o.failure and o.failure.shared and o.failure.cause == cause
    ]
    return matching or min(shared, key=_failure_time, default=None)


def _progress(observation: Observation) -> tuple[bool, int, int, float, int]:
    # A rank without a stack did not respond to SIGQUIT: it counts as outside of a collective.
    waits = in_collective(observation.stack)
    usage = -round(observation.cpu_usage, 1)
    return (waits, observation.step, observation.switches, usage, observation.rank)


def _hang_verdict(observation: Observation) -> Verdict:
    usage, state = observation.cpu_usage, observation.process_state
    if in_collective(observation.stack):
        detail = "waiting in a collective that other ranks did not join"
    elif usage > SPINNING or (state == "R" and usage > CONTENDED):
        detail = f"computing without end ({usage:.0%} of a core)"
    elif state == "D":
        detail = "waiting for the disk (state D)"
    else:
        detail = "blocked"
    section = observation.section
    cause = "teardown" if section == "teardown" else "hang"
    return Verdict(observation.rank, cause, f"{detail}, in {section} for {observation.stay:.0f} s")
