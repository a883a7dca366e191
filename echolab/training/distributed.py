"""Collective operations, each the identity on a single rank; and the rank, size and device."""

from collections.abc import Mapping
from hashlib import blake2b

import torch
import torch.distributed as dist


def world() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if world() > 1 else 0


def device() -> torch.device:
    """Return the device on which the backend needs its tensors."""
    # NCCL communicates only GPU tensors.
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def sums(values: list[float]) -> list[float]:
    """Sum over the ranks, element by element."""
    if world() == 1:
        return values
    # Use fp64, which is precise enough for counts and sums of losses on any number of ranks.
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor)
    return tensor.tolist()


def total(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the ranks; return it on the CPU."""
    if world() == 1:
        return tensor.cpu()
    summed = tensor.detach().to(device(), copy=True)
    dist.all_reduce(summed)
    return summed.cpu()


def largest(values: list[int]) -> list[int]:
    """Return the maximum over the ranks, element by element."""
    if world() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.int64, device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def agree(text: str) -> bool:
    """Return whether all ranks pass the same text."""
    # Hashes are equal on all ranks if their maximum equals their minimum.
    text_hash = int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "little")
    highest, lowest = largest([text_hash, -text_hash])
    return highest == -lowest


def gather_text(text: str) -> list[str]:
    """Return the text of each rank, by rank; sent as bytes, without pickle."""
    if world() == 1:
        return [text]
    # Gather the lengths, then the texts padded to the longest.
    encoded = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8).to(device())
    sizes = [torch.zeros(1, dtype=torch.int64, device=device()) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(text.encode())], device=device()))
    lengths = [int(size) for size in sizes]
    padded = encoded.new_zeros(max(1, *lengths))
    padded[: len(encoded)] = encoded
    texts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(texts, padded)
    pairs = zip(texts, lengths, strict=True)
    return [bytes(t[:length].tolist()).decode() for t, length in pairs]


def raise_together(kind: type[Exception], fault: str) -> None:
    """Raise the first nonempty `fault` of any rank on all ranks, so that no rank waits forever."""
    for message in gather_text(fault):
        if message:
            raise kind(message)


def from_first(value: int) -> int:
    """Return the value of rank 0."""
    if world() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.int64, device=device())
    dist.broadcast(tensor, 0)
    return int(tensor)


def means(totals: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """Return the mean over all ranks for each name, given (sum, count) of this rank.

    Names with a count of zero on all ranks are omitted.
    """
    names = sorted(totals)
    flat = sums([float(x) for name in names for x in totals[name]])
    pairs = zip(names, flat[::2], flat[1::2], strict=True)
    return {name: total / count for name, total, count in pairs if count}
