"""Process untrusted files in separate processes, so that no file can end the run.

A decoder may crash or hang: the file is then refused, and a new process handles the next file.  If
a process is killed from outside, lacks memory or cannot read its disk, its file is not refused.
"""

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from echolab.errors import EcholabError

POLL_SECONDS = 0.5
PROGRESS_SECONDS = 0.2  # minimum interval between two reports of a worker
SETUP_SECONDS = 600.0  # time limit to load the models, for a busy machine
LONGEST_TICK = 4 * POLL_SECONDS  # a longer interval means that this process was suspended
PR_SET_PDEATHSIG = 1
OPENCV_NO_MEMORY = -4
# Signals of a crash in the decoder; all others come from outside.
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)

Progress = Callable[[float], None]
Task = Callable[[Any, Progress], Any]  # (job, progress) -> result
Setup = Callable[[], Task]  # run once in each process: loads the models


class Progressed(NamedTuple):
    """A fraction of a job is done."""

    job: Any
    fraction: float  # from 0 to 1


class Finished(NamedTuple):
    """A job ended with a result."""

    job: Any
    result: Any


class Failed(NamedTuple):
    """A job crashed its process twice, or hung, or raised an unexpected exception."""

    job: Any
    reason: str


class Unfinished(NamedTuple):
    """A job failed for a reason other than its file; a retry may succeed."""

    job: Any
    reason: str


Report = Progressed | Finished | Failed | Unfinished


class Clock:
    """Seconds that this process ran, excluding suspensions."""

    def __init__(self) -> None:
        self.seconds, self._last = 0.0, time.monotonic()

    def tick(self) -> None:
        # Count a suspension as one tick; otherwise a laptop's sleep would time out all jobs.
        now = time.monotonic()
        self.seconds += min(now - self._last, LONGEST_TICK)
        self._last = now


class _Worker:
    """One process and its current job."""

    def __init__(self, setup: Setup, clock: Clock) -> None:
        # Spawn, since a fork would copy the state of decoders and threads.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, setup), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Any = None
        self.clock, self.is_ready, self.last_message = clock, False, clock.seconds

    def give(self, job: Any) -> None:
        self.job, self.last_message = job, self.clock.seconds
        try:
            self.pipe.send(job)
        except OSError:
            pass  # the process has died: the next poll detects the closed pipe

    def end(self) -> None:
        self.process.kill()
        self.process.join(5)  # bounded: a process that waits for its disk cannot be killed yet
        self.pipe.close()

    def state(self) -> str:
        """Return R (running), S (asleep), D (waiting for disk), T (stopped) or "" (ended)."""
        # The process name may contain spaces and brackets: the state follows the last bracket.
        try:
            text = Path(f"/proc/{self.process.pid}/stat").read_text("utf-8", "replace")
        except OSError:
            return ""
        return text.rpartition(")")[2].split()[0].upper()


def work(setup: Setup, jobs: Sequence[Any], count: int, stall_seconds: float) -> Iterator[Report]:
    """Run all jobs in `count` processes and yield their reports.

    Raise the EcholabError of a job, which ends the run.  A process that sends no message for
    `stall_seconds`, excluding suspensions of this process, counts as hung.
    """
    waiting, crashed = list(reversed(jobs)), list[Any]()
    workers: list[_Worker] = []
    clock = Clock()
    try:
        for _ in range(min(count, len(jobs))):
            workers.append(_Worker(setup, clock))
            workers[-1].give(waiting.pop())
        while workers:
            ready = wait([worker.pipe for worker in workers], POLL_SECONDS)
            clock.tick()
            for worker in list(workers):
                # Receive a message, or check whether the worker stalled.
                if worker.pipe in ready:
                    report = _receive(worker, crashed, waiting)
                else:
                    report = _report_stall(worker, stall_seconds)
                if report is not None:
                    yield report
                if isinstance(report, Progressed) or (report is None and worker.job is not None):
                    continue

                # The job is over: reuse the process only if it finished the job normally.
                if not isinstance(report, Finished) or not waiting:
                    worker.end()
                    workers.remove(worker)
                    if not waiting:
                        continue
                    worker = _Worker(setup, clock)
                    workers.append(worker)
                worker.give(waiting.pop())
    finally:
        for worker in workers:
            worker.end()


