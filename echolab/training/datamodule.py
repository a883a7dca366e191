"""The data of one rank: the data loader, its worker processes, and the validation clips.

Workers send batches through shared memory, which are files in /dev/shm.  PyTorch moves a batch to
shared memory in a thread that cannot report a lack of space: the batch is lost and the rank waits
forever.  Therefore the worker moves the batch itself, and its exception reaches the rank.
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
from echolab.data.train_dataset import (
    PREFERENCE_KINDS,
    DatasetMixture,
    MicroBatch,
    ReadTalker,
    StepPlan,
    TrainDataset,
)
from echolab.errors import ConfigError, EcholabError, SharedMemoryError, WorkerError
from echolab.heartbeat import Heartbeat, open_stacks_file
from echolab.tasks.curriculum import Curriculum
from echolab.tasks.table import VALIDATION_TASKS
from echolab.training import distributed
from echolab.training.signals import ignore_signals

SHARED = Path("/dev/shm")
PREFETCHED = 2  # batches that a worker prefetches: PyTorch's default
IN_USE = 2  # batches that a rank holds: the current one, and the next one in Lightning
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
    """Return an item unchanged, as collate function: the dataset's items are already batches."""
    return item


def in_shared_memory(item: Item) -> Item:
    """Move the tensors of an item to shared memory; raise SharedMemoryError if it is full."""
    try:
        for tensor in tensors_of(item):
            tensor.share_memory_()
    except RuntimeError as error:  # PyTorch has no specific type for this error
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
    """Check that the batches of all workers fit in /dev/shm.

    `size` is the size of one batch in bytes, `ranks` the number of ranks on this node.  Raise
    ConfigError if /dev/shm is too small, SharedMemoryError if too little of it is free now.
    """
    batches = workers * PREFETCHED + IN_USE
    needed = size * batches * ranks
    disk = os.statvfs(SHARED)
    total, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    message = (
        f"data.num_workers={workers}: {ranks} ranks x {batches} batches of {size:,} bytes need "
        f"{needed:,} bytes of {SHARED}, which has"
    )
    if needed > total:
        raise ConfigError(f"{message} {total:,}; {REMEDY}")
    if needed > free:
        raise SharedMemoryError(f"{message} {free:,} free of {total:,}; {REMEDY}")


def begin_worker(number: int) -> None:
    """Prepare a worker: ignore signals, and report fatal signals and sending errors."""
    ignore_signals()
    stacks = open_stacks_file()
    faulthandler.disable()  # enable it again below, after PyTorch installed its handlers
    faulthandler.enable(sys.stderr if stacks is None else stacks)
    Queue._on_queue_feeder_error = staticmethod(_exit_worker)  # type: ignore[attr-defined]


def _exit_worker(error: BaseException, item: Any) -> None:
    """End this worker from the thread that could not send an item, so that the rank notices."""
    print("echolab: a worker of the data loader cannot send a batch:", file=sys.stderr)
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(SENDING_FAILED)


@contextmanager
def reported() -> Iterator[None]:
    """Raise a worker's error with its original one-line message.

    PyTorch raises the same type, but with the traceback as the message.
    """
    try:
        yield
    except EcholabError as error:
        message = str(error)
        kind = type(error)
        marker = f"{kind.__module__}.{kind.__qualname__}: "
        if marker not in message:
            raise
        print(message, file=sys.stderr, flush=True)
        raise kind(message.rpartition(marker)[2].strip()) from None
    except RuntimeError as error:
        if not DIED.search(str(error)):
            raise
        raise _worker_error(error) from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        # The queues of the loader use semaphores in /dev/shm.
        raise SharedMemoryError(f"{SHARED}: is full; {REMEDY}") from error


def _worker_error(error: RuntimeError) -> EcholabError:
    """Return the error to raise for a worker that died, with the signal that PyTorch reports."""
    messages = [str(error), str(error.__cause__ or "")]
    signal_line = next((text for text in messages if "killed by signal" in text), messages[0])
    line = " ".join(signal_line.split())
    if "Bus error" in line:  # a write to shared memory failed because /dev/shm is full
        return SharedMemoryError(f"{SHARED}: {line}; {REMEDY}")
    return WorkerError(f"{line}; if it was memory, lower data.num_workers or ask for more of it")


