"""The batches of one rank: the loader, its worker processes, and the validation clips.

A batch travels in shared memory, files of /dev/shm.  PyTorch puts it there in a thread that cannot
report that there is no room: the batch is lost and the rank waits for ever.  So a worker moves it
before, and its exception reaches the rank.
"""

import errno
import faulthandler
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from echolab.data.bad_samples import read_quarantine
from echolab.data.shard_reader import ShardDataset
from echolab.data.train_dataset import DatasetMixture, MicroBatch, StepPlan, TrainDataset
from echolab.errors import ConfigError, EcholabError, SharedMemoryError, WorkerError
from echolab.heartbeat import Heartbeat, open_stacks_file
from echolab.tasks.curriculum import Curriculum
from echolab.tasks.table import VALIDATION_TASKS
from echolab.training import distributed
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
        raise SharedMemoryError(
            _no_room_message(sum(t.nbytes for t in tensors_of(item)))
        ) from error
    return item


def _no_room_message(size: int) -> str:
    return f"{SHARED}: no room for a batch of {size:,} bytes, {_free_bytes():,} are free; {REMEDY}"


def _free_bytes() -> int:
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
    Queue._on_queue_feeder_error = staticmethod(_exit_worker)  # type: ignore[attr-defined]


def _exit_worker(error: BaseException, item: Any) -> None:
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
        raise _worker_error(error) from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        # The queues of the loader are semaphores in /dev/shm.
        raise SharedMemoryError(f"{SHARED}: is full; {REMEDY}") from error


def _worker_error(error: RuntimeError) -> EcholabError:
    """Return the error for a worker that died, with the signal that PyTorch reports."""
    words = [str(error), str(error.__cause__ or "")]
    signal_line = next((one for one in words if "killed by signal" in one), words[0])
    line = " ".join(signal_line.split())
    if "Bus error" in line:  # a page of shared memory that there is no room for
        return SharedMemoryError(f"{SHARED}: {line}; {REMEDY}")
    return WorkerError(f"{line}; if it was memory, lower data.num_workers or ask for more of it")


@dataclass(frozen=True)
class ValData:
    """Clips that are never trained on, and at which noise levels their error is taken."""

    clips: ShardDataset
    num_clips: int = 32  # clips
    batch_size: int = 16
    tasks: tuple[str, ...] = VALIDATION_TASKS
    sigmas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)


class TrainData(NamedTuple):
    """What is trained on, and how it is cut."""

    clips: DatasetMixture
    pairs: DatasetMixture | None
    batch_size: int  # clips of the largest size an optimizer step, over all ranks
    accumulation: int
    num_workers: int
    seed: int
    sequence_parallel: int = 1  # ranks in a row that get the same clips
    ranks_per_node: int = 1
    quarantine: Path | None = None  # where bad samples are listed, if any are borne with


def data_of(train_data: TrainData) -> dict[str, Any]:
    """Return its datasets by content: [fingerprint, hash of the keys, order name] each."""
    return {"clips": _dataset_rows(train_data.clips), "pairs": _dataset_rows(train_data.pairs)}


def _dataset_rows(stock: DatasetMixture | None) -> list[list[str]]:
    return [
        [dataset.fingerprint, dataset.keys_digest, source.order_seed]
        for dataset, source in (
            zip(stock.datasets, stock.sampler.sources, strict=True) if stock else ()
        )
    ]


class TimedLoader(DataLoader[MicroBatch]):
    """Marks the time that is spent waiting for it, and can be ended early."""

    heartbeat: Heartbeat
    ended = False  # if true, yields no more items

    def __iter__(self) -> Any:
        """Yield the loader's items; raise errors of its workers as the workers raised them."""
        # Workers start here: what they raise is shown as they raised it.
        with reported():
            items = super().__iter__()
        while not self.ended:
            self.heartbeat.enter("data_wait")
            with reported():
                item = next(items, None)
            if item is None:
                return
            yield item


class ShardDataModule(pl.LightningDataModule):
    """Gives the loader of micro-batches `start` to the end of the schedule."""

    def __init__(
        self,
        train_data: TrainData,
        place: Callable[[int], StepPlan],
        steps: int,
        curriculum: Curriculum,
        heartbeat: Heartbeat,
    ) -> None:
        super().__init__()
        self.train_data, self.place, self.steps, self.curriculum = (
            train_data,
            place,
            steps,
            curriculum,
        )
        self.heartbeat = heartbeat
        self.first_step = 0  # set when the checkpoint to resume from is known
        self.loader: TimedLoader | None = None

    @property
    def writer(self) -> int | None:
        """This rank's number in the ledger; None where another rank has the same clips."""
        # Of ranks that share a clip, the first writes it.
        row, within = divmod(distributed.rank(), self.train_data.sequence_parallel)
        return None if within else row

    def go_to(self, step: int) -> None:
        """Continue at step `step` (from 0): the loader ends, and Lightning requests another."""
        self.first_step = step
        if self.loader:
            self.loader.ended = True

    def train_dataloader(self) -> TimedLoader:
        """Load exactly what remains; the order is the same for every number of workers."""
        # Ranks that share a clip read the same items.
        train_data = self.train_data
        items = TrainDataset(
            train_data.clips,
            train_data.pairs,
            step_plan=self.place,
            curriculum=self.curriculum,
            batch_size=train_data.batch_size,
            accumulation=train_data.accumulation,
            seed=train_data.seed,
            steps=self.steps,
            rank=distributed.rank() // train_data.sequence_parallel,
            world=distributed.world() // train_data.sequence_parallel,
        )
        if self.first_step < self.steps:  # workers then share the plan of the first epoch
            items.global_batch(self.first_step)
        # Shared memory that is too small would stop the workers without an error.
        if train_data.num_workers and not self.loader:
            self._check_room(items)
        # A range of item indices is the sampler, so that resuming is a different start.
        self.loader = TimedLoader(
            items,
            batch_size=None,
            sampler=range(
                self.first_step * train_data.accumulation, self.steps * train_data.accumulation
            ),
            num_workers=train_data.num_workers,
            collate_fn=in_shared_memory if train_data.num_workers else as_it_is,
            worker_init_fn=begin_worker if train_data.num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        self.loader.heartbeat = self.heartbeat
        return self.loader

    def _check_room(self, items: TrainDataset) -> None:
        """Check that the workers' batches fit in shared memory, by the first batch of each kind."""
        # Batches of one kind have one size, so the first of each stands for all.
        firsts: dict[str, int] = {}
        for step in range(self.first_step, self.steps):
            firsts.setdefault(self.place(step).kind, step)
        sizes = [
            sum(tensor.nbytes for tensor in tensors_of(items[step * self.train_data.accumulation]))
            for step in firsts.values()
        ]
        check_room(
            max(sizes, default=0), self.train_data.num_workers, self.train_data.ranks_per_node
        )

    def progress(self, step: int) -> dict[str, float]:
        """Return the epochs of the clips after `step` steps, and how many samples were dropped.

        Also count the bad samples that all ranks skipped, if that is allowed.
        """
        # Bad samples that any rank skipped.
        values, quarantine = {}, self.train_data.quarantine
        if quarantine:
            values["data/skipped"] = float(len(read_quarantine(quarantine)))
        # Epochs and dropped samples, of supervised batches only.
        kind, batch, _ = self.place(step - 1)
        if kind != "sft":
            return values
        counts = self.train_data.clips.sampler.progress(batch + 1)
        values["data/epochs"] = min(epoch for epoch, _ in counts)
        values["data/dropped"] = sum(dropped for _, dropped in counts)
        return values
