"""Read the samples of encoded and preference shards as fp32 tensors, and collate batches.

Sample members (safetensors):

    encoded      latents [C, F, H, W], text [L, D], image [N, D], audio [2 T, D], face [P],
                 weight [1, F, H, W]; for each task but t2v: known.<task> [4, F, H, W] and
                 known_latents.<task> [C, F, H, W]
    preference   chosen and rejected instead of latents; known, known_latents of the single task
                 that the json member names

`samples` defines the shapes.
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
from echolab.types import Batch, Conditions, PreferencePair, SyncBatch

KNOWN_WEIGHT = 0.1  # loss weight of the known region, which the input nearly determines
FEATURES = ("text", "image", "audio", "face")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

# Weights normally have mean 1; a clip below this mean would hardly contribute to training.
MIN_MEAN_WEIGHT = 1e-4
ROUNDING = 1e-3  # tolerance for the rounding of masks stored in fp16 or bf16

Result = TypeVar("Result")


# Tensors of one member


def take_fp32(member: MemberReader, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Return those of the named tensors that exist, by default all; raise MemberError."""
    return take_listed(member, read_header(member), names)


def take_sample(
    member: MemberReader,
    kind: str,
    common: Shapes,
    names: Collection[str] | None = None,
    geometry: LatentGeometry = WAN,
) -> dict[str, Tensor]:
    """Return the tensors of a sample in fp32, by default all.

    `common` holds the shapes of the dataset's samples.  Raise MemberError for a tensor that is
    missing, whose shape contradicts the others or `common`, or whose values are unusable.
    """
    # Check the header first, so that a wrong shape is refused before any tensor is read.
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

    Raise MemberError, also for a value that is not finite in fp32.
    """
    # Sort by byte offset, so that the member is read sequentially.
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
    # numpy requests huge pages from the kernel, which avoids thousands of page faults per clip.
    values, nonfinite = torch.from_numpy(np.empty(count, np.float32)), 0
    for first in range(0, count, step):
        chunk_bytes = min(step, count - first) * dtype.itemsize
        data = member.take(chunk_bytes)
        if len(data) < chunk_bytes:
            raise MemberError(f"cut at byte {member.position}")
        part = values[first : first + step].copy_(torch.from_numpy(data).view(dtype))
        # A sum is cheap while the chunk is in the CPU cache, and it propagates every NaN.
        if not math.isfinite(float(part.sum())):
            nonfinite += int((~part.isfinite()).sum())
    return values, nonfinite


def check_values(name: str, tensor: Tensor) -> None:
    """Raise MemberError for weights or masks out of range; expect finite values."""
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


def _use_member(
    dataset: ShardDataset, i: int, name: str, use: Callable[[MemberReader], Result]
) -> Result:
    """Return `use(member)` for one member of sample `i`; raise DataError."""
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

    Do not check shapes and ranges, unlike `read_sample`.
    """
    return _use_member(dataset, i, "safetensors", lambda member: take_fp32(member, names))


def read_sample(
    dataset: ShardDataset, i: int, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Return tensors of sample `i` in fp32; raise DataError for an unusable sample.

    Check all shapes, and the values of the tensors that are read.
    """
    common = common_shapes(dataset)

    def take(member: MemberReader) -> dict[str, Tensor]:
        return take_sample(member, dataset.kind, common, names, dataset.geometry)

    return _use_member(dataset, i, "safetensors", take)


def common_shapes(dataset: ShardDataset) -> Shapes:
    """Return the required shapes by name: the most common ones of the first good samples.

    Raise the DataError of the first sample if none of the first hundred samples is good.
    """
    if dataset.common_shapes is None:
        dataset.common_shapes = most_common_shapes(_first_shapes(dataset))
    return dataset.common_shapes


def _first_shapes(dataset: ShardDataset) -> list[Shapes]:
    def read_shapes(member: MemberReader) -> Shapes:
        return shapes_of(member, dataset.kind, dataset.geometry)

    # Some samples may be bad: use the shapes of the first few good samples.
    shapes: list[Shapes] = []
    faults = []
    for i in range(min(len(dataset), TRIED)):
        try:
            shapes.append(_use_member(dataset, i, "safetensors", read_shapes))
        except FetchError:
            raise  # a failure of the server, not of a sample
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
    return tensors, _use_member(dataset, i, "json", read_metadata)


def _select(dataset: ShardDataset, i: int, tensors: dict[str, Tensor], name: str) -> Tensor:
    """Return one tensor of a sample; raise a DataError that names tensor and sample."""
    if name not in tensors:
        raise DataError(
            f"{dataset.folder}: sample {dataset.keys[i]} holds no tensor {name!r}; add its "
            f"task with `python -m data_prep encode SOURCE NEW encoded={dataset.folder}`"
        )
    return tensors[name]


def _conditions(tensors: dict[str, Tensor], known: Tensor, known_latents: Tensor) -> Conditions:
    return Conditions(*(tensors[name] for name in FEATURES), known, known_latents)  # type: ignore[call-arg]


def position_weight(stored: Tensor, known: Tensor, known_weight: float = KNOWN_WEIGHT) -> Tensor:
    """Return the loss weight [1, F, H, W], mean 1, reduced where `known` [4, F, H, W] is set."""
    # The known part is not generated, so its error counts less.
    fraction = known.mean(0, keepdim=True)
    weight = stored * (1 - fraction + known_weight * fraction)
    return weight / weight.mean().clamp_min(1e-6)


def read_clip(dataset: ShardDataset, i: int, task: str) -> Batch:
    """Return sample `i` with the known region of `task`, as a batch without its first dimension."""
    # Read only the known latents of this task: all tasks together are most of a sample's bytes.
    has_known = TASK_TABLE[task].has_known
    known_names = (f"known.{task}", f"known_latents.{task}") if has_known else ()
    tensors = read_sample(dataset, i, ("latents", "weight", *FEATURES, *known_names))
    latents = tensors["latents"]
    if has_known:
        known = _select(dataset, i, tensors, f"known.{task}")
        known_latents = _select(dataset, i, tensors, f"known_latents.{task}")
    else:  # generate from text and audio alone, without an image
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
    # Equal clips carry no preference, so their loss would only add noise.
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
    # Unlike torch's error, name the tensor and the remedy.
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
    # Tasks are sampled per clip, so a batch may mix tasks.
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


def collate_talkers(dataset: ShardDataset, talkers: list[SyncBatch]) -> SyncBatch:
    """Return spans of talkers, without a batch dimension, as one batch."""
    return SyncBatch(
        _stack(dataset, "crops", [talker.crops for talker in talkers]),
        _stack(dataset, "cepstra", [talker.cepstra for talker in talkers]),
        [key for talker in talkers for key in talker.keys],
    )


def rejected_half(pair: PreferencePair) -> Batch:
    """Return the rejected clips of a batch of pairs, for negative preference."""
    return Batch(pair.rejected, pair.conditions, pair.weight, pair.tasks, pair.keys)
