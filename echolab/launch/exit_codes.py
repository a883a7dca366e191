"""How a run ended: causes, the exit codes that a batch script acts on, and what to do next."""

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
)  # fmt: skip

DONE = 0
FATAL = 1  # a wrong setting, damaged data, a diverged loss: the same command would fail again
STOPPED_SAVED = 75  # stopped with a checkpoint: the same command goes on
STOPPED_UNSAVED = 76  # stopped without one; what came after the last checkpoint is lost
RETRYABLE = 77  # a failure that may be the machine's: worth another try within the budget
PRUNED = 78  # given up by a sweep
INTERRUPTED = 130  # Ctrl-C twice: what was done since the last checkpoint is lost

# By which budget an attempt is counted (launch.budgets).
Budget = Literal["none", "preemption", "infrastructure", "code", "fatal"]


class Cause(NamedTuple):
    """Why an attempt ended."""

    exit_code: int
    budget: Budget
    says: str  # what happened, for one line
    next_action: str  # what the user does now


# In this order: the first type that an exception is an instance of counts.
OF_THE_SYSTEM: dict[type[BaseException], str] = {
    DiskFullError: "disk", StorageError: "storage", SharedMemoryError: "shared_memory",
    WorkerError: "worker",
}  # fmt: skip
BY_TYPE: dict[type[BaseException], str] = {
    ConfigError: "config", DataError: "data", MediaError: "data", DivergedError: "diverged",
    ReplicaError: "replicas", ParityError: "parity", SaveError: "disk",
    BusyError: "busy", FencedError: "fenced",
}  # fmt: skip
# OSErrors that say nothing of a file: a process or a peer is gone, or a path is wrong.
OF_NO_FILE = (
    ConnectionError, ChildProcessError, ProcessLookupError,
    FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError,
)  # fmt: skip
# How PyTorch and NCCL report that /dev/shm is full, and that a loader's worker was killed.
SHARED_MEMORY = re.compile(r"shared memory|/dev/shm|\(shm\)|Bus error", re.IGNORECASE)
WORKER = re.compile(r"DataLoader worker \(pid")
AGAIN = "run the same command again; it goes on from the newest checkpoint"
CAUSES = {
    "done": Cause(DONE, "none", "all steps done", "nothing; evaluate or export it"),
    "preempted": Cause(STOPPED_SAVED, "preemption", "stopped by a signal, saved", AGAIN),
    "preempted_unsaved": Cause(
        STOPPED_UNSAVED, "preemption", "stopped by a signal before it could save", AGAIN
    ),
    "time": Cause(STOPPED_SAVED, "preemption", "the job's time was nearly up, saved", AGAIN),
    "memory": Cause(
        STOPPED_SAVED, "preemption", "host memory was nearly full, saved", f"{AGAIN}; find the leak"
    ),
    "stop": Cause(STOPPED_SAVED, "none", "a STOP file asked for it, saved", AGAIN),
    "pruned": Cause(PRUNED, "none", "given up by the sweep", "nothing"),
    "interrupted": Cause(INTERRUPTED, "none", "Ctrl-C twice", AGAIN),
    "busy": Cause(
        RETRYABLE, "none", "another launch is at work in the run's folder", "wait for its end"
    ),
    "fenced": Cause(
        RETRYABLE, "none", "a later launch has taken the run", "nothing; the later launch goes on"
    ),
    "config": Cause(FATAL, "fatal", "a setting is wrong", "correct the setting"),
    "data": Cause(
        FATAL,
        "fatal",
        "the data are damaged",
        "echolab data verify FOLDER deep=true; encode what it names again",
    ),
    "start": Cause(
        FATAL, "fatal", "a file it starts from cannot be used", "name another, or mend it"
    ),
    "diverged": Cause(
        FATAL, "fatal", "the loss is not finite", "echolab rollback, or lower the learning rate"
    ),
    "parity": Cause(
        FATAL, "fatal", "the exported weights differ", "read parity.json; mend the export"
    ),
    "refused": Cause(FATAL, "fatal", "training refused to go on", "do what the message says"),
    "disk": Cause(
        RETRYABLE, "infrastructure", "a file could not be written", "make room there, run it again"
    ),
    "storage": Cause(
        RETRYABLE,
        "infrastructure",
        "a file system or server failed",
        "check that file system or server, run it again",
    ),
    "worker": Cause(
        RETRYABLE,
        "infrastructure",
        "a worker of the data loader was killed",
        "SIGKILL: it is memory; lower data.num_workers or ask for more (--mem), run it again",
    ),
    "shared_memory": Cause(
        RETRYABLE,
        "infrastructure",
        "/dev/shm is full",
        "make room in /dev/shm (in a container: --shm-size), or lower data.num_workers; run "
        "it again",
    ),
    "code": Cause(RETRYABLE, "code", "an exception", "read the stack; once more may be luck"),
    "replicas": Cause(
        RETRYABLE,
        "infrastructure",
        "replicas differ: silent damage",
        "leave that host out, if it is known",
    ),
    "killed": Cause(
        RETRYABLE,
        "infrastructure",
        "killed by a signal",
        "SIGKILL: look for the out-of-memory killer in dmesg; run it again",
    ),
    "exited": Cause(
        RETRYABLE, "infrastructure", "a rank ended without a word", "read its log; run it again"
    ),
    "hang": Cause(
        RETRYABLE, "infrastructure", "no progress within the deadline", "read the stack; run again"
    ),
    "stopped_process": Cause(
        RETRYABLE,
        "infrastructure",
        "the process was stopped (SIGSTOP)",
        "ask who stopped it; run it again",
    ),
    "node_lost": Cause(
        RETRYABLE, "infrastructure", "a node told no end", "look at that node; run it again"
    ),
    "teardown": Cause(
        RETRYABLE, "infrastructure", "failed after training", "run it again: it ends at once"
    ),
}


def cause_of_exception(error: BaseException, section: str) -> str:
    """The name of a cause for an exception in a section."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if found := _of_the_system(error):
        return found
    for kind, cause in BY_TYPE.items():
        if isinstance(error, kind):
            return cause
    if isinstance(error, CheckpointError | WeightsError):
        return "start" if section == "init" else "disk"
    if isinstance(error, EcholabError):
        return "config" if section == "init" else "refused"
    return "teardown" if section == "teardown" else "code"


def _of_the_system(error: BaseException | None) -> str:
    """Return the cause of an exception that began as an error of the operating system; else ""."""
    for kind, cause in OF_THE_SYSTEM.items():
        if isinstance(error, kind):
            return cause
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number in FULL:
            return "disk"
        if number and not isinstance(error, OF_NO_FILE):
            return "storage"
        if isinstance(error, RuntimeError) and WORKER.search(str(error)):
            return "shared_memory" if SHARED_MEMORY.search(str(error)) else "worker"
        if isinstance(error, RuntimeError) and SHARED_MEMORY.search(str(error)):
            return "shared_memory"
        error = error.__cause__
    return ""


def cause_of_result(reason: str, *, unsaved: bool = False) -> str:
    """The name of a cause for a run that ended by itself (`FitResult.reason`)."""
    if unsaved and reason != "prune":
        return "preempted_unsaved"
    return {"signal": "preempted", "prune": "pruned", "until": "done"}.get(reason, reason)


def cause_of_code(code: int) -> str:
    """The name of a cause for ranks that ended together, and told no more than a code."""
    return {
        DONE: "done", STOPPED_SAVED: "preempted", STOPPED_UNSAVED: "preempted_unsaved",
        PRUNED: "pruned",
    }[code]  # fmt: skip
