"""Build the micro-batches of one rank, each as a pure function of its index."""

from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, Protocol

from torch.utils.data import Dataset, get_worker_info

from echolab.data.bad_samples import TolerantReader
from echolab.data.batch_sampler import (
    DEFAULT_SHUFFLE,
    BatchSampler,
    DrawnSample,
    ShuffleConfig,
    Source,
)
from echolab.data.collate import (
    collate_clips,
    collate_pairs,
    collate_talkers,
    common_shapes,
    read_clip,
    read_pair,
    rejected_half,
)
from echolab.data.shard_reader import ShardDataset
from echolab.errors import ConfigError, DataError
from echolab.tasks.curriculum import Curriculum, draw_task
from echolab.types import Batch, PreferencePair, SyncBatch

PREFERENCE_KINDS = ("ndpo", "dpo")  # kinds of epochs that train on pairs


class ReadTalker(Protocol):
    """Reads a sample of a raw dataset, without batch dimension."""

    def __call__(self, dataset: ShardDataset, i: int, epoch: int) -> SyncBatch: ...


class StepPlan(NamedTuple):
    """The global batch that one optimizer step trains on."""

    kind: str  # sft, ndpo, dpo or sync
    batch: int  # index of the global batch in its datasets
    skipped: int = 0  # number of batches before it that were skipped


class MicroBatch(NamedTuple):
    """The data of one forward and backward pass of one rank, with all seeds of its random draws."""

    kind: str
    step: int
    epochs: list[int]  # [B]  epoch of each clip's dataset
    batch: Batch | PreferencePair | SyncBatch
    sources: list[int]  # [B]  index of each clip's dataset
    loss_weight: float = 1.0  # weight of the mean loss; 0 if all clips are padding


class DatasetMixture(NamedTuple):
    """Datasets of one kind, and the sampler that chooses their samples for each global batch."""

    datasets: tuple[ShardDataset, ...]
    sampler: BatchSampler
    readers: tuple[TolerantReader, ...]  # one per dataset


