"""What ranks tell each other.  All functions but `device` are collective; alone, the identity."""

from hashlib import blake2b

import torch
import torch.distributed as dist


def world() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process among them."""
    return dist.get_rank() if world() > 1 else 0


def device() -> torch.device:
    """Where tensors must lie to travel."""
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def sums(values: list[float]) -> list[float]:
    """Element by element over the ranks."""
    if world() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor)
    return tensor.tolist()


def largest(values: list[int]) -> list[int]:
    """Element by element over the ranks: the vote.  One rank is enough to stop all."""
    if world() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.int64, device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def agree(text: str) -> bool:
    """Whether all ranks say the same."""
    number = int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "little")
    highest, lowest = largest([number, -number])
    return highest == -lowest


def gather_text(text: str) -> list[str]:
    """What each rank says, by rank; as bytes, so that nothing is pickled."""
    if world() == 1:
        return [text]
    own = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8).to(device())
    sizes = [torch.zeros(1, dtype=torch.int64, device=device()) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(text.encode())], device=device()))
    lengths = [int(size) for size in sizes]
    padded = own.new_zeros(max(1, *lengths))
    padded[: len(own)] = own
    texts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(texts, padded)
    pairs = zip(texts, lengths, strict=True)
    return [bytes(t[:length].tolist()).decode() for t, length in pairs]


def raise_together(kind: type[Exception], fault: str) -> None:
    """Raise the first rank's fault ("": none) on every rank, so that none is left waiting."""
    for found in gather_text(fault):
        if found:
            raise kind(found)


def from_first(value: int) -> int:
    """What rank 0 says."""
    if world() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.int64, device=device())
    dist.broadcast(tensor, 0)
    return int(tensor)
