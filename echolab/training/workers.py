"""The data loader's worker processes: how their batches travel, and how their errors are seen.

A batch travels in shared memory, files of /dev/shm.  PyTorch puts it there in a thread
that cannot report that there is no room: the batch is lost and the rank waits for ever.  So a
worker moves it before, and its exception reaches the rank.
"""

import errno
import faulthandler
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from echolab.errors import ConfigError, EcholabError, SharedMemoryError, WorkerError
from echolab.heartbeat import open_stacks_file
from echolab.training.signals import ignore_signals

SHARED = Path("/dev/shm")
PREFETCHED = 2  # batches that a worker makes ahead: PyTorch's default
IN_USE = 2  # batches that a rank holds: it trains on one, and Lightning has the next
SENDING_FAILED = 74  # exit code of a worker that cannot send a batch
REMEDY = "make room there (in a container: --shm-size), or lower data.num_workers"

DIED = re.compile(r"DataLoader worker \(pid")

Item = TypeVar("Item")


def tensors_of(item: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested tuples, lists and mappings."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, dict):
        for value in item.values():
            yield from tensors_of(value)
    elif isinstance(item, Sequence) and not isinstance(item, str | bytes):
        for value in item:
            yield from tensors_of(value)


def as_it_is(item: Item) -> Item:
    """Return an item as it is: a dataset's items are complete batches."""
    return item


def in_shared_memory(item: Item) -> Item:
    """Move the tensors of an item to shared memory; raise SharedMemoryError if there is no room."""
    try:
        for tensor in tensors_of(item):
            tensor.share_memory_()
    except RuntimeError as error:  # PyTorch has no other type for it
        raise SharedMemoryError(_full(sum(t.nbytes for t in tensors_of(item)))) from error
    return item


def _full(size: int) -> str:
    return f"{SHARED}: no room for a batch of {size:,} bytes, {_free():,} are free; {REMEDY}"


def _free() -> int:
    disk = os.statvfs(SHARED)
    return disk.f_bavail * disk.f_frsize


def check_room(size: int, workers: int, ranks: int) -> None:
    """Check that the batches of all workers fit in /dev/shm; `size` is the bytes of one batch.

    `ranks` are those of this node.  Raise ConfigError if they never fit, SharedMemoryError if the
    room is taken by others now.
    """
    batches = workers * PREFETCHED + IN_USE
    needed = size * batches * ranks
    disk = os.statvfs(SHARED)
    total, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    words = (
        f"data.num_workers={workers}: {ranks} ranks x {batches} batches of {size:,} bytes need "
        f"{needed:,} bytes of {SHARED}, which has"
    )
    if needed > total:
        raise ConfigError(f"{words} {total:,}; {REMEDY}")
    if needed > free:
        raise SharedMemoryError(f"{words} {free:,} free of {total:,}; {REMEDY}")


def begin_worker(number: int) -> None:
    """Prepare a worker: only its parent decides when to stop; its end is never silent."""
    ignore_signals()
    stacks = open_stacks_file()
    faulthandler.disable()  # as this rank enabled it, below the handlers of PyTorch
    faulthandler.enable(sys.stderr if stacks is None else stacks)
    Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]


def _end(error: BaseException, item: Any) -> None:
    """End this worker, in the thread that could not send an item; the rank then notices."""
    print("echolab: a worker of the data loader cannot send a batch:", file=sys.stderr)
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(SENDING_FAILED)


@contextmanager
def reported() -> Iterator[None]:
    """Raise an error of a worker as the worker raised it, in one line.

    PyTorch keeps the type, and makes the traceback its message.
    """
    try:
        yield
    except EcholabError as error:
        words = str(error)
        kind = type(error)
        marker = f"{kind.__module__}.{kind.__qualname__}: "
        if marker not in words:
            raise
        print(words, file=sys.stderr, flush=True)
        raise kind(words.rpartition(marker)[2].strip()) from None
    except RuntimeError as error:
        if not DIED.search(str(error)):
            raise
        raise _death(error) from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        # The queues of the loader are semaphores in /dev/shm.
        raise SharedMemoryError(f"{SHARED}: is full; {REMEDY}") from error


def _death(error: RuntimeError) -> EcholabError:
    """Return the error for a worker that died, with the signal that PyTorch reports."""
    words = [str(error), str(error.__cause__ or "")]
    signal_line = next((one for one in words if "killed by signal" in one), words[0])
    line = " ".join(signal_line.split())
    if "Bus error" in line:  # a page of shared memory that there is no room for
        return SharedMemoryError(f"{SHARED}: {line}; {REMEDY}")
    return WorkerError(f"{line}; if it was memory, lower data.num_workers or ask for more of it")