def uniform(seed: int, epoch: int, key: str, purpose: str) -> float:
    """Return a uniform number in [0, 1) that depends only on the arguments."""
    # Use a stateless hash, so that any process can compute the value of any clip.
    digest = blake2b(f"{seed}/{epoch}/{purpose}/{key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _latent_size(dataset: ShardDataset) -> tuple[int, int, int]:
    """Return (frames, height, width) of the dataset's latents."""
    shapes = common_shapes(dataset)
    _, frames, height, width = shapes["latents"] if "latents" in shapes else shapes["chosen"]
    return frames, height, width


def _check_datasets(
    datasets: Sequence[ShardDataset], kind: str, weights: Sequence[float] | None
) -> None:
    """Raise DataError for an empty dataset or one of another kind, ConfigError for bad weights."""
    for dataset in datasets:
        if dataset.kind != kind:
            raise DataError(
                f"{dataset.folder}: kind {dataset.kind}, need {kind}; give another dataset"
            )
        if not len(dataset):
            raise DataError(f"{dataset.folder}: holds no sample; nothing to train on")
    if weights is not None and len(weights) != len(datasets):
        raise ConfigError(
            f"{len(weights)} weights for {len(datasets)} datasets; give one for each, or null"
        )


def build_mixture(
    datasets: Sequence[ShardDataset],
    *,
    kind: str,
    batch_size: int,
    seed: int,
    weights: Sequence[float] | None = None,
    shuffle: ShuffleConfig = DEFAULT_SHUFFLE,
    max_bad_fraction: float = 0.0,
    quarantine: Path | None = None,
    order_names: Sequence[str] = (),
) -> DatasetMixture:
    """Return the datasets with their batch sampler; raise DataError or ConfigError.

    All clips of a dataset have the same size; use a separate dataset for each clip size.
    `max_bad_fraction` of the samples may be bad; bad samples are listed in the file `quarantine`.
    `order_names` seed the order of each dataset; the default is its fingerprint.
    """
    _check_datasets(datasets, kind, weights)
    # The clip size of a single dataset matters only with a token budget; raw clips have one size.
    sized = kind != "raw" and (len(datasets) > 1 or shuffle.token_budget is not None)
    sources = [
        Source(
            str(dataset.folder),
            dataset.fingerprint,
            dataset.samples_by_shard,
            _latent_size(dataset) if sized else (1, 1, 1),
            None if weights is None else float(weights[i]),
            order_names[i] if order_names else "",
        )
        for i, dataset in enumerate(datasets)
    ]
    sampler = BatchSampler(sources, batch_size=batch_size, seed=seed, shuffle=shuffle)
    # Use one reader per dataset, since the budget of bad samples is per dataset.
    readers = [
        TolerantReader(dataset, max_bad_fraction=max_bad_fraction, quarantine=quarantine)
        for dataset in datasets
    ]
    return DatasetMixture(tuple(datasets), sampler, tuple(readers))


class TrainDataset(Dataset[MicroBatch]):
    """Item i is the i-th micro-batch of this rank over the schedule.

    The global batch of a step is split by position: rank r of W gets the r-th part, and that part
    is split into `accumulation` micro-batches.  The union over ranks and micro-batches is the same
    for every W and accumulation.  Use with
    `DataLoader(batch_size=None, sampler=range(start, stop))`.
    """

    def __init__(
        self,
        clips: DatasetMixture,
        pairs: DatasetMixture | None,
        *,
        step_plan: Callable[[int], StepPlan],
        curriculum: Curriculum,
        batch_size: int,
        accumulation: int,
        seed: int,
        steps: int,
        rank: int = 0,
        world: int = 1,
        read_talker: ReadTalker | None = None,
    ) -> None:
        """Cover all `steps` of the schedule; raise ConfigError if the batch is not divisible."""
        if batch_size % (world * accumulation):
            raise ConfigError(
                f"batch_size={batch_size}: not a multiple of {world} ranks x {accumulation} "
                "micro-batches; change batch_size or accumulation"
            )
        self.clips, self.pairs, self.read_talker = clips, pairs, read_talker
        self.step_plan, self.curriculum, self.seed = step_plan, curriculum, seed
        self.accumulation, self.rank, self.world = accumulation, rank, world
        self.stop = steps * accumulation  # number of micro-batches
        self._next: tuple[int, list[DrawnSample], float] | None = None

    def global_batch(self, step: int) -> list[DrawnSample]:
        """Return the clips of the global batch of a step."""
        kind, batch, _ = self.step_plan(step)
        return self._mixture(kind).sampler.batch(batch)

    def _mixture(self, kind: str) -> DatasetMixture:
        mixture = self.pairs if kind in PREFERENCE_KINDS else self.clips
        if mixture is None:
            raise ConfigError(
                f"schedule: has {kind} epochs, which need preference pairs; give data.pairs"
            )
        return mixture

    def __getitem__(self, i: int) -> MicroBatch:
        step = i // self.accumulation
        kind, batch, skipped = self.step_plan(step)
        # Announce the next item before reading this item, so that remote shards are prefetched.
        cached = self._next and self._next[0] == i
        drawn, weight = self._next[1:] if self._next and cached else self._draw_micro_batch(i)
        self._announce_next(i)
        # The curriculum counts supervised steps only, not preference steps.
        supervised_step = batch - skipped
        items: Batch | PreferencePair | SyncBatch
        if kind == "sft":
            items = self._read_clips(drawn, supervised_step)
        elif kind == "sync":
            items = self._read_talkers(drawn)
        else:
            items = self._read_pairs(kind, drawn)
        epochs, sources = [clip.epoch for clip in drawn], [clip.source for clip in drawn]
        return MicroBatch(kind, step, epochs, items, sources, weight)

    def _announce_next(self, i: int) -> None:
        """Announce to the datasets the samples that this process will read after item `i`."""
        # Items are distributed to workers round-robin.
        worker = get_worker_info()
        following = i + (worker.num_workers if worker else 1)
        self._next = None
        if following < self.stop:
            drawn, weight = self._draw_micro_batch(following)
            self._next = following, drawn, weight
            mixture = self._mixture(self.step_plan(following // self.accumulation).kind)
            for index in {clip.source for clip in drawn}:
                samples = [clip.sample for clip in drawn if clip.source == index]
                mixture.datasets[index].expect(samples)

    def _draw_micro_batch(self, i: int) -> tuple[list[DrawnSample], float]:
        """Return the clips of a micro-batch, and the weight of their mean loss."""
        # Every rank draws the full global batch and selects its part by position.
        step, part = divmod(i, self.accumulation)
        drawn = self.global_batch(step)
        size = len(drawn) // (self.world * self.accumulation)
        first = (self.rank * self.accumulation + part) * size
        local = drawn[first : first + size]
        real = [clip for clip in local if clip.loss_weight]
        # Keep one padding clip if there is no real clip: other ranks wait for this forward pass.
        return real or local[:1], sum(clip.loss_weight for clip in real) / size

    def _read_clips(self, drawn: list[DrawnSample], supervised_step: int) -> Batch:
        # Draw the task by the key of the clip that is read, which may be a substitute.
        probabilities = self.curriculum.probabilities(supervised_step)
        clips = []
        for source, epoch, i, _ in drawn:
            dataset = self.clips.datasets[source]

            def read(j: int, dataset: ShardDataset = dataset, epoch: int = epoch) -> Batch:
                u = uniform(self.seed, epoch, dataset.keys[j], "task")
                return read_clip(dataset, j, draw_task(probabilities, u))

            clips.append(self.clips.readers[source].read(i, read))
        return collate_clips(self.clips.datasets[drawn[0].source], clips)

    def _read_talkers(self, drawn: list[DrawnSample]) -> SyncBatch:
        if self.read_talker is None:
            raise ConfigError("schedule: has sync epochs, which train SyncNet; use model=syncnet")
        talkers = []
        for source, epoch, i, _ in drawn:
            read = partial(self.read_talker, self.clips.datasets[source], epoch=epoch)
            talkers.append(self.clips.readers[source].read(i, read))
        return collate_talkers(self.clips.datasets[drawn[0].source], talkers)

    def _read_pairs(self, kind: str, drawn: list[DrawnSample]) -> Batch | PreferencePair:
        assert self.pairs
        datasets, readers = self.pairs.datasets, self.pairs.readers
        pairs = [
            readers[source].read(i, partial(read_pair, datasets[source]))
            for source, _, i, _ in drawn
        ]
        # NDPO trains on the rejected clips only.
        pair = collate_pairs(datasets[drawn[0].source], pairs)
        return rejected_half(pair) if kind == "ndpo" else pair
