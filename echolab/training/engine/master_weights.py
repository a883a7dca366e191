"""The fp32 state that an optimizer updates, under plain PyTorch, DDP and ZeRO 1, 2 and 3.

A rank holds the tensors that its optimizer updates (`local`), and moments and averages in tensors
of the same shapes; `pieces` maps these tensors to slices of parameters.  With this map, a list of
weights, moments or averages is gathered to full tensors by parameter name (`full_tensor`), set from
full tensors (`fill`), and copied into the network (`show`).
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from echolab.errors import CheckpointError
from echolab.training import distributed

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """A contiguous slice of one parameter that this rank holds."""

    name: str  # name of the parameter
    group: int  # index of the local tensor
    offset: int  # start in the flattened local tensor
    start: int  # start in the flattened parameter
    numel: int


def shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the full parameter; under ZeRO 3 the tensor is empty between uses."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


class Masters:
    """fp32 weights and moments of one rank, unsharded: single process or DDP."""

    sharded = False  # whether the pieces are distributed over ranks

    def __init__(self, net: nn.Module, optimizer: Any) -> None:
        self.parameters: dict[str, Any] = {
            name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad
        }
        # Running statistics are saved, averaged and exported with the weights.
        self.buffers = {} if self.sharded else saved_buffers(net)
        self.parameters |= self.buffers
        # Tied parameters appear once, under their first name.
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.tied = {  # other names of trained parameters
            alias: names[id(parameter)]
            for alias, parameter in net.named_parameters(remove_duplicate=False)
            if parameter.requires_grad and alias not in self.parameters
        }
        self.zero = optimizer  # DeepSpeed's wrapper under ZeRO
        self.optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the full trained parameters, by name."""
        return {name: tuple(shape(parameter)) for name, parameter in self.parameters.items()}

    @property
    def keys(self) -> list[Tensor]:
        """The fp32 tensors that this rank's optimizer updates: the keys of its state."""
        return list(self.parameters.values())

    @property
    def local(self) -> list[Tensor]:
        """The data of `keys`."""
        return [tensor.data for tensor in self.keys]

    def flats(self, part: str) -> list[Tensor]:
        """Return this rank's tensors of MASTER or one of MOMENTS, laid out as `local`."""
        if part == MASTER:
            return self.local
        return [self.optimizer.state[key][part] for key in self.keys]

    @cached_property
    def pieces(self) -> list[Piece]:
        """The pieces of parameters that this rank holds, in the order of the network."""
        # `check_complete` reports parameters that the optimizer lacks.
        updated = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        updated |= {id(buffer) for buffer in self.buffers.values()}
        return [
            Piece(name, group, 0, 0, parameter.numel())
            for group, (name, parameter) in enumerate(self.parameters.items())
            if id(parameter) in updated
        ]

    def check_complete(self) -> None:
        """Raise CheckpointError for a trained parameter that the optimizer lacks; collective."""
        # Count the values in the optimizer, over all ranks.
        held = dict.fromkeys(self.parameters, 0)
        for piece in self.pieces:
            held[piece.name] += piece.numel
        counts = list(map(float, held.values()))
        if self.sharded:
            counts = distributed.sums(counts)
        for (name, parameter), count in zip(self.parameters.items(), counts, strict=True):
            if (numel := shape(parameter).numel()) != count:
                raise CheckpointError(
                    f"{name}: {numel} values are trained, the optimizer has {count:.0f} of them; "
                    "give it every parameter, or freeze those that are not trained"
                )

    def prepare(self) -> None:
        """Create the moments before the first step, so that they can be read and set."""
        # torch's optimizers count steps in a tensor, DeepSpeed's in an int.
        counts_in_tensor = type(self.optimizer).__module__.startswith("torch.")
        for tensor in self.keys:
            state = self.optimizer.state[tensor]
            if "exp_avg" not in state:
                zero = torch.zeros((), dtype=torch.float32, device=tensor.device)
                state["step"] = zero if counts_in_tensor else 0
                for name in MOMENTS:
                    state[name] = torch.zeros_like(tensor)

    @torch.no_grad()
    def average_buffers(self) -> None:
        """Set the buffers of all ranks to their mean, since each rank saw other clips; collective.

        The sums are fp64, so that equal values stay equal.
        """
        world = distributed.world()
        if not self.buffers or world == 1:
            return
        # One all-reduce for all buffers.
        flat = torch.cat([buffer.reshape(-1) for buffer in self.buffers.values()])
        total = torch.tensor(distributed.sums(flat.double().tolist()), dtype=torch.float64)
        mean = (total / world).to(flat.dtype)
        parts = mean.split([buffer.numel() for buffer in self.buffers.values()])
        for buffer, part in zip(self.buffers.values(), parts, strict=True):
            buffer.copy_(part.view_as(buffer))

    @property
    def updates(self) -> int:
        """Number of steps that the optimizer has made, as used in its bias correction."""
        return int(self.optimizer.state[self.keys[0]]["step"])

    @updates.setter
    def updates(self, count: int) -> None:
        for tensor in self.keys:
            state = self.optimizer.state[tensor]
            if isinstance(state["step"], Tensor):
                state["step"].fill_(count)
            else:
                state["step"] = count

    def full_tensor(self, name: str, flats: Sequence[Tensor]) -> Tensor:
        """Return a parameter's full tensor in `flats`, laid out as `local`; collective."""
        parameter = self.parameters[name]
        if not self.sharded:
            return flats[self.pieces_of(name)[0].group]
        # Each rank copies its pieces into zeros; the sum over ranks is the full tensor.
        bits = torch.zeros(shape(parameter).numel(), dtype=torch.int32, device=parameter.device)
        for piece in self.pieces_of(name):
            bits[piece.start : piece.start + piece.numel] = values(flats, piece).view(torch.int32)
        dist.all_reduce(bits)  # as integers: 0 + x preserves every bit, also of -0.0 and NaN
        return bits.view(torch.float32).view(shape(parameter))

    def pieces_of(self, name: str) -> list[Piece]:
        """Return this rank's pieces of one parameter; may be empty."""
        return self._by_name.get(name, [])

    @cached_property
    def _by_name(self) -> dict[str, list[Piece]]:
        pieces: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            pieces.setdefault(piece.name, []).append(piece)
        return pieces

    @torch.no_grad()
    def fill(self, flats: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Set this rank's pieces from full tensors by name; call `show` after setting masters."""
        for piece in self.pieces:
            # Read only this rank's slice of the full tensor.
            flat_values = tensors[piece.name].reshape(-1)
            values(flats, piece).copy_(flat_values[piece.start : piece.start + piece.numel])

    @torch.no_grad()
    def show(self, flats: Sequence[Tensor]) -> None:
        """Copy the values of `flats` into the network; collective if sharded."""
        # Copy one parameter at a time, so that only one full tensor is in memory.
        for name, parameter in self.parameters.items():
            self._set_parameter(parameter, self.full_tensor(name, flats))

    def _set_parameter(self, parameter: Any, full_tensor: Tensor) -> None:
        parameter.data.copy_(full_tensor)

    def snapshot(self) -> list[Tensor]:
        """Return a copy of the network's weights, which `show` overwrites, for `unshow`."""
        return [parameter.data.clone() for parameter in self.parameters.values()]

    @torch.no_grad()
    def unshow(self, saved: list[Tensor]) -> None:
        """Restore the network's weights from `snapshot`, bit-exactly."""
        # Copy the saved bits, since `show` may have rounded values.
        for parameter, saved_weight in zip(self.parameters.values(), saved, strict=True):
            parameter.data.copy_(saved_weight)


def saved_buffers(net: nn.Module) -> dict[str, Tensor]:
    """Return the floating-point buffers of a network's state, by name.

    Integer buffers are counters of batch norm, which no result depends on.
    """
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in net.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point() and name not in module._non_persistent_buffers_set
    }


