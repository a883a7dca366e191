"""What is trained and what is not, kept apart: the engine gets the trained network alone.

A frozen network inside the module tree would be wrapped, cut in pieces and saved; a reference that
shares weights with the policy follows it, and preference training then teaches nothing.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from echolab.errors import ConfigError
from echolab.models.frozen import Frozen


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
