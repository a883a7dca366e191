"""Process untrusted files in processes of their own, so that no file can end the run.

A decoder may crash or hang: the file is then refused, and a new process takes the next one.  A
process that is killed from outside, lacks memory or cannot read its disk does not refuse its file.
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
PROGRESS_SECONDS = 0.2  # between two reports of a worker
SETUP_SECONDS = 600.0  # loading the models, on a busy machine
LONGEST_TICK = 4 * POLL_SECONDS  # in a longer one this process was suspended
PR_SET_PDEATHSIG = 1
OPENCV_NO_MEMORY = -4
# Signals that a decoder causes itself; all others come from outside.
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)

Progress = Callable[[float], None]
Task = Callable[[Any, Progress], Any]  # (job, progress) -> result
Setup = Callable[[], Task]  # run once in each process: loads the models


class Progressed(NamedTuple):
    """A part of a job is done."""

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
    """A job was stopped by something other than its file; another try may succeed."""

    job: Any
    reason: str


Report = Progressed | Finished | Failed | Unfinished


class Clock:
    """Seconds that this process ran, without those that it was suspended."""

    def __init__(self) -> None:
        self.seconds, self._last = 0.0, time.monotonic()

    def tick(self) -> None:
        # A wait after a suspension counts as one tick, or a laptop's sleep would end all jobs.
        now = time.monotonic()
        self.seconds += min(now - self._last, LONGEST_TICK)
        self._last = now


class _Worker:
    """One process and its current job."""

    def __init__(self, setup: Setup, clock: Clock) -> None:
        # Spawned: a fork would copy the state of decoders and threads.
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
            pass  # it died at once: the next poll sees the closed pipe

    def end(self) -> None:
        self.process.kill()
        self.process.join(5)  # a process that waits for its disk cannot be killed yet
        self.pipe.close()

    def state(self) -> str:
        """Return R running, S asleep, D waiting for the disk or T stopped; "" if it has ended."""
        # The process's name may hold spaces and brackets: the state follows the last bracket.
        try:
            text = Path(f"/proc/{self.process.pid}/stat").read_text("utf-8", "replace")
        except OSError:
            return ""
        return text.rpartition(")")[2].split()[0].upper()


def work(setup: Setup, jobs: Sequence[Any], count: int, stall_seconds: float) -> Iterator[Report]:
    """Run all jobs in `count` processes and yield their reports.

    Raise the EcholabError of a job, which ends the run.  A process without a message for
    `stall_seconds`, not counting time that this process was suspended, hangs.
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
                # Receive a message, or check that the worker still progresses.
                if worker.pipe in ready:
                    report = _receive(worker, crashed, waiting)
                else:
                    report = _stalled(worker, stall_seconds)
                if report is not None:
                    yield report
                if isinstance(report, Progressed) or (report is None and worker.job is not None):
                    continue

                # The job is over: only a process that finished it normally takes another.
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
    """Return the report of a worker; after its first crash its job waits for another try."""
    worker.last_message = worker.clock.seconds
    try:
        kind, value = worker.pipe.recv()
    except (EOFError, ConnectionError):
        return _died(worker, crashed, waiting)
    if kind == "raise":
        raise value
    if kind == "ready":
        worker.is_ready = True
        return None
    reports = {"progress": Progressed, "failed": Failed, "unfinished": Unfinished, "done": Finished}
    report: Report = reports[kind](worker.job, value)
    return report


def _died(worker: _Worker, crashed: list[Any], waiting: list[Any]) -> Report | None:
    """Return the report on a worker whose process has ended."""
    # Only a crash of the decoder marks the file as damaged, and only the second time.
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


def _stalled(worker: _Worker, stall_seconds: float) -> Report | None:
    """Return the report on a worker without messages for too long, else None."""
    # Loading the models takes longer than a step of a job.
    limit = stall_seconds if worker.is_ready else max(stall_seconds, SETUP_SECONDS)
    if worker.clock.seconds - worker.last_message < limit:
        return None
    state = worker.state()
    if state == "T":  # stopped by a signal: its time begins when it continues
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
    """Make the kernel kill this process when its parent dies: two runs never write at once."""
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
        # A pipe full of small messages would slow the job down.
        nonlocal last
        if time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            pipe.send(("progress", fraction))

    try:
        # Each process sets it up itself: models cannot be sent through a pipe.
        task = setup()
        pipe.send(("ready", None))
        while True:
            job = pipe.recv()
            pipe.send(_outcome(task, job, progress))
    except (EOFError, BrokenPipeError):
        pass
    except EcholabError as error:
        pipe.send(("raise", error))
    except Exception as error:  # the models cannot be loaded, which would fail for every file
        problem = f"a worker cannot start ({type(error).__name__}: {str(error)[:200]})"
        pipe.send(("raise", EcholabError(f"{problem}; check the installation with `make test`")))


def _outcome(task: Task, job: Any, progress: Progress) -> tuple[str, Any]:
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