class PartitionedMasters(Masters):
    """ZeRO 1 and 2: full weights on each rank, and one flat fp32 partition of each group."""

    sharded = True

    @property
    def keys(self) -> list[Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)

    @cached_property
    def pieces(self) -> list[Piece]:
        pieces = []
        for name, parameter in self.parameters.items():
            # DeepSpeed links each 16-bit parameter to its part of the fp32 partition.
            mapping = getattr(parameter, "_hp_mapping", None)  # None: held by other ranks
            if mapping is not None:
                fp32_address, bf16_address = (
                    mapping.hp_fragment_address,
                    mapping.lp_fragment_address,
                )
                group = mapping.param_group_index
                pieces.append(
                    Piece(name, group, fp32_address.start, bf16_address.start, fp32_address.numel)
                )
        return pieces


class ShardedMasters(Masters):
    """ZeRO 3: both weights and masters are partitioned."""

    sharded = True

    @property
    def keys(self) -> list[Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    @cached_property
    def pieces(self) -> list[Piece]:
        """The pieces of parameters that this rank holds, without the padding of the last rank."""
        pieces = []
        for name, parameter in self.parameters.items():
            position = self.zero.grad_position.get(self.zero.get_param_id(parameter))
            if position is not None:
                group, offset, longest = position
                # Ranks hold consecutive pieces of equal length.
                start = longest * dist.get_rank(group=parameter.ds_process_group)
                count = min(longest, parameter.ds_numel - start)
                if count > 0:
                    pieces.append(Piece(name, group, offset, start, count))
        return pieces

    def _set_parameter(self, parameter: Any, full_tensor: Tensor) -> None:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(full_tensor)

    def snapshot(self) -> list[Tensor]:
        return [parameter.ds_tensor.data.clone() for parameter in self.parameters.values()]

    @torch.no_grad()
    def unshow(self, saved: list[Tensor]) -> None:
        # `show` also brings all parameters back into ZeRO's partitioned state.
        self.show(self.local)
        for parameter, saved_weight in zip(self.parameters.values(), saved, strict=True):
            parameter.ds_tensor.data.copy_(saved_weight)


def values(flats: Sequence[Tensor], piece: Piece) -> Tensor:
    """Return a writable flat view of a piece's values."""
    return flats[piece.group].view(-1).narrow(0, piece.offset, piece.numel)


def masters_of(net: nn.Module, optimizer: Any) -> Masters:
    """Return the Masters for an optimizer, which under ZeRO is DeepSpeed's wrapper."""
    # Distinguish wrappers by attributes, since DeepSpeed has no common base class for them.
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return ShardedMasters(net, optimizer)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return PartitionedMasters(net, optimizer)
    return Masters(net, optimizer)
