"""Read the samples of encoded and preference shards as fp32 tensors, and collate them to batches.

Sample members (safetensors):

    encoded      latents [C, F, H, W], text [L, D], image [N, D], audio [2 T, D], face [P],
                 weight [1, F, H, W]; for each task but t2v: known.<task> [4, F, H, W] and
                 known_latents.<task> [C, F, H, W]
    preference   chosen and rejected in place of latents; known, known_latents of the one task that
                 the json member names

`samples` says which shapes they must have.
"""

import math
from collections.abc import Callable, Collection
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from echolab.data.download import FetchError
from echolab.data.samples import (
    CHUNK,
    COMPARED,
    TRIED,
    Header,
    MemberError,
    MemberReader,
    Shapes,
    check_same_shapes,
    check_shapes,
    most_common_shapes,
    read_header,
    read_metadata,
    shapes_of,
)
from echolab.data.shard_reader import ShardDataset
from echolab.errors import DataError
from echolab.geometry import WAN, LatentGeometry
from echolab.tasks.table import DEFAULT_TASK, TASK_TABLE
from echolab.types import Batch, Conditions, PreferencePair

KNOWN_WEIGHT = 0.1  # the known region is nearly given by the input: it teaches little
FEATURES = ("text", "image", "audio", "face")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

# Weights are usually stored with mean 1; below this mean a clip would hardly be trained on.
MIN_MEAN_WEIGHT = 1e-4
ROUNDING = 1e-3  # of a mask that is stored in fp16 or bf16

Result = TypeVar("Result")


# Tensors of one member


