"""Tensors of a safetensors member, in fp32."""

import math
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from echolab.data.member_reader import CHUNK, Pieces
from echolab.data.samples import Header, Shapes, check_like, check_shapes, header_of
from echolab.data.validate_member import Undecodable
from echolab.geometry import WAN, LatentGeometry

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

# Weights are stored with mean 1 as a rule; below this one a clip would hardly be trained on.
LEAST_WEIGHT = 1e-4
ROUNDING = 1e-3  # of a share that is stored in fp16 or bf16


def take_fp32(pieces: Pieces, wanted: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors that are wanted and there, by default all; raises Undecodable."""
    return take_listed(pieces, header_of(pieces), wanted)


def take_sample(
    pieces: Pieces,
    kind: str,
    like: Shapes,
    wanted: Collection[str] | None = None,
    geometry: LatentGeometry = WAN,
) -> dict[str, Tensor]:
    """Return the tensors of a sample in fp32, by default all.

    `like` are the shapes that the dataset's samples have.  Raises Undecodable for a tensor that is
    missing, does not fit the others or `like`, or holds values that cannot be trained on.
    """
    header = header_of(pieces)
    shapes = {name: tuple(shape) for name, (_, shape, _, _) in header.items()}
    check_shapes(kind, shapes, geometry)
    check_like(shapes, like)
    tensors = take_listed(pieces, header, wanted)
    for name, tensor in tensors.items():
        check_values(name, tensor)
    return tensors


def take_listed(
    pieces: Pieces, header: Header, wanted: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Return the tensors that are wanted and in `header`, by default all.

    Raises Undecodable, also for a value that is not finite in fp32.
    """
    found = {}
    for name, (dtype, shape, begin, end) in sorted(header.items(), key=lambda item: item[1][2]):
        if wanted is not None and name not in wanted:
            pieces.skip(end - begin)
            continue
        if dtype not in DTYPES:
            raise Undecodable(f"tensor {name}: {dtype} cannot be read")
        values, odd = _fp32(pieces, DTYPES[dtype], end - begin)
        if odd:
            raise Undecodable(f"tensor {name}: {odd} of {len(values)} values not finite")
        found[name] = values.reshape(shape)
    return found


def _fp32(pieces: Pieces, dtype: torch.dtype, size: int) -> tuple[Tensor, int]:
    """The next `size` bytes as numbers [N], and how many of them are not finite."""
    count, step = size // dtype.itemsize, CHUNK // dtype.itemsize
    # numpy asks the kernel for huge pages: of small ones, every clip would fault in thousands.
    values, odd = torch.from_numpy(np.empty(count, np.float32)), 0
    for first in range(0, count, step):
        due = min(step, count - first) * dtype.itemsize
        data = pieces.take(due)
        if len(data) < due:
            raise Undecodable(f"cut at byte {pieces.passed}")
        part = values[first : first + step].copy_(torch.from_numpy(data).view(dtype))
        # A sum is cheap while the piece is in the processor's cache, and no NaN is lost in it.
        if not math.isfinite(float(part.sum())):
            odd += int((~part.isfinite()).sum())
    return values, odd


def check_values(name: str, tensor: Tensor) -> None:
    """Raise Undecodable for weights or masks out of range; all values are finite by now."""
    if name == "weight" and (float(tensor.min()) < 0 or float(tensor.mean()) < LEAST_WEIGHT):
        low, mean = float(tensor.min()), float(tensor.mean())
        raise Undecodable(
            f"tensor weight: least {low:g}, mean {mean:g}; must be 0 or more everywhere, and "
            f"{LEAST_WEIGHT:g} or more on average, or nothing is learnt from it"
        )
    if name == "known" or name.startswith("known."):
        low, high = float(tensor.min()), float(tensor.max())
        if low < -ROUNDING or high > 1 + ROUNDING:
            raise Undecodable(f"tensor {name}: from {low:g} to {high:g}, must lie in [0, 1]")
