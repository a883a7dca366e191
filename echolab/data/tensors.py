"""Tensors of a safetensors member, in fp32."""

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from echolab.data.contents import Undecodable, tensor_header
from echolab.data.pieces import CHUNK, Pieces

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def take_fp32(pieces: Pieces, wanted: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors that are wanted and there, by default all; raises Undecodable."""
    header = tensor_header(lambda _, size: pieces.take(size).tobytes(), pieces.size)
    found = {}
    for name, (dtype, shape, begin, end) in sorted(header.items(), key=lambda item: item[1][2]):
        if wanted is not None and name not in wanted:
            pieces.skip(end - begin)
            continue
        if dtype not in DTYPES:
            raise Undecodable(f"tensor {name}: {dtype} cannot be read")
        found[name] = _fp32(pieces, DTYPES[dtype], end - begin).reshape(shape)
    return found


def _fp32(pieces: Pieces, dtype: torch.dtype, size: int) -> Tensor:
    """The next `size` bytes as numbers [N]."""
    count, step = size // dtype.itemsize, CHUNK // dtype.itemsize
    # numpy asks the kernel for huge pages: of small ones, every clip would fault in thousands.
    values = torch.from_numpy(np.empty(count, np.float32))
    for first in range(0, count, step):
        due = min(step, count - first) * dtype.itemsize
        data = pieces.take(due)
        if len(data) < due:
            raise Undecodable(f"cut at byte {pieces.passed}")
        values[first : first + step].copy_(torch.from_numpy(data).view(dtype))
    return values