def _receive(worker: _Worker, crashed: list[Any], waiting: list[Any]) -> Report | None:
    """Return the report of a worker; after the first crash of a job, queue it for a retry."""
    worker.last_message = worker.clock.seconds
    try:
        kind, value = worker.pipe.recv()
    except (EOFError, ConnectionError):
        return _report_exit(worker, crashed, waiting)
    if kind == "raise":
        raise value
    if kind == "ready":
        worker.is_ready = True
        return None
    reports = {"progress": Progressed, "failed": Failed, "unfinished": Unfinished, "done": Finished}
    report: Report = reports[kind](worker.job, value)
    return report


def _report_exit(worker: _Worker, crashed: list[Any], waiting: list[Any]) -> Report | None:
    """Return the report on a worker whose process has ended."""
    # A file counts as damaged only if the decoder crashed twice.
    worker.process.join(5)
    code, job = worker.process.exitcode, worker.job
    if code is None or code >= 0:
        return Unfinished(job, f"killed: its process ended by itself (exit code {code})")
    if -code not in CRASHES:
        hint = ", as the kernel does when memory is full" if -code == signal.SIGKILL else ""
        return Unfinished(job, f"killed: its process was ended from outside (signal {-code}{hint})")
    if job in crashed:
        return Failed(job, f"damaged: the decoder crashed twice (signal {-code})")
    crashed.append(job)
    waiting.append(job)
    worker.job = None
    return None


def _report_stall(worker: _Worker, stall_seconds: float) -> Report | None:
    """Return the report on a worker that has been silent for too long, else None."""
    # Allow more time for loading the models than for a step of a job.
    limit = stall_seconds if worker.is_ready else max(stall_seconds, SETUP_SECONDS)
    if worker.clock.seconds - worker.last_message < limit:
        return None
    state = worker.state()
    if state == "T":  # stopped by a signal: restart its time limit
        worker.last_message = worker.clock.seconds
        return None
    if state == "D":
        return Unfinished(worker.job, f"disk: a read does not return (for {limit:g} s)")
    if not worker.is_ready:
        return Unfinished(worker.job, f"slow start: the models are not loaded after {limit:g} s")
    return Failed(
        worker.job,
        f"no progress: the decoder hangs (for {limit:g} s); if the machine is slow, raise "
        "stall_seconds and give another OUT",
    )


def _die_with_parent() -> None:
    """Make the kernel kill this process when its parent dies, so that two runs never overlap."""
    parent = multiprocessing.parent_process()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent.pid:  # the parent died before the call
        os._exit(1)


def _serve(pipe: Connection, setup: Setup) -> None:
    """Run a worker: one job after another until the pipe closes."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    # Discard the decoders' messages about damaged files on standard error.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    last = 0.0

    def progress(fraction: float) -> None:
        # Limit the rate of messages, since a full pipe would block the job.
        nonlocal last
        if time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            pipe.send(("progress", fraction))

    try:
        # Each process loads the models itself, since they cannot be sent through a pipe.
        task = setup()
        pipe.send(("ready", None))
        while True:
            job = pipe.recv()
            pipe.send(_run_job(task, job, progress))
    except (EOFError, BrokenPipeError):
        pass
    except EcholabError as error:
        pipe.send(("raise", error))
    except Exception as error:  # the models cannot be loaded, so every file would fail
        problem = f"a worker cannot start ({type(error).__name__}: {str(error)[:200]})"
        pipe.send(("raise", EcholabError(f"{problem}; check the installation with `make test`")))


def _run_job(task: Task, job: Any, progress: Progress) -> tuple[str, Any]:
    """Run one job and return (kind of report, its value); EcholabError passes through."""
    try:
        return "done", task(job, progress)
    except (EcholabError, BrokenPipeError):
        raise
    except MemoryError:
        return "unfinished", "memory: there is not enough for this file"
    except OSError as error:
        return "unfinished", f"cannot be read: {error.strerror or error}"
    except Exception as error:  # any exception that a file causes in a library
        if getattr(error, "code", None) == OPENCV_NO_MEMORY:
            return "unfinished", "memory: there is not enough for this file"
        line = " ".join(str(error).split())[:200]
        return "failed", f"unreadable: {type(error).__name__}: {line}"
