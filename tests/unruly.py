"""Jobs for the worker processes of test_data_prep: some of them behave as bad files do."""

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from echolab.errors import DataError


def setup() -> Callable[[str, Callable[[float], None]], str]:
    """Runs in the worker."""
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
