"""Jobs for the worker processes of test_data_prep: some of them behave as bad files do."""

import os
import signal
import time
from collections.abc import Callable

from echolab.errors import DataError


def setup() -> Callable[[str, Callable[[float], None]], str]:
    """Runs in the worker."""
    return behave


def broken_setup() -> Callable[[str, Callable[[float], None]], str]:
    raise ImportError("no such model")


def behave(job: str, progress: Callable[[float], None]) -> str:
    if job == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if job == "hang":
        time.sleep(600)
    if job == "raise":
        raise ValueError("odd\nfile")
    if job == "disk":
        raise DataError("disk: full")
    progress(0.5)
    return job.upper()
