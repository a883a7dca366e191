"""The micro-batches of one rank, each a pure function of its number."""

from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Dataset, get_worker_info

from echolab.data.bad_samples import Tolerant
from echolab.data.batch_sampler import ORDER, Drawn, Order, Plan, Source
from echolab.data.collate import (
    collate_clips,
    collate_pairs,
    form_of,
    read_clip,
    read_pair,
    rejected_half,
)
from echolab.data.shard_reader import ShardDataset
from echolab.errors import ConfigError, DataError
from echolab.tasks.curriculum import Curriculum, draw_task
from echolab.types import Batch, PreferencePair


class Place(NamedTuple):
    """What one optimizer step trains on."""

    kind: str  # sft, ndpo or dpo
    batch: int  # the number of the global batch that it takes from its datasets
    left_out: int = 0  # how many of the batches before it were skipped


class MicroBatch(NamedTuple):
    """One forward and backward of one rank, tagged with what its randomness depends on."""

    kind: str
    step: int
    epochs: list[int]  # [B]  how often the dataset was gone through before each clip
    batch: Batch | PreferencePair
    sources: list[int]  # [B]  number of the dataset
    share: float = 1.0  # of its mean error; 0 where its clips only fill up the batch


class Stock(NamedTuple):
    """Datasets of one kind, and which of their samples each global batch holds."""

    datasets: tuple[ShardDataset, ...]
    plan: Plan
    readers: tuple[Tolerant, ...]  # of each dataset