@dataclass(frozen=True)
class ValData:
    """Validation clips, and the tasks and noise levels at which their error is measured."""

    clips: ShardDataset
    num_clips: int = 32
    batch_size: int = 16
    tasks: tuple[str, ...] = VALIDATION_TASKS
    sigmas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)


class TrainData(NamedTuple):
    """The training data, and how batches are divided."""

    clips: DatasetMixture
    pairs: DatasetMixture | None
    batch_size: int  # clips of the largest size per optimizer step, over all ranks
    accumulation: int  # micro-batches per rank and optimizer step
    num_workers: int
    seed: int
    sequence_parallel: int = 1  # consecutive ranks that get the same clips
    ranks_per_node: int = 1
    quarantine: Path | None = None  # file that lists bad samples; None: bad samples not allowed
    read_talker: ReadTalker | None = None  # reads samples of raw datasets, for sync epochs


def data_of(train_data: TrainData) -> dict[str, Any]:
    """Identify the datasets by content: [fingerprint, hash of the keys, order name] for each."""
    return {"clips": _dataset_rows(train_data.clips), "pairs": _dataset_rows(train_data.pairs)}


def _dataset_rows(stock: DatasetMixture | None) -> list[list[str]]:
    return [
        [dataset.fingerprint, dataset.keys_digest, source.order_seed]
        for dataset, source in (
            zip(stock.datasets, stock.sampler.sources, strict=True) if stock else ()
        )
    ]


class TimedLoader(DataLoader[MicroBatch]):
    """A data loader that reports waiting time to the heartbeat and can be ended early."""

    heartbeat: Heartbeat
    ended = False  # if true, yields no more items

    def __iter__(self) -> Any:
        """Yield the loader's items; raise errors of its workers as the workers raised them."""
        # The workers start here; show their errors with the original message.
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
    """Creates the loader of the remaining micro-batches of the schedule."""

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
        self.first_step = 0  # set once the checkpoint to resume from is known
        self.loader: TimedLoader | None = None

    @property
    def writer(self) -> int | None:
        """This rank's index in the ledger; None if another rank writes the same clips."""
        # Of the ranks that share a clip, the first writes to the ledger.
        row, within = divmod(distributed.rank(), self.train_data.sequence_parallel)
        return None if within else row

    def go_to(self, step: int) -> None:
        """Continue at step `step` (from 0): end this loader, so that Lightning requests another."""
        self.first_step = step
        if self.loader:
            self.loader.ended = True

    def train_dataloader(self) -> TimedLoader:
        """Return the loader of the remaining steps; its order is independent of `num_workers`."""
        # Ranks that share a clip load the same items.
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
            read_talker=train_data.read_talker,
        )
        if self.first_step < self.steps:  # compute the order before the fork, so workers share it
            items.global_batch(self.first_step)
        # Check the size of shared memory before the workers need it.
        if train_data.num_workers and not self.loader:
            self._check_room(items)
        # The sampler is a range of item indices, so resuming only changes its start.
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
        # Measure only the first batch of each kind: batches of one kind have one size.
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
        """Return the epochs of the clips and the number of dropped samples after `step` steps.

        If bad samples are allowed, also return the number that all ranks skipped.
        """
        # Count the bad samples that any rank skipped.
        values, quarantine = {}, self.train_data.quarantine
        if quarantine:
            values["data/skipped"] = float(len(read_quarantine(quarantine)))
        # Report epochs and dropped samples only at supervised steps.
        kind, batch, _ = self.place(step - 1)
        if kind in PREFERENCE_KINDS:
            return values
        counts = self.train_data.clips.sampler.progress(batch + 1)
        values["data/epochs"] = min(epoch for epoch, _ in counts)
        values["data/dropped"] = sum(dropped for _, dropped in counts)
        return values
