"""Whole tensors from every rank's pieces, into the host memory of the rank that writes them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from echolab.training import distributed
from echolab.training.checkpoints.shard_plan import File
from echolab.training.engine.master_weights import Masters, values

WINDOW = 1 << 25  # values that travel at once: 128 MiB


def host_buffer(file: File, *, pinned: bool) -> Tensor:
    """fp32 memory for a file's values; pinned, copies from a GPU are fast and run alone.

    torch rounds pinned memory up to a power of two: files of just under one waste least.
    """
    return torch.empty(file.numel, dtype=torch.float32, pin_memory=pinned)


@torch.no_grad()
def gather(masters: Masters, flats: Sequence[Tensor], file: File, into: Tensor | None) -> None:
    """Fill `into`, on the rank that writes `file`, with the values of its parameters in `flats`.

    Collective where sharded.  A copy from a GPU may still be under way afterwards: synchronise.
    """
    if masters.sharded:
        for first in range(0, file.numel, WINDOW):
            _reduce(masters, flats, file, into, first)
    elif into is not None:
        for name, start in file.starts.items():
            whole = masters.whole(name, flats).detach().reshape(-1)
            into[start : start + whole.numel()].copy_(whole, non_blocking=True)


def _reduce(
    masters: Masters, flats: Sequence[Tensor], file: File, into: Tensor | None, first: int
) -> None:
    """The values first, first + 1, ... of a file: every rank adds its own to zeros."""
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
    if distributed.world() > 1:
        dist.reduce(bits, dst=file.writer)
    if into is not None:
        into[first:last].copy_(bits.view(torch.float32), non_blocking=True)