def uniform(seed: int, epoch: int, key: str, what: str) -> float:
    """A number in [0, 1) that depends on nothing but the arguments."""
    digest = blake2b(f"{seed}/{epoch}/{what}/{key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _size(dataset: ShardDataset) -> tuple[int, int, int]:
    """(frames, height, width) of its clips' latents."""
    form = form_of(dataset)
    _, frames, height, width = form["latents"] if "latents" in form else form["chosen"]
    return frames, height, width


def _check_kind(datasets: Sequence[ShardDataset], kind: str) -> None:
    """Raise DataError for a dataset of another kind, or an empty one."""
    for dataset in datasets:
        if dataset.kind != kind:
            raise DataError(f"{dataset.folder}: kind {dataset.kind}, need {kind}")
        if not len(dataset):
            raise DataError(f"{dataset.folder}: holds no sample; nothing to train on")


def stock(
    datasets: Sequence[ShardDataset],
    *,
    kind: str,
    batch_size: int,
    seed: int,
    weights: Sequence[float] | None = None,
    order: Order = ORDER,
    skip_budget: float = 0.0,
    quarantine: Path | None = None,
    order_names: Sequence[str] = (),
) -> Stock:
    """Plan the batches of some datasets; raises DataError and ConfigError where that cannot be.

    The clips of one dataset have one size: clips of several sizes are several datasets.
    `skip_budget` is the share of samples that may be bad; `quarantine` the file to list them in.
    `order_names` are what the order of each dataset depends on, by default its fingerprint.
    """
    _check_kind(datasets, kind)
    if weights is not None and len(weights) != len(datasets):
        raise ConfigError(
            f"{len(weights)} weights for {len(datasets)} datasets; give one for each, or null"
        )
    sized = len(datasets) > 1 or order.token_budget is not None  # else there is nothing to compare
    readers = [Tolerant(d, skip_budget=skip_budget, quarantine=quarantine) for d in datasets]
    sources = [
        Source(
            str(dataset.folder),
            dataset.fingerprint,
            dataset.samples_by_shard,
            _size(dataset) if sized else (1, 1, 1),
            None if weights is None else float(weights[i]),
            order_names[i] if order_names else "",
        )
        for i, dataset in enumerate(datasets)
    ]
    plan = Plan(sources, batch_size=batch_size, seed=seed, order=order)
    return Stock(tuple(datasets), plan, tuple(readers))


class MicroBatches(Dataset[MicroBatch]):
    """Item i is the i-th micro-batch of this rank over the whole schedule.

    The global batch of a step is cut by position: rank r of W takes its r-th part, and that part
    falls into `accumulation` micro-batches.  The union over ranks and micro-batches is the same for
    every W and accumulation.  Use with `DataLoader(batch_size=None, sampler=range(start, stop))`.
    """

    def __init__(
        self,
        clips: Stock,
        pairs: Stock | None,
        *,
        place: Callable[[int], Place],
        curriculum: Curriculum,
        batch_size: int,
        accumulation: int,
        seed: int,
        steps: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """`steps` are those of the whole schedule."""
        if batch_size % (world * accumulation):
            raise ConfigError(
                f"batch_size={batch_size}: not a multiple of {world} ranks x {accumulation} "
                "micro-batches; change it, or accumulation"
            )
        self.clips, self.pairs = clips, pairs
        self.place, self.curriculum, self.seed = place, curriculum, seed
        self.accumulation, self.rank, self.world = accumulation, rank, world
        self.stop = steps * accumulation  # micro-batches, in all
        self._next: tuple[int, list[Drawn], float] | None = None

    def plan(self, step: int) -> list[Drawn]:
        """The global batch of a step."""
        kind, batch, _ = self.place(step)
        return self._stock(kind).plan.batch(batch)

    def _stock(self, kind: str) -> Stock:
        stock = self.clips if kind == "sft" else self.pairs
        if stock is None:
            raise ConfigError(f"schedule: {kind} epochs, but no pairs dataset is given")
        return stock

    def __getitem__(self, i: int) -> MicroBatch:
        step = i // self.accumulation
        kind, batch, left_out = self.place(step)
        drawn, share = self._next[1:] if self._next and self._next[0] == i else self._own(i)
        self._look_ahead(i)
        epochs, sources = [one.epoch for one in drawn], [one.source for one in drawn]
        # The curriculum counts supervised steps: preference epochs do not move it.
        turn = batch - left_out
        items = self._clips(drawn, turn) if kind == "sft" else self._pairs(kind, drawn)
        return MicroBatch(kind, step, epochs, items, sources, share)

    def _look_ahead(self, i: int) -> None:
        """Tell the datasets what this process will read next."""
        worker = get_worker_info()
        following = i + (worker.num_workers if worker else 1)
        self._next = None
        if following < self.stop:
            drawn, share = self._own(following)
            self._next = following, drawn, share
            stock = self._stock(self.place(following // self.accumulation).kind)
            for number in {one.source for one in drawn}:
                samples = [one.sample for one in drawn if one.source == number]
                stock.datasets[number].expect(samples)

    def _own(self, i: int) -> tuple[list[Drawn], float]:
        """The clips of a micro-batch, and the share of their mean error."""
        step, part = divmod(i, self.accumulation)
        drawn = self.plan(step)
        size = len(drawn) // (self.world * self.accumulation)
        first = (self.rank * self.accumulation + part) * size
        own = drawn[first : first + size]
        real = [one for one in own if one.share]
        # A forward is due even without a clip: other ranks wait for it.
        return real or own[:1], sum(one.share for one in real) / size

    def _clips(self, drawn: list[Drawn], turn: int) -> Batch:
        probabilities = self.curriculum.probabilities(turn)
        clips = []
        for source, epoch, i, _ in drawn:
            dataset = self.clips.datasets[source]

            def read(j: int, dataset: ShardDataset = dataset, epoch: int = epoch) -> Batch:
                u = uniform(self.seed, epoch, dataset.keys[j], "task")
                return read_clip(dataset, j, draw_task(probabilities, u))

            clips.append(self.clips.readers[source].read(i, read))
        return collate_clips(self.clips.datasets[drawn[0].source], clips)

    def _pairs(self, kind: str, drawn: list[Drawn]) -> Batch | PreferencePair:
        assert self.pairs
        datasets, readers = self.pairs.datasets, self.pairs.readers
        pairs = [
            readers[source].read(i, partial(read_pair, datasets[source]))
            for source, _, i, _ in drawn
        ]
        pair = collate_pairs(datasets[drawn[0].source], pairs)
        return rejected_half(pair) if kind == "ndpo" else pair
