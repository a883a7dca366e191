"""What is trained and what is not, kept apart: the engine gets the trained network alone.

A frozen network inside the module tree would be wrapped, cut in pieces and saved; a reference that
shares weights with the policy follows it, and preference training then teaches nothing.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from echolab.errors import ConfigError
from echolab.models.frozen import Frozen


class Inventory(NamedTuple):
    """Every parameter of a network, by name, in one of three lists."""

    trained: list[str]
    frozen: list[str]
    tied: dict[str, str]  # a further name of a parameter, and the first


def inventory(net: nn.Module) -> Inventory:
    """Names under which `net` holds its parameters, tied ones twice."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            tied[name] = known
    own = dict(net.named_parameters())
    return Inventory(
        [name for name, parameter in own.items() if parameter.requires_grad],
        [name for name, parameter in own.items() if not parameter.requires_grad],
        tied,
    )


def _storages(parameters: Iterable[tuple[str, Any]]) -> dict[int, str]:
    return {p.untyped_storage().data_ptr(): name for name, p in parameters if p.numel()}


def check_apart(net: nn.Module, frozen: Iterable[tuple[str, Frozen]]) -> None:
    """ConfigError where a frozen network is not frozen, or shares weights with `net`.

    `frozen` are networks by what they are called in a message.  Before the engine takes `net`:
    ZeRO 3 leaves its parameters empty.  Adapters switched off are no copy, and not for this.
    """
    if not any(p.requires_grad for p in net.parameters()):
        raise ConfigError("the network has nothing to train: all its parameters are frozen")
    own = _storages(net.named_parameters())
    for called, other in frozen:
        if other.net.training or any(p.requires_grad for p in other.net.parameters()):
            raise ConfigError(f"{called}: must be in eval mode and without gradients; freeze it")
        shared = own.keys() & _storages(other.net.named_parameters()).keys()
        if shared:
            raise ConfigError(
                f"{called}: shares {len(shared)} tensors with the trained network, "
                f"{own[min(shared)]} among them, and would follow it; give it a copy"
            )


def check_alone(module: nn.Module, net: nn.Module) -> None:
    """ConfigError where `module`, which the engine takes, holds parameters that are not `net`'s."""
    own = {id(p) for p in net.parameters()}
    for name, parameter in module.named_parameters():
        if id(parameter) not in own:
            raise ConfigError(
                f"{type(module).__name__}.{name}: is no parameter of the trained network; "
                "hold frozen networks outside the module tree, in models.frozen.Frozen"
            )
