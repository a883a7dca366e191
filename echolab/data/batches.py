"""From encoded shards to the micro-batches of one rank, each a pure function of its number.

Sample members (safetensors; read as fp32):

    encoded      latents [C, F, H, W], text [L, D], image [N, D], audio [2 T, D], face [P],
                 weight [1, F, H, W]; for each task but t2v: known.<task> [4, F, H, W] and
                 known_latents.<task> [C, F, H, W]
    preference   chosen and rejected in place of latents; known, known_latents of the one task that
                 the json member names
"""

import json
from collections.abc import Callable
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import safetensors
import torch
from safetensors.torch import load
from torch import Tensor
from torch.utils.data import Dataset

from echolab.data.order import epoch_order
from echolab.data.shards import ShardDataset
from echolab.errors import ConfigError, DataError
from echolab.tasks.curriculum import Curriculum, draw_task
from echolab.types import Batch, Conditions, PreferencePair

KNOWN_WEIGHT = 0.1  # the known region is nearly given by the input: it teaches little
FEATURES = ("text", "image", "audio", "face")


class Place(NamedTuple):
    """What one optimizer step trains on."""

    kind: str  # sft, ndpo or dpo
    batch: int  # how many global batches were taken from the same dataset before


class MicroBatch(NamedTuple):
    """One forward and backward of one rank, tagged with what its randomness depends on."""

    kind: str
    step: int
    epochs: list[int]  # [B]  how often the dataset was gone through before each clip
    batch: Batch | PreferencePair


