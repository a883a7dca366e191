"""Work on untrusted files in processes of their own, so that no file can end the whole run.

A decoder may crash or hang: its process is then killed or found dead, the file is told, and a
fresh process goes on with the next one.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from echolab.errors import EcholabError

POLL_SECONDS = 0.5
PROGRESS_SECONDS = 0.2  # between two reports of a worker

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
    """A job took its process with it, or hung, or raised what it should not."""

    job: Any
    what: str


Report = Progressed | Finished | Failed


class _Worker:
    """One process and the job that it has."""

    def __init__(self, setup: Setup) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, setup), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Any = None
        self.heard = time.monotonic()

    def give(self, job: Any) -> None:
        self.job, self.heard = job, time.monotonic()
        try:
            self.pipe.send(job)
        except OSError:
            pass  # it died at once: the closed pipe tells of it at the next look

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def cause_of_death(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def work(setup: Setup, jobs: Sequence[Any], count: int, stall_seconds: float) -> Iterator[Report]:
    """Do all jobs in `count` processes; an EcholabError of a job ends the run and is raised."""
    waiting = list(reversed(jobs))
    workers: list[_Worker] = []
    try:
        for _ in range(min(count, len(jobs))):
            workers.append(_Worker(setup))
            workers[-1].give(waiting.pop())
        while workers:
            ready = wait([worker.pipe for worker in workers], POLL_SECONDS)
            for worker in list(workers):
                report = _hear(worker) if worker.pipe in ready else _stalled(worker, stall_seconds)
                if report is None:
                    continue
                yield report
                if isinstance(report, Progressed):
                    continue
                if isinstance(report, Failed) or not waiting:
                    worker.end()
                    workers.remove(worker)
                    if not waiting:
                        continue
                    worker = _Worker(setup)
                    workers.append(worker)
                worker.give(waiting.pop())
    finally:
        for worker in workers:
            worker.end()


def _hear(worker: _Worker) -> Report | None:
    worker.heard = time.monotonic()
    try:
        kind, value = worker.pipe.recv()
    except (EOFError, ConnectionError):
        return Failed(worker.job, f"damaged: the decoder crashed ({worker.cause_of_death()})")
    if kind == "raise":
        raise value
    if kind == "progress":
        return Progressed(worker.job, value)
    if kind == "failed":
        return Failed(worker.job, value)
    return Finished(worker.job, value)


def _stalled(worker: _Worker, stall_seconds: float) -> Failed | None:
    if time.monotonic() - worker.heard < stall_seconds:
        return None
    return Failed(worker.job, f"damaged: the decoder hangs (no progress for {stall_seconds:g} s)")


def _serve(pipe: Connection, setup: Setup) -> None:
    """The life of a worker: one job after another until the pipe closes."""
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
        while True:
            job = pipe.recv()
            try:
                result = task(job, progress)
            except EcholabError:
                raise
            except Exception as error:  # whatever a file provokes in a library is told of it
                pipe.send(("failed", f"unreadable: {type(error).__name__}: {str(error)[:200]}"))
            else:
                pipe.send(("done", result))
    except (EOFError, BrokenPipeError):
        pass
    except EcholabError as error:
        pipe.send(("raise", error))
    except Exception as error:  # the models cannot be loaded: no file would fare better
        what = f"a worker cannot start ({type(error).__name__}: {str(error)[:200]})"
        pipe.send(("raise", EcholabError(f"{what}; check the installation with `make test`")))
