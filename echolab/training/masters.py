"""The fp32 state that an optimizer updates, under plain PyTorch, DDP and ZeRO 1, 2 and 3.

Everything is reached by parameter name and whole (`read`, `write`), or as the flat pieces that this
rank owns (`local`), which an average can follow without any communication.  `read` and `show` are
collective: all ranks call them, in the same order.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


def shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter; under ZeRO 3 the tensor itself is empty between uses."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


class Masters:
    """fp32 weights and moments of one process, unsharded: single process or DDP."""

    def __init__(self, net: nn.Module, optimizer: Any) -> None:
        self.parameters: dict[str, Any] = {
            name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad
        }
        self.zero = optimizer  # DeepSpeed's wrapper, where there is one
        self.optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)

    @property
    def keys(self) -> list[Tensor]:
        """The fp32 tensors that this rank's optimizer updates, as they key its state."""
        return list(self.parameters.values())

    @property
    def local(self) -> list[Tensor]:
        """Their values."""
        return [tensor.data for tensor in self.keys]

    def prepare(self) -> None:
        """Make the moments that the first step would make, so that they can be read and written."""
        for tensor in self.keys:
            state = self.optimizer.state[tensor]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
                for name in MOMENTS:
                    state[name] = torch.zeros_like(tensor)

    @property
    def updates(self) -> int:
        """Steps that the optimizer has made, as its bias correction counts them."""
        return int(self.optimizer.state[self.keys[0]]["step"])

    @updates.setter
    def updates(self, count: int) -> None:
        for tensor in self.keys:
            self.optimizer.state[tensor]["step"].fill_(count)

    def _value(self, parameter: nn.Parameter, what: str) -> Tensor:
        return parameter.data if what == MASTER else self.optimizer.state[parameter][what]

    def read(self, what: str) -> Iterator[tuple[str, Tensor]]:
        """(name, whole fp32 tensor on the CPU) of the masters or a moment, name by name."""
        for name, parameter in self.parameters.items():
            yield name, self._value(parameter, what).detach().to("cpu", torch.float32, copy=True)

    @torch.no_grad()
    def write(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        """Set the masters or a moment from whole tensors by name; then `show` the masters."""
        for name, parameter in self.parameters.items():
            self._value(parameter, what).copy_(tensors[name])

    def show(self) -> None:
        """Bring the network's own weights in line with the masters; here they are the same."""

    def snapshot(self) -> list[Tensor]:
        """What `show` overwrites, to be given back to `unshow`."""
        return []

    def unshow(self, saved: list[Tensor]) -> None:
        """Put back the network's own weights, bit for bit."""


class PartitionedMasters(Masters):
    """ZeRO 1 and 2: whole weights on each rank, one flat fp32 partition of each group."""

    @property
    def keys(self) -> list[Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)

    def _piece(self, parameter: Any, what: str) -> tuple[Tensor, int] | None:
        """This rank's piece of a parameter, and where it starts in it; None if it has none."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        partition = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
        flat = partition.data if what == MASTER else self.optimizer.state[partition][what]
        address = mapping.hp_fragment_address
        return flat.narrow(0, address.start, address.numel), mapping.lp_fragment_address.start

    def _whole(self, parameter: nn.Parameter, what: str) -> Tensor:
        flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if found := self._piece(parameter, what):
            piece, start = found
            flat.narrow(0, start, piece.numel()).copy_(piece)
        dist.all_reduce(flat)
        return flat.view_as(parameter)

    def read(self, what: str) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.parameters.items():
            yield name, self._whole(parameter, what).cpu()

    @torch.no_grad()
    def write(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            if found := self._piece(parameter, what):
                piece, start = found
                piece.copy_(tensors[name].flatten().narrow(0, start, piece.numel()))

    @torch.no_grad()
    def show(self) -> None:
        for parameter in self.parameters.values():
            parameter.data.copy_(self._whole(parameter, MASTER))

    def snapshot(self) -> list[Tensor]:
        return [parameter.data.clone() for parameter in self.parameters.values()]

    def unshow(self, saved: list[Tensor]) -> None:
        for parameter, values in zip(self.parameters.values(), saved, strict=True):
            parameter.data.copy_(values)


class ShardedMasters(Masters):
    """ZeRO 3: weights and masters both in pieces."""

    @property
    def keys(self) -> list[Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    def _whole(self, parameter: Any, what: str) -> Tensor:
        flat = self.zero.get_full_hp_param(parameter, None if what == MASTER else what)
        return flat.detach().reshape(shape(parameter))

    def read(self, what: str) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.parameters.items():
            yield name, self._whole(parameter, what).to("cpu", copy=True)

    @torch.no_grad()
    def write(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            piece = self.zero.get_local_fp32_param(parameter, None if what == MASTER else what)
            values = tensors[name].flatten()[piece.numel() * dist.get_rank() :][: piece.numel()]
            piece[: values.numel()].copy_(values)  # the last rank's piece is longer than its share

    @torch.no_grad()
    def show(self) -> None:
        import deepspeed

        for parameter in self.parameters.values():
            whole = self._whole(parameter, MASTER)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(whole)

    def snapshot(self) -> list[Tensor]:
        return [parameter.ds_tensor.data.clone() for parameter in self.parameters.values()]

    @torch.no_grad()
    def unshow(self, saved: list[Tensor]) -> None:
        self.show()  # the masters are back: this cuts whole parameters, and gathers kept ones
        for parameter, values in zip(self.parameters.values(), saved, strict=True):
            parameter.ds_tensor.data.copy_(values)


def masters_of(net: nn.Module, optimizer: Any) -> Masters:
    """The right kind for an optimizer, which under ZeRO is DeepSpeed's wrapper."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return ShardedMasters(net, optimizer)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return PartitionedMasters(net, optimizer)
    return Masters(net, optimizer)
