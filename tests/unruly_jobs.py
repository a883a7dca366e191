"""Jobs for the worker processes of the preparation, some of which behave as bad files do."""

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.run import Job, _empty_folder, _write_done
from data_prep.source import Source
from data_prep.workers import Finished, Unfinished
from echolab.errors import DataError


def setup() -> Callable[[str, Callable[[float], None]], str]:
    """Return the task of a worker."""
    return behave


def broken_setup() -> Callable[[str, Callable[[float], None]], str]:
    raise ImportError("no such model")


def behave(job: str, progress: Callable[[float], None]) -> str:
    if job == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if job.startswith("crash once in "):
        mark = Path(job.removeprefix("crash once in ")) / "crashed"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGABRT)
    if job == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "exit":
        os._exit(3)
    if job == "memory":
        raise MemoryError
    if job == "stale":
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    if job == "slow":
        for step in range(60):
            time.sleep(0.1)
            progress(step / 60)
    if job.startswith("stop in "):
        (Path(job.removeprefix("stop in ")) / "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    if job == "hang":
        time.sleep(600)
    if job == "raise":
        raise ValueError("odd\nfile")
    if job == "disk":
        raise DataError("disk: full")
    progress(0.5)
    return job.upper()


def stand_in(stopped: Collection[str]) -> Callable[..., Iterator[Any]]:
    """Return a stand-in for `work` that makes a clip of every file except stopped ones."""

    def work_on(_: object, jobs: Sequence[Job], *__: object) -> Iterator[Any]:
        for job in jobs:
            if job.name in stopped:
                yield Unfinished(job, "killed: its process was ended from outside (signal 9)")
                continue
            _empty_folder(job.folder)
            key = Source(job.path, job.name, "0" * 64, job.caption).key()
            facts = {"source": job.name, "frames": 5, "caption": job.caption}
            for member in ("mp4", "flac", "tracks.npz"):
                (job.folder / f"{key}.{member}").write_bytes(b"0")
            (job.folder / f"{key}.json").write_text(json.dumps(facts))
            _write_done(job, [key], [])
            yield Finished(job, (1, []))

    return work_on
