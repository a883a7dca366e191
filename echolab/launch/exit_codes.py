"""Exit codes, and the causes of an end: restart budget, summary and remedy of each."""

import re
from typing import Literal, NamedTuple

from echolab.atomic_io import FULL
from echolab.errors import (
    BusyError,
    CheckpointError,
    ConfigError,
    DataError,
    DiskFullError,
    DivergedError,
    EcholabError,
    FencedError,
    MediaError,
    ParityError,
    ReplicaError,
    SaveError,
    SharedMemoryError,
    StorageError,
    WeightsError,
    WorkerError,
)

DONE = 0
FATAL = 1  # an invalid setting, damaged data, a diverged loss: the same command would fail again
STOPPED_SAVED = 75  # stopped with a checkpoint: the same command resumes from it
STOPPED_UNSAVED = 76  # stopped without a checkpoint: steps after the last checkpoint are lost
RETRYABLE = 77  # a failure that may lie in the machine: retried within the budget
PRUNED = 78  # pruned by a sweep
INTERRUPTED = 130  # second Ctrl-C: steps after the last checkpoint are lost

# The budget of restarts that an attempt counts against (restart_policy).
Budget = Literal["none", "preemption", "infrastructure", "code", "fatal"]


class Cause(NamedTuple):
    """The cause of the end of an attempt."""

    exit_code: int
    budget: Budget
    summary: str  # what happened, in one line
    next_action: str  # what the user can do


# Cause by type of exception; the first type that matches (isinstance) is used.
SYSTEM_ERRORS: dict[type[BaseException], str] = {
    DiskFullError: "disk", StorageError: "storage", SharedMemoryError: "shared_memory",
    WorkerError: "worker",
}  # fmt: skip
ECHOLAB_ERRORS: dict[type[BaseException], str] = {
    ConfigError: "config", DataError: "data", MediaError: "data", DivergedError: "diverged",
    ReplicaError: "replicas", ParityError: "parity", SaveError: "disk",
    BusyError: "busy", FencedError: "fenced",
}  # fmt: skip
# OSErrors that do not come from storage: a process or a peer ended, or a path is invalid.
NOT_STORAGE = (
    ConnectionError, ChildProcessError, ProcessLookupError,
    FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError,
)  # fmt: skip
# Messages of PyTorch and NCCL for a full /dev/shm, and of PyTorch for a killed loader worker.
SHARED_MEMORY = re.compile(r"shared memory|/dev/shm|\(shm\)|Bus error", re.IGNORECASE)
WORKER = re.compile(r"DataLoader worker \(pid")

RERUN = "run the same command again"
RESUME = f"{RERUN}; training resumes from the newest checkpoint"


def _stopped(summary: str, budget: Budget = "preemption", remedy: str = RESUME) -> Cause:
    return Cause(STOPPED_SAVED, budget, f"{summary}, checkpoint saved", remedy)


def _infra(summary: str, remedy: str) -> Cause:
    return Cause(RETRYABLE, "infrastructure", summary, f"{remedy}; {RERUN}")


def _fatal(summary: str, remedy: str) -> Cause:
    return Cause(FATAL, "fatal", summary, remedy)


