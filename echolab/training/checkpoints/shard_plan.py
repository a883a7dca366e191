"""The files of a checkpoint: their tensors and offsets, the rank that writes each, collection."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from echolab.training import distributed
from echolab.training.engine.master_weights import Masters, values

WINDOW = 1 << 25  # values that travel at once: 128 MiB
ITEM = 4  # bytes of an fp32 value
Shapes = Mapping[str, tuple[int, ...]]


class File(NamedTuple):
    """One safetensors file: complete fp32 tensors, one after the other."""

    name: str
    part: str
    starts: dict[str, int]  # by parameter name, in values from the first
    numel: int  # values in all
    writer: int  # rank

    def header(self, shapes: Shapes) -> bytes:
        """Return what safetensors has before the values: a length, and JSON padded to 8 bytes."""
        entries = {
            name: {
                "dtype": "F32",
                "shape": list(shapes[name]),
                "data_offsets": [ITEM * start, ITEM * (start + math.prod(shapes[name]))],
            }
            for name, start in self.starts.items()
        }
        # The values start at a multiple of 8 bytes.
        text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":"))
        content = text.encode()
        content += b" " * (-len(content) % 8)
        return len(content).to_bytes(8, "little") + content


def _partition_names(shapes: Shapes, files: int) -> list[list[str]]:
    """Return the names in order, cut into at most `files` runs of about equal size."""
    sizes = {name: math.prod(dims) for name, dims in shapes.items()}
    # A name goes to the run in which the middle of its values lies.
    total, before = max(1, sum(sizes.values())), 0
    runs: dict[int, list[str]] = {}
    for name, size in sizes.items():
        runs.setdefault(min(files - 1, (before + size // 2) * files // total), []).append(name)
        before += size
    return list(runs.values())


def layout(shapes: Shapes, parts: Sequence[str], *, world: int, shard_bytes: int) -> list[File]:
    """Return the files of a checkpoint, in the order in which all ranks fill them.

    Each part is cut into equal files of about `shard_bytes` or less.  As many ranks write as there
    are `shard_bytes` in all, spread over the job so that several nodes write; a small network is
    written by rank 0 alone.  A pure function: every rank computes the same.
    """
    # As many writers as there is work for.
    bytes_of_part = ITEM * sum(map(math.prod, shapes.values()))
    writers = min(world, max(1, bytes_of_part * len(parts) // shard_bytes))
    count = math.ceil(bytes_of_part / shard_bytes)
    while count > 1 and count * len(parts) % writers:
        count += 1  # so that each writes as much
    # The same cut for each part, so that files of equal index hold the same parameters.
    runs = _partition_names(shapes, count)
    files: list[File] = []
    for part in parts:
        for number, names in enumerate(runs, 1):
            starts, count = {}, 0
            for name in names:
                starts[name] = count
                count += math.prod(shapes[name])
            name = f"{part}-{number:05d}-of-{len(runs):05d}.safetensors"
            writer = len(files) * writers // (len(parts) * len(runs)) * world // writers
            files.append(File(name, part, starts, count, writer))
    return files


def host_buffer(file: File, *, pinned: bool) -> Tensor:
    """Return fp32 memory for a file's values; if pinned, copies from a GPU are asynchronous.

    torch rounds pinned memory up to a power of two: files of just under one waste least.
    """
    return torch.empty(file.numel, dtype=torch.float32, pin_memory=pinned)


@torch.no_grad()
def gather(masters: Masters, flats: Sequence[Tensor], file: File, into: Tensor | None) -> None:
    """Fill `into`, on the rank that writes `file`, with the values of its parameters in `flats`.

    Collective if sharded.  A copy from a GPU may still be in flight afterwards: synchronize.
    """
    if masters.sharded:
        # In windows, so that the buffer of the reduction stays small.
        for first in range(0, file.numel, WINDOW):
            _reduce_window(masters, flats, file, into, first)
    elif into is not None:
        for name, start in file.starts.items():
            full_tensor = masters.full_tensor(name, flats).detach().reshape(-1)
            into[start : start + full_tensor.numel()].copy_(full_tensor, non_blocking=True)


def _reduce_window(
    masters: Masters, flats: Sequence[Tensor], file: File, into: Tensor | None, first: int
) -> None:
    """Collect the values first, first + 1, ... of a file: every rank adds its own to zeros."""
    last = min(first + WINDOW, file.numel)
    # As integers: 0 + x keeps every bit, of -0.0 and NaN too.
    bits = torch.zeros(last - first, dtype=torch.int32, device=distributed.device())
    for name, start in file.starts.items():
        for piece in masters.pieces_of(name):
            begin = start + piece.start
            low, high = max(begin, first), min(begin + piece.numel, last)
            if low < high:
                own = values(flats, piece)[low - begin : high - begin]
                bits[low - first : high - first].copy_(own.view(torch.int32), non_blocking=True)
    # Each value is held by exactly one rank, so that the sum is that value.
    if distributed.world() > 1:
        dist.reduce(bits, dst=file.writer)
    if into is not None:
        into[first:last].copy_(bits.view(torch.float32), non_blocking=True)