def take_fp32(member: MemberReader, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Return the named tensors that are there, by default all; raise MemberError."""
    return take_listed(member, read_header(member), names)


def take_sample(
    member: MemberReader,
    kind: str,
    common: Shapes,
    names: Collection[str] | None = None,
    geometry: LatentGeometry = WAN,
) -> dict[str, Tensor]:
    """Return the tensors of a sample in fp32, by default all.

    `common` are the shapes that the dataset's samples have.  Raises MemberError for a tensor that
    is missing, does not fit the others or `common`, or holds values that cannot be trained on.
    """
    # The header first: a wrong shape is refused before a byte of a tensor is read.
    header = read_header(member)
    shapes = {name: tuple(shape) for name, (_, shape, _, _) in header.items()}
    check_shapes(kind, shapes, geometry)
    check_same_shapes(shapes, common)
    tensors = take_listed(member, header, names)
    for name, tensor in tensors.items():
        check_values(name, tensor)
    return tensors


def take_listed(
    member: MemberReader, header: Header, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Return the named tensors that are in `header`, by default all.

    Raises MemberError, also for a value that is not finite in fp32.
    """
    # In the order of the bytes, so that the member is read from front to back.
    tensors = {}
    for name, (dtype, shape, begin, end) in sorted(header.items(), key=lambda item: item[1][2]):
        if names is not None and name not in names:
            member.skip(end - begin)
            continue
        if dtype not in DTYPES:
            raise MemberError(f"tensor {name}: {dtype} cannot be read")
        values, nonfinite = _take_values(member, DTYPES[dtype], end - begin)
        if nonfinite:
            raise MemberError(f"tensor {name}: {nonfinite} of {len(values)} values not finite")
        tensors[name] = values.reshape(shape)
    return tensors


def _take_values(member: MemberReader, dtype: torch.dtype, size: int) -> tuple[Tensor, int]:
    """Return the next `size` bytes as fp32 [N], and the number of nonfinite values."""
    count, step = size // dtype.itemsize, CHUNK // dtype.itemsize
    # numpy asks the kernel for huge pages: with small ones, every clip would fault in thousands.
    values, nonfinite = torch.from_numpy(np.empty(count, np.float32)), 0
    for first in range(0, count, step):
        chunk_bytes = min(step, count - first) * dtype.itemsize
        data = member.take(chunk_bytes)
        if len(data) < chunk_bytes:
            raise MemberError(f"cut at byte {member.position}")
        part = values[first : first + step].copy_(torch.from_numpy(data).view(dtype))
        # A sum is cheap while the chunk is in the processor's cache, and no NaN is lost in it.
        if not math.isfinite(float(part.sum())):
            nonfinite += int((~part.isfinite()).sum())
    return values, nonfinite


def check_values(name: str, tensor: Tensor) -> None:
    """Raise MemberError for weights or masks out of range; all values are finite already."""
    if name == "weight" and (float(tensor.min()) < 0 or float(tensor.mean()) < MIN_MEAN_WEIGHT):
        low, mean = float(tensor.min()), float(tensor.mean())
        raise MemberError(
            f"tensor weight: minimum {low:g}, mean {mean:g}; must be 0 or more everywhere, and "
            f"{MIN_MEAN_WEIGHT:g} or more on average, or nothing is learned from it"
        )
    if name == "known" or name.startswith("known."):
        low, high = float(tensor.min()), float(tensor.max())
        if low < -ROUNDING or high > 1 + ROUNDING:
            raise MemberError(f"tensor {name}: from {low:g} to {high:g}, must lie in [0, 1]")


# Samples of a dataset


def _take(
    dataset: ShardDataset, i: int, name: str, use: Callable[[MemberReader], Result]
) -> Result:
    """Return `use` of a member of sample `i`; raise DataError."""
    key = dataset.keys[i]
    try:
        return dataset.take(i, name, use)
    except KeyError as error:
        raise DataError(
            f"{dataset.folder}: sample {key} has no member {error}; "
            "make the dataset with `python -m data_prep encode`"
        ) from error
    except MemberError as error:
        raise DataError(f"{dataset.folder}: sample {key}: {error}; encode it again") from error


def read_fp32(
    dataset: ShardDataset, i: int, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Return tensors of sample `i` in fp32, by default all; raise DataError.

    Shapes and ranges are not checked: see `read_sample`.
    """
    return _take(dataset, i, "safetensors", lambda member: take_fp32(member, names))


def read_sample(
    dataset: ShardDataset, i: int, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Return tensors of sample `i` in fp32; raise DataError for one that cannot be trained on.

    All shapes are checked, and the values of what is read.
    """
    common = common_shapes(dataset)

    def take(member: MemberReader) -> dict[str, Tensor]:
        return take_sample(member, dataset.kind, common, names, dataset.geometry)

    return _take(dataset, i, "safetensors", take)


def common_shapes(dataset: ShardDataset) -> Shapes:
    """Return the shapes by name that all samples must have: those of most of the first good ones.

    Raises DataError for the first sample if none of the first hundred is good.
    """
    if dataset.common_shapes is None:
        dataset.common_shapes = most_common_shapes(_first_shapes(dataset))
    return dataset.common_shapes


def _first_shapes(dataset: ShardDataset) -> list[Shapes]:
    def read_shapes(member: MemberReader) -> Shapes:
        return shapes_of(member, dataset.kind, dataset.geometry)

    # Some samples may be bad: take the shapes of the first few good ones.
    shapes: list[Shapes] = []
    faults = []
    for i in range(min(len(dataset), TRIED)):
        try:
            shapes.append(_take(dataset, i, "safetensors", read_shapes))
        except FetchError:
            raise  # of a server, not of a sample
        except DataError as error:
            faults.append(error)
        if len(shapes) == COMPARED:
            break
    if not shapes and faults:
        raise faults[0]
    return shapes


def read_tensors(dataset: ShardDataset, i: int) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return tensors in fp32 and the json member of sample `i`; raise DataError."""
    tensors = read_sample(dataset, i)
    if "json" not in dataset.sample(i).members:
        return tensors, {}
    return tensors, _take(dataset, i, "json", read_metadata)


def _select(dataset: ShardDataset, i: int, tensors: dict[str, Tensor], name: str) -> Tensor:
    """Return one tensor of a sample; raise DataError that names both."""
    if name not in tensors:
        raise DataError(
            f"{dataset.folder}: sample {dataset.keys[i]} holds no tensor {name!r}; add its "
            f"task with `python -m data_prep encode SOURCE NEW encoded={dataset.folder}`"
        )
    return tensors[name]


def _conditions(tensors: dict[str, Tensor], known: Tensor, known_latents: Tensor) -> Conditions:
    return Conditions(*(tensors[name] for name in FEATURES), known, known_latents)  # type: ignore[call-arg]


def position_weight(stored: Tensor, known: Tensor, known_weight: float = KNOWN_WEIGHT) -> Tensor:
    """Return the stored weight [1, F, H, W], less at known positions [4, F, H, W]; mean 1."""
    # The known part needs no generation, so its error counts less.
    fraction = known.mean(0, keepdim=True)
    weight = stored * (1 - fraction + known_weight * fraction)
    return weight / weight.mean().clamp_min(1e-6)


def read_clip(dataset: ShardDataset, i: int, task: str) -> Batch:
    """Return sample `i` with the known region of `task`, as a batch without its first dimension."""
    # Read the known latents of this task alone: those of the others are most of a sample.
    has_known = TASK_TABLE[task].has_known
    known_names = (f"known.{task}", f"known_latents.{task}") if has_known else ()
    tensors = read_sample(dataset, i, ("latents", "weight", *FEATURES, *known_names))
    latents = tensors["latents"]
    if has_known:
        known = _select(dataset, i, tensors, f"known.{task}")
        known_latents = _select(dataset, i, tensors, f"known_latents.{task}")
    else:  # from text (and audio) alone, without any image
        known = latents.new_zeros(dataset.geometry.time_stride, *latents.shape[1:])
        known_latents = torch.zeros_like(latents)
        tensors["image"] = torch.zeros_like(tensors["image"])
    conditions = _conditions(tensors, known, known_latents)
    weight = position_weight(tensors["weight"], known)
    return Batch(latents, conditions, weight, [task], [dataset.keys[i]])


def read_pair(dataset: ShardDataset, i: int) -> PreferencePair:
    """Return sample `i` of a preference dataset, without batch dimension; raise DataError."""
    tensors, metadata = read_tensors(dataset, i)
    chosen, rejected, known = tensors["chosen"], tensors["rejected"], tensors["known"]
    # Two equal clips have no preference, so their loss would only add noise.
    if torch.equal(chosen, rejected):
        raise DataError(
            f"{dataset.folder}: sample {dataset.keys[i]}: chosen and rejected are the same clip, "
            "which teaches nothing; pack the pairs again without it"
        )
    conditions = _conditions(tensors, known, tensors["known_latents"])
    weight = position_weight(tensors["weight"], known)
    task, key = str(metadata.get("task", DEFAULT_TASK)), dataset.keys[i]
    return PreferencePair(chosen, rejected, conditions, weight, [task], [key])


# Batches


def _stack(dataset: ShardDataset, name: str, parts: list[Tensor]) -> Tensor:
    # Name the tensor and the remedy, which torch's own error does not.
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
    """Return clips without a batch dimension as one batch; raise DataError if sizes differ."""
    # Sampled tasks differ between clips, so each clip of a batch may have a task of its own.
    return Batch(
        _stack(dataset, "latents", [clip.latents for clip in clips]),
        _collate_conditions(dataset, [clip.conditions for clip in clips]),
        _stack(dataset, "weight", [clip.weight for clip in clips]),
        [task for clip in clips for task in clip.tasks],
        [key for clip in clips for key in clip.keys],
    )


def collate_pairs(dataset: ShardDataset, pairs: list[PreferencePair]) -> PreferencePair:
    """Return pairs without a batch dimension as one batch; raise DataError if sizes differ."""
    return PreferencePair(
        _stack(dataset, "chosen", [pair.chosen for pair in pairs]),
        _stack(dataset, "rejected", [pair.rejected for pair in pairs]),
        _collate_conditions(dataset, [pair.conditions for pair in pairs]),
        _stack(dataset, "weight", [pair.weight for pair in pairs]),
        [task for pair in pairs for task in pair.tasks],
        [key for pair in pairs for key in pair.keys],
    )


def rejected_half(pair: PreferencePair) -> Batch:
    """Return the rejected clips of a batch of pairs, for negative preference."""
    return Batch(pair.rejected, pair.conditions, pair.weight, pair.tasks, pair.keys)