CAUSES = {
    # Planned ends.
    "done": Cause(DONE, "none", "all steps done", "nothing to do; evaluate or export the run"),
    "preempted": _stopped("stopped by a signal"),
    "preempted_unsaved": Cause(
        STOPPED_UNSAVED, "preemption", "stopped by a signal before a checkpoint was saved", RESUME
    ),
    "time": _stopped("stopped shortly before the job's time limit"),
    "memory": _stopped(
        "stopped because host memory was nearly full", remedy=f"{RESUME}; find the memory leak"
    ),
    "stop": _stopped("stopped by a STOP file", "none"),
    "pruned": Cause(PRUNED, "none", "pruned by the sweep", "nothing to do"),
    "interrupted": Cause(INTERRUPTED, "none", "interrupted by a second Ctrl-C", RESUME),
    # Another launch holds the run folder.
    "busy": Cause(
        RETRYABLE, "none", "another launch uses the run folder", "wait until that launch ends"
    ),
    "fenced": Cause(
        RETRYABLE, "none", "a later launch took over the run", "nothing to do; it continues the run"
    ),
    # The same command would fail again.
    "config": _fatal("invalid setting", "correct the setting"),
    "data": _fatal(
        "damaged data",
        "run echolab data verify FOLDER deep=true; encode the samples that it names again",
    ),
    "start": _fatal("initial weights or checkpoint cannot be used", "give another file"),
    "diverged": _fatal("the loss is not finite", "echolab rollback, or lower the learning rate"),
    "parity": _fatal("the exported weights differ", "read parity.json; correct the export"),
    "refused": _fatal("training cannot continue", "follow the message"),
    # Failures of the machine.
    "disk": _infra("a file could not be written", "free disk space"),
    "storage": _infra(
        "a file system or server failed", "check that file system or server"
    ),
    "worker": _infra(
        "a data loader worker was killed",
        "after SIGKILL it was probably out of memory: lower data.num_workers or request more "
        "memory (--mem)",
    ),
    "shared_memory": _infra(
        "/dev/shm is full",
        "free space in /dev/shm (in a container: --shm-size), or lower data.num_workers",
    ),
    "replicas": Cause(
        RETRYABLE, "infrastructure", "replicas differ: silent data corruption",
        "exclude that host, if it is known",
    ),
    "killed": _infra(
        "a rank was killed by a signal",
        "after SIGKILL look for the out-of-memory killer in dmesg",
    ),
    "exited": _infra("a rank exited without an error message", "read that rank's log"),
    "hang": _infra("no progress within the timeout", "read the stack trace of that rank"),
    "stopped_process": _infra(
        "a rank was suspended (SIGSTOP)", "find out who suspended it"
    ),
    "node_lost": _infra("lost contact with a node", "check that node"),
    "teardown": Cause(
        RETRYABLE, "infrastructure", "failure after training", f"{RERUN}; no step is left to train"
    ),
    # An exception that no rule above explains.
    "code": Cause(RETRYABLE, "code", "exception in the code", "read the traceback; restarted once"),
}  # fmt: skip


def cause_of_exception(error: BaseException, section: str) -> str:
    """Return the name of the cause for an exception in a section."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if cause := _system_cause(error):
        return cause
    for error_type, cause in ECHOLAB_ERRORS.items():
        if isinstance(error, error_type):
            return cause
    if isinstance(error, CheckpointError | WeightsError):
        return "start" if section == "init" else "disk"
    if isinstance(error, EcholabError):
        return "config" if section == "init" else "refused"
    return "teardown" if section == "teardown" else "code"


def _system_cause(error: BaseException | None) -> str:
    """Return the cause of an exception that an operating system error led to; else ""."""
    for error_type, cause in SYSTEM_ERRORS.items():
        if isinstance(error, error_type):
            return cause
    # Follow the chain of causes down to the error of the system.
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number in FULL:
            return "disk"
        if number and not isinstance(error, NOT_STORAGE):
            return "storage"
        if isinstance(error, RuntimeError) and WORKER.search(str(error)):
            return "shared_memory" if SHARED_MEMORY.search(str(error)) else "worker"
        if isinstance(error, RuntimeError) and SHARED_MEMORY.search(str(error)):
            return "shared_memory"
        error = error.__cause__
    return ""


def cause_of_result(reason: str, *, unsaved: bool = False) -> str:
    """Return the name of the cause for training that ended by itself (`FitResult.reason`)."""
    if unsaved and reason != "prune":
        return "preempted_unsaved"
    return {"signal": "preempted", "prune": "pruned", "until": "done"}.get(reason, reason)


def cause_of_code(exit_code: int) -> str:
    """Return the name of the cause for ranks that ended together with only an exit code."""
    return {
        DONE: "done", STOPPED_SAVED: "preempted", STOPPED_UNSAVED: "preempted_unsaved",
        PRUNED: "pruned",
    }[exit_code]  # fmt: skip
