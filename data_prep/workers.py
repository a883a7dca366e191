"""Work on untrusted files in processes of their own, so that no file can end the whole run.

A decoder may crash or hang: its process is then killed or found dead, the file gets the blame, and
a fresh process goes on with the next one.  A process that is killed from outside, lacks memory or
cannot read its disk says nothing about the file.
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
LONGEST_TICK = 4 * POLL_SECONDS  # a longer one was spent suspended
PR_SET_PDEATHSIG = 1
OPENCV_NO_MEMORY = -4
# What a decoder does to itself; all other signals come from outside.
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)

Progress = Callable[[float], None]
Task = Callable[[Any, Progress], Any]  # (job, progress) -> result
Setup = Callable[[], Task]  # run once in each process: loads the models


class Progressed(NamedTuple):
    """A job goes on."""

    job: Any
    share: float


class Finished(NamedTuple):
    """A job ended with a result."""

    job: Any
    result: Any


class Failed(NamedTuple):
    """A job crashed its process twice, or hung, or raised what it should not."""

    job: Any
    what: str


class Unfinished(NamedTuple):
    """A job that was stopped by something else than its file; another try may do."""

    job: Any
    what: str


Report = Progressed | Finished | Failed | Unfinished


class Clock:
    """Seconds in which this process ran: those that it spent suspended are left out."""

    def __init__(self) -> None:
        self.seconds, self._last = 0.0, time.monotonic()

    def tick(self) -> None:
        now = time.monotonic()
        self.seconds += min(now - self._last, LONGEST_TICK)
        self._last = now


class _Worker:
    """One process and the job that it has."""

    def __init__(self, setup: Setup, clock: Clock) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, setup), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Any = None
        self.clock, self.is_ready, self.heard = clock, False, clock.seconds

    def give(self, job: Any) -> None:
        self.job, self.heard = job, self.clock.seconds
        try:
            self.pipe.send(job)
        except OSError:
            pass  # it died at once: the closed pipe tells of it at the next look

    def end(self) -> None:
        self.process.kill()
        self.process.join(5)  # one that waits for its disk cannot be killed yet
        self.pipe.close()

    def state(self) -> str:
        """Return R running, S asleep, D waiting for the disk or T stopped; "" if it is gone."""
        try:
            text = Path(f"/proc/{self.process.pid}/stat").read_text("utf-8", "replace")
        except OSError:
            return ""
        return text.rpartition(")")[2].split()[0].upper()


def work(setup: Setup, jobs: Sequence[Any], count: int, stall_seconds: float) -> Iterator[Report]:
    """Do all jobs in `count` processes; an EcholabError of a job ends the run and is raised.

    A process that is silent for `stall_seconds`, in time that the machine ran, hangs.
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
                if worker.pipe in ready:
                    report = _hear(worker, crashed, waiting)
                else:
                    report = _stalled(worker, stall_seconds)
                if report is not None:
                    yield report
                if isinstance(report, Progressed) or (report is None and worker.job is not None):
                    continue
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


def _hear(worker: _Worker, crashed: list[Any], waiting: list[Any]) -> Report | None:
    """Return what a worker reports; one that crashed for the first time leaves its job waiting."""
    worker.heard = worker.clock.seconds
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
    limit = stall_seconds if worker.is_ready else max(stall_seconds, SETUP_SECONDS)
    if worker.clock.seconds - worker.heard < limit:
        return None
    state = worker.state()
    if state == "T":  # stopped by a signal: its time begins when it goes on
        worker.heard = worker.clock.seconds
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
    """Have the kernel kill this process when its parent dies: two drivers never write at once."""
    parent = multiprocessing.parent_process()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent.pid:  # died before it was asked for
        os._exit(1)


def _serve(pipe: Connection, setup: Setup) -> None:
    """The life of a worker: one job after another until the pipe closes."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    # The decoders' own chatter about damaged files would drown the lines that matter.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    last = 0.0

    def progress(share: float) -> None:
        nonlocal last
        if time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            pipe.send(("progress", share))

    try:
        task = setup()
        pipe.send(("ready", None))
        while True:
            job = pipe.recv()
            pipe.send(_outcome(task, job, progress))
    except (EOFError, BrokenPipeError):
        pass
    except EcholabError as error:
        pipe.send(("raise", error))
    except Exception as error:  # the models cannot be loaded: no file would fare better
        what = f"a worker cannot start ({type(error).__name__}: {str(error)[:200]})"
        pipe.send(("raise", EcholabError(f"{what}; check the installation with `make test`")))


def _outcome(task: Task, job: Any, progress: Progress) -> tuple[str, Any]:
    """Do one job and return (kind of report, its value); EcholabError passes through."""
    try:
        return "done", task(job, progress)
    except (EcholabError, BrokenPipeError):
        raise
    except MemoryError:
        return "unfinished", "memory: there is not enough for this file"
    except OSError as error:
        return "unfinished", f"cannot be read: {error.strerror or error}"
    except Exception as error:  # whatever a file provokes in a library gets a line
        if getattr(error, "code", None) == OPENCV_NO_MEMORY:
            return "unfinished", "memory: there is not enough for this file"
        line = " ".join(str(error).split())[:200]
        return "failed", f"unreadable: {type(error).__name__}: {line}"
