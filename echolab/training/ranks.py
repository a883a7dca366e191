"""What ranks tell each other.  Every function is collective, and the identity on one process."""

from hashlib import blake2b

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process among them."""
    return dist.get_rank() if world() > 1 else 0


def _device() -> torch.device:
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def sums(values: list[float]) -> list[float]:
    """Element by element over the ranks."""
    if world() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(tensor)
    return tensor.tolist()


def largest(values: list[int]) -> list[int]:
    """Element by element over the ranks: the vote.  One rank is enough to stop all."""
    if world() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.int64, device=_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def agree(text: str) -> bool:
    """Whether all ranks say the same."""
    number = int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "little")
    highest, lowest = largest([number, -number])
    return highest == -lowest


def from_first(value: int) -> int:
    """What rank 0 says."""
    if world() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.int64, device=_device())
    dist.broadcast(tensor, 0)
    return int(tensor)


def mean(value: Tensor) -> Tensor:
    """Of a tensor over the ranks; for `across_ranks` of the preference objectives."""
    if world() == 1:
        return value
    total = value.detach().clone().to(_device())
    dist.all_reduce(total)
    return total.to(value.device) / world()