def uniform(seed: int, epoch: int, key: str, what: str) -> float:
    """A number in [0, 1) that depends on nothing but the arguments."""
    digest = blake2b(f"{seed}/{epoch}/{what}/{key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def place_weight(stored: Tensor, known: Tensor, known_weight: float = KNOWN_WEIGHT) -> Tensor:
    """Stored emphasis [1, F, H, W], less where places are known [4, F, H, W]; mean 1."""
    share = known.mean(0, keepdim=True)
    weight = stored * (1 - share + known_weight * share)
    return weight / weight.mean().clamp_min(1e-6)


def read_tensors(dataset: ShardDataset, i: int) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors in fp32 and the json member of sample `i`; raises DataError."""
    members = dataset.read(i)
    key = dataset.keys[i]
    try:
        tensors = {name: tensor.float() for name, tensor in load(members["safetensors"]).items()}
        about = json.loads(members.get("json", b"{}"))
    except KeyError as error:
        raise DataError(
            f"{dataset.folder}: sample {key} has no member {error}; "
            "make the dataset with `python -m data_prep encode`"
        ) from error
    except (safetensors.SafetensorError, ValueError) as error:
        raise DataError(f"{dataset.folder}: sample {key}: {error}; make it again") from error
    return tensors, about


def pick(dataset: ShardDataset, i: int, tensors: dict[str, Tensor], name: str) -> Tensor:
    """One tensor of a sample, or a DataError that names both."""
    if name not in tensors:
        raise DataError(
            f"{dataset.folder}: sample {dataset.keys[i]} holds no tensor {name!r}, only "
            f"{', '.join(sorted(tensors))}; encode the dataset again"
        )
    return tensors[name]


def _one(tensors: dict[str, Tensor], known: Tensor, known_latents: Tensor) -> Conditions:
    return Conditions(*(tensors[name] for name in FEATURES), known, known_latents)  # type: ignore[call-arg]


def read_clip(dataset: ShardDataset, i: int, task: str) -> Batch:
    """Sample `i` as a batch without its batch dimension, posed as `task`."""
    tensors, _ = read_tensors(dataset, i)
    for name in ("latents", "weight", *FEATURES):
        pick(dataset, i, tensors, name)
    latents = tensors["latents"]
    if tensors["weight"].shape != (1, *latents.shape[1:]):
        raise DataError(
            f"{dataset.folder}: sample {dataset.keys[i]}: latents {tuple(latents.shape)} with a "
            f"weight of {tuple(tensors['weight'].shape)}; encode the dataset again"
        )
    if task == "t2v":  # given words (and sound), no picture at all
        known = latents.new_zeros(4, *latents.shape[1:])
        tensors["image"] = torch.zeros_like(tensors["image"])
        conditions = _one(tensors, known, torch.zeros_like(latents))
    else:
        known = pick(dataset, i, tensors, f"known.{task}")
        conditions = _one(tensors, known, pick(dataset, i, tensors, f"known_latents.{task}"))
    weight = place_weight(tensors["weight"], known)
    return Batch(latents, conditions, weight, [task], [dataset.keys[i]])


def read_pair(dataset: ShardDataset, i: int) -> PreferencePair:
    """Sample `i` of a preference dataset, without batch dimension."""
    tensors, about = read_tensors(dataset, i)
    for name in ("chosen", "rejected", "weight", "known", "known_latents", *FEATURES):
        pick(dataset, i, tensors, name)
    conditions = _one(tensors, tensors["known"], tensors["known_latents"])
    weight = place_weight(tensors["weight"], tensors["known"])
    task, key = str(about.get("task", "i2v")), dataset.keys[i]
    return PreferencePair(tensors["chosen"], tensors["rejected"], conditions, weight, [task], [key])


def _stack(dataset: ShardDataset, name: str, parts: list[Tensor]) -> Tensor:
    shapes = {tuple(part.shape) for part in parts}
    if len(shapes) > 1:
        raise DataError(
            f"{dataset.folder}: {name} of different sizes in one batch: {sorted(shapes)}; "
            "prepare the clips with one frames= and one size="
        )
    return torch.stack(parts)


def _collate_conditions(dataset: ShardDataset, parts: list[Conditions]) -> Conditions:
    names = Conditions._fields
    columns = zip(names, zip(*parts, strict=True), strict=True)
    return Conditions(*(_stack(dataset, name, list(column)) for name, column in columns))


def collate_clips(dataset: ShardDataset, clips: list[Batch]) -> Batch:
    """Clips without a batch dimension to one batch; DataError where sizes differ."""
    return Batch(
        _stack(dataset, "latents", [clip.latents for clip in clips]),
        _collate_conditions(dataset, [clip.conditions for clip in clips]),
        _stack(dataset, "weight", [clip.weight for clip in clips]),
        [task for clip in clips for task in clip.tasks],
        [key for clip in clips for key in clip.keys],
    )


def collate_pairs(dataset: ShardDataset, pairs: list[PreferencePair]) -> PreferencePair:
    """The same for pairs."""
    return PreferencePair(
        _stack(dataset, "chosen", [pair.chosen for pair in pairs]),
        _stack(dataset, "rejected", [pair.rejected for pair in pairs]),
        _collate_conditions(dataset, [pair.conditions for pair in pairs]),
        _stack(dataset, "weight", [pair.weight for pair in pairs]),
        [task for pair in pairs for task in pair.tasks],
        [key for pair in pairs for key in pair.keys],
    )


def rejected_half(pair: PreferencePair) -> Batch:
    """The rejected clips of a pair, for negative preference."""
    return Batch(pair.rejected, pair.conditions, pair.weight, pair.tasks, pair.keys)


class Endless:
    """A dataset gone through again and again: position p is sample p mod N of epoch p div N."""

    def __init__(self, dataset: ShardDataset, seed: int) -> None:
        if not len(dataset):
            raise DataError(f"{dataset.folder}: holds no sample; nothing to train on")
        self.dataset, self.seed = dataset, seed
        self._order = lru_cache(maxsize=2)(self._make_order)

    def __getstate__(self) -> dict[str, object]:
        return {"dataset": self.dataset, "seed": self.seed}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _make_order(self, epoch: int) -> np.ndarray:
        dataset = self.dataset
        return epoch_order(
            dataset.samples_by_shard, dataset.fingerprint, seed=self.seed, epoch=epoch
        )

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(epoch, sample index) of a position in the endless sequence."""
        epoch, offset = divmod(position, len(self.dataset))
        return epoch, int(self._order(epoch)[offset])


class MicroBatches(Dataset[MicroBatch]):
    """Item i is the i-th micro-batch of this rank over the whole schedule.

    The global batch of a step is cut by position: rank r of W takes its r-th part, and that part
    falls into `accumulation` micro-batches.  The union over ranks and micro-batches is the same for
    every W and accumulation.  Use with `DataLoader(batch_size=None, sampler=range(start, stop))`.
    """

    def __init__(
        self,
        clips: ShardDataset,
        pairs: ShardDataset | None,
        *,
        place: Callable[[int], Place],
        curriculum: Curriculum,
        batch_size: int,
        accumulation: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size % (world * accumulation):
            raise ConfigError(
                f"batch_size={batch_size}: not a multiple of {world} ranks x {accumulation} "
                "micro-batches; change it, or accumulation"
            )
        for dataset, kind in ((clips, "encoded"), (pairs, "preference")):
            if dataset is not None and dataset.kind != kind:
                raise DataError(f"{dataset.folder}: kind {dataset.kind}, need {kind}")
        self.clips = Endless(clips, seed)
        self.pairs = None if pairs is None else Endless(pairs, seed)
        self.place, self.curriculum, self.seed = place, curriculum, seed
        self.batch_size, self.accumulation, self.rank = batch_size, accumulation, rank
        self.size = batch_size // (world * accumulation)  # B of one micro-batch

    def __getitem__(self, i: int) -> MicroBatch:
        step, part = divmod(i, self.accumulation)
        kind, batch = self.place(step)
        first = batch * self.batch_size + (self.rank * self.accumulation + part) * self.size
        positions = range(first, first + self.size)
        if kind == "sft":
            return self._clips(step, batch, positions)
        return self._pairs(step, kind, positions)

    def _clips(self, step: int, batch: int, positions: range) -> MicroBatch:
        # The curriculum counts supervised steps: preference epochs do not move it.
        probabilities = self.curriculum.probabilities(batch)
        dataset, clips, epochs = self.clips.dataset, [], []
        for epoch, i in (self.clips[position] for position in positions):
            u = uniform(self.seed, epoch, dataset.keys[i], "task")
            clips.append(read_clip(dataset, i, draw_task(probabilities, u)))
            epochs.append(epoch)
        return MicroBatch("sft", step, epochs, collate_clips(dataset, clips))

    def _pairs(self, step: int, kind: str, positions: range) -> MicroBatch:
        if self.pairs is None:
            raise ConfigError(f"schedule: {kind} at step {step}, but no pairs dataset is given")
        places = [self.pairs[position] for position in positions]
        dataset = self.pairs.dataset
        pair = collate_pairs(dataset, [read_pair(dataset, i) for _, i in places])
        epochs = [epoch for epoch, _ in places]
        return MicroBatch(kind, step, epochs, rejected_half(pair) if kind == "ndpo" else pair)
