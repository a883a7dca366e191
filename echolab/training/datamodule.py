"""Feeds one rank: the micro-batches still to come, and the held-out clips."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from echolab.data.bad_samples import read_quarantine
from echolab.data.shard_reader import ShardDataset
from echolab.data.train_dataset import DatasetMixture, MicroBatch, StepPlan, TrainDataset
from echolab.heartbeat import Heartbeat
from echolab.tasks.curriculum import Curriculum
from echolab.tasks.table import VALIDATION_TASKS
from echolab.training import distributed
from echolab.training.workers import (
    as_it_is,
    begin_worker,
    check_room,
    in_shared_memory,
    reported,
    tensors_of,
)


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
    return {"clips": _listed(train_data.clips), "pairs": _listed(train_data.pairs)}


def _listed(stock: DatasetMixture | None) -> list[list[str]]:
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
        row, within = divmod(distributed.rank(), self.train_data.sequence_parallel)
        return None if within else row

    def go_to(self, step: int) -> None:
        """Continue at step `step` (from 0): the loader ends, and Lightning requests another."""
        self.first_step = step
        if self.loader:
            self.loader.ended = True

    def train_dataloader(self) -> TimedLoader:
        """Load exactly what remains; the order is the same for every number of workers."""
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
        if train_data.num_workers and not self.loader:
            self._check_room(items)
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
        values, quarantine = {}, self.train_data.quarantine
        if quarantine:
            values["data/skipped"] = float(len(read_quarantine(quarantine)))
        kind, batch, _ = self.place(step - 1)
        if kind != "sft":
            return values
        counts = self.train_data.clips.sampler.progress(batch + 1)
        values["data/epochs"] = min(epoch for epoch, _ in counts)
        values["data/dropped"] = sum(dropped for _, dropped in counts)
        return values
