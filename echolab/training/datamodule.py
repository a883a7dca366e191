"""Feeds one rank: the micro-batches still to come, and the held-out clips."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from echolab.data.batches import MicroBatches, Place, collate_clips, read_clip
from echolab.data.shards import ShardDataset
from echolab.errors import ConfigError
from echolab.tasks.curriculum import Curriculum
from echolab.training import ranks
from echolab.training.stopping import ignore_signals
from echolab.types import Batch


@dataclass(frozen=True)
class HeldOut:
    """Clips that are never trained on, and at which noise levels their error is taken."""

    clips: ShardDataset
    at_most: int = 32  # clips
    batch_size: int = 16
    tasks: tuple[str, ...] = ("i2v", "lip_sync")
    sigmas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)


class Feed(NamedTuple):
    """What is trained on, and how it is cut."""

    clips: ShardDataset
    pairs: ShardDataset | None
    batch_size: int  # clips an optimizer step, over all ranks
    accumulation: int
    workers: int
    seed: int
    sequence_parallel: int = 1  # ranks in a row that get the same clips


class ShardDataModule(pl.LightningDataModule):
    """Gives the loader of micro-batches `start` to the end of the schedule."""

    def __init__(
        self, feed: Feed, place: Callable[[int], Place], steps: int, curriculum: Curriculum
    ) -> None:
        super().__init__()
        self.feed, self.place, self.steps, self.curriculum = feed, place, steps, curriculum
        self.first_step = 0  # set when the checkpoint to go on from is known

    def train_dataloader(self) -> "DataLoader[object]":
        """Exactly what remains; the order is the same for every number of workers."""
        feed = self.feed
        items = MicroBatches(
            feed.clips,
            feed.pairs,
            place=self.place,
            curriculum=self.curriculum,
            batch_size=feed.batch_size,
            accumulation=feed.accumulation,
            seed=feed.seed,
            rank=ranks.rank() // feed.sequence_parallel,
            world=ranks.world() // feed.sequence_parallel,
        )
        return DataLoader(
            items,
            batch_size=None,
            sampler=range(self.first_step * feed.accumulation, self.steps * feed.accumulation),
            num_workers=feed.workers,
            worker_init_fn=ignore_signals if feed.workers else None,
            pin_memory=torch.cuda.is_available(),
        )

    def held_out_batches(self, held_out: HeldOut) -> list[Batch]:
        """This rank's share of the held-out clips, every clip posed as every task.

        Every rank gets equally many batches of equal size, as ZeRO 3 needs; what is left over of
        the clips is left out.
        """
        together = self.feed.sequence_parallel
        world, rank = ranks.world() // together, ranks.rank() // together
        count = min(held_out.at_most, len(held_out.clips)) // world
        if not count:
            raise ConfigError(
                f"{held_out.clips.folder}: {len(held_out.clips)} held-out clips for {world} ranks; "
                "give at least one a rank, or validate_every=0"
            )
        places = range(rank * count, (rank + 1) * count)
        size = held_out.batch_size
        return [
            collate_clips(
                held_out.clips,
                [read_clip(held_out.clips, i, task) for i in places[first : first + size]],
            )
            for task in held_out.tasks
            for first in range(0, count, size)
        ]
