"""From the samples of encoded and preference shards to batches.

Sample members (safetensors; read as fp32):

    encoded      latents [C, F, H, W], text [L, D], image [N, D], audio [2 T, D], face [P],
                 weight [1, F, H, W]; for each task but t2v: known.<task> [4, F, H, W] and
                 known_latents.<task> [C, F, H, W]
    preference   chosen and rejected in place of latents; known, known_latents of the one task that
                 the json member names

`samples` says what they must be.
"""

from collections.abc import Callable, Collection
from typing import TypeVar

import torch
from torch import Tensor

from echolab.data.member_reader import Pieces
from echolab.data.remote.download import FetchError
from echolab.data.samples import COMPARED, TRIED, Shapes, shapes_of, take_about, usual
from echolab.data.shard_reader import ShardDataset
from echolab.data.tensors import take_fp32, take_sample
from echolab.data.validate_member import Undecodable
from echolab.errors import DataError
from echolab.tasks.table import DEFAULT_TASK, TASK_TABLE
from echolab.types import Batch, Conditions, PreferencePair

KNOWN_WEIGHT = 0.1  # the known region is nearly given by the input: it teaches little
FEATURES = ("text", "image", "audio", "face")

Taken = TypeVar("Taken")


def place_weight(stored: Tensor, known: Tensor, known_weight: float = KNOWN_WEIGHT) -> Tensor:
    """Stored emphasis [1, F, H, W], less where places are known [4, F, H, W]; mean 1."""
    share = known.mean(0, keepdim=True)
    weight = stored * (1 - share + known_weight * share)
    return weight / weight.mean().clamp_min(1e-6)


def read_fp32(
    dataset: ShardDataset, i: int, wanted: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Tensors of sample `i` in fp32, by default all; raises DataError.

    What they must be to be trained on is not looked at: see `read_sample`.
    """
    return _take(dataset, i, "safetensors", lambda pieces: take_fp32(pieces, wanted))


def read_sample(
    dataset: ShardDataset, i: int, wanted: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Return tensors of sample `i` in fp32; raise DataError for one that cannot be trained on.

    All shapes are checked, and the values of what is read.
    """
    like = form_of(dataset)

    def take(pieces: Pieces) -> dict[str, Tensor]:
        return take_sample(pieces, dataset.kind, like, wanted, dataset.geometry)

    return _take(dataset, i, "safetensors", take)


def form_of(dataset: ShardDataset) -> Shapes:
    """Return the shapes by name that all samples must have: those of most of the first good ones.

    Raises DataError for the first sample if none of the first hundred is good.
    """
    if dataset.form is None:
        dataset.form = usual(_first_good(dataset))
    return dataset.form


def _first_good(dataset: ShardDataset) -> list[Shapes]:
    def shapes(pieces: Pieces) -> Shapes:
        return shapes_of(pieces, dataset.kind, dataset.geometry)

    found: list[Shapes] = []
    faults = []
    for i in range(min(len(dataset), TRIED)):
        try:
            found.append(_take(dataset, i, "safetensors", shapes))
        except FetchError:
            raise  # of a server, not of a sample
        except DataError as error:
            faults.append(error)
        if len(found) == COMPARED:
            break
    if not found and faults:
        raise faults[0]
    return found


def _take(dataset: ShardDataset, i: int, member: str, use: Callable[[Pieces], Taken]) -> Taken:
    """Return what `use` makes of a member of sample `i`; raise DataError."""
    key = dataset.keys[i]
    try:
        return dataset.take(i, member, use)
    except KeyError as error:
        raise DataError(
            f"{dataset.folder}: sample {key} has no member {error}; "
            "make the dataset with `python -m data_prep encode`"
        ) from error
    except Undecodable as error:
        raise DataError(f"{dataset.folder}: sample {key}: {error}; encode it again") from error


def read_tensors(dataset: ShardDataset, i: int) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors in fp32 and the json member of sample `i`; raises DataError as `read_sample`."""
    tensors = read_sample(dataset, i)
    if "json" not in dataset.sample(i).members:
        return tensors, {}
    return tensors, _take(dataset, i, "json", take_about)


def pick(dataset: ShardDataset, i: int, tensors: dict[str, Tensor], name: str) -> Tensor:
    """One tensor of a sample, or a DataError that names both."""
    if name not in tensors:
        raise DataError(
            f"{dataset.folder}: sample {dataset.keys[i]} holds no tensor {name!r}; "
            "encode the dataset again"
        )
    return tensors[name]


def _one(tensors: dict[str, Tensor], known: Tensor, known_latents: Tensor) -> Conditions:
    return Conditions(*(tensors[name] for name in FEATURES), known, known_latents)  # type: ignore[call-arg]


def read_clip(dataset: ShardDataset, i: int, task: str) -> Batch:
    """Sample `i` as a batch without its batch dimension, posed as `task`."""
    needed = ("latents", "weight", *FEATURES)
    has_known = TASK_TABLE[task].has_known
    posed = (f"known.{task}", f"known_latents.{task}") if has_known else ()
    tensors = read_sample(dataset, i, (*needed, *posed))
    latents = tensors["latents"]
    if not has_known:  # given words (and sound), no picture at all
        known = latents.new_zeros(dataset.geometry.time_stride, *latents.shape[1:])
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
    if torch.equal(tensors["chosen"], tensors["rejected"]):
        raise DataError(
            f"{dataset.folder}: sample {dataset.keys[i]}: chosen and rejected are the same clip, "
            "which teaches nothing; pack the pairs again without it"
        )
    conditions = _one(tensors, tensors["known"], tensors["known_latents"])
    weight = place_weight(tensors["weight"], tensors["known"])
    task, key = str(about.get("task", DEFAULT_TASK)), dataset.keys[i]
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
