"""The files of a checkpoint: tensors and offsets, the writing rank, and gathering of values."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from echolab.training import distributed
from echolab.training.engine.master_weights import Masters, values

WINDOW = 1 << 25  # values reduced at once: 128 MiB
ITEM = 4  # bytes per fp32 value
Shapes = Mapping[str, tuple[int, ...]]


class File(NamedTuple):
    """One safetensors file: complete fp32 tensors, one after the other."""

    name: str
    part: str
    starts: dict[str, int]  # offset of each parameter, in values
    numel: int  # total number of values
    writer: int  # rank that writes the file

    def header(self, shapes: Shapes) -> bytes:
        """Return the safetensors header: its length and JSON, padded to 8 bytes."""
        entries = {
            name: {
                "dtype": "F32",
                "shape": list(shapes[name]),
                "data_offsets": [ITEM * start, ITEM * (start + math.prod(shapes[name]))],
            }
            for name, start in self.starts.items()
        }
        # Pad the header, so that the values start at a multiple of 8 bytes.
        text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":"))
        content = text.encode()
        content += b" " * (-len(content) % 8)
        return len(content).to_bytes(8, "little") + content


def _partition_names(shapes: Shapes, files: int) -> list[list[str]]:
    """Split the names, in order, into at most `files` groups of about equal total size."""
    sizes = {name: math.prod(dims) for name, dims in shapes.items()}
    # A parameter belongs to the group that contains the middle of its values.
    total, offset = max(1, sum(sizes.values())), 0
    runs: dict[int, list[str]] = {}
    for name, size in sizes.items():
        runs.setdefault(min(files - 1, (offset + size // 2) * files // total), []).append(name)
        offset += size
    return list(runs.values())


def layout(shapes: Shapes, parts: Sequence[str], *, world: int, shard_bytes: int) -> list[File]:
    """Return the files of a checkpoint, in the order in which all ranks fill them.

    Each part is split into files of equal size, about `shard_bytes` or less.  The number of writing
    ranks is the total size / `shard_bytes`; they are spread over the job so that several nodes
    write, and rank 0 alone writes a small network.  A pure function: every rank computes the same.
    """
    # Use one writer per `shard_bytes`, up to the number of ranks.
    bytes_of_part = ITEM * sum(map(math.prod, shapes.values()))
    writers = min(world, max(1, bytes_of_part * len(parts) // shard_bytes))
    count = math.ceil(bytes_of_part / shard_bytes)
    while count > 1 and count * len(parts) % writers:
        count += 1  # until every writer gets the same number of files
    # Split all parts in the same way, so that files of equal index contain the same parameters.
    runs = _partition_names(shapes, count)
    files: list[File] = []
    for part in parts:
        for index, names in enumerate(runs, 1):
            starts, count = {}, 0
            for name in names:
                starts[name] = count
                count += math.prod(shapes[name])
            name = f"{part}-{index:05d}-of-{len(runs):05d}.safetensors"
            writer = len(files) * writers // (len(parts) * len(runs)) * world // writers
            files.append(File(name, part, starts, count, writer))
    return files


def host_buffer(file: File, *, pinned: bool) -> Tensor:
    """Allocate fp32 host memory for a file's values; if pinned, GPU copies are asynchronous.

    torch rounds pinned memory up to a power of two, so files just below one waste least.
    """
    return torch.empty(file.numel, dtype=torch.float32, pin_memory=pinned)


@torch.no_grad()
def gather(masters: Masters, flats: Sequence[Tensor], file: File, into: Tensor | None) -> None:
    """Fill `into`, on the rank that writes `file`, with the values of its parameters in `flats`.

    Collective if sharded.  Copies from a GPU are asynchronous: synchronize before reading `into`.
    """
    if masters.sharded:
        # Reduce in windows, to limit the size of the buffer.
        for first in range(0, file.numel, WINDOW):
            _reduce_window(masters, flats, file, into, first)
    elif into is not None:
        for name, start in file.starts.items():
            full_tensor = masters.full_tensor(name, flats).detach().reshape(-1)
            into[start : start + full_tensor.numel()].copy_(full_tensor, non_blocking=True)


def _reduce_window(
    masters: Masters, flats: Sequence[Tensor], file: File, into: Tensor | None, first: int
) -> None:
    """Gather one window of a file's values, from index `first` on, by a sum over ranks."""
    last = min(first + WINDOW, file.numel)
    # Sum as integers: 0 + x preserves every bit, also of -0.0 and NaN.
    bits = torch.zeros(last - first, dtype=torch.int32, device=distributed.device())
    for name, start in file.starts.items():
        for piece in masters.pieces_of(name):
            begin = start + piece.start
            low, high = max(begin, first), min(begin + piece.numel, last)
            if low < high:
                held = values(flats, piece)[low - begin : high - begin]
                bits[low - first : high - first].copy_(held.view(torch.int32), non_blocking=True)
    # Exactly one rank holds each value and the others add zero, so the sum is the value.
    if distributed.world() > 1:
        dist.reduce(bits, dst=file.writer)
    if into is not None:
        into[first:last].copy_(bits.view(torch.float32), non_blocking=True)
