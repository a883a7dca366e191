"""Frozen networks, used for inference only: references, encoders, judges."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Frozen:
    """Calls `net` without gradients, in eval mode.

    It is not an nn.Module, so that a module with a Frozen attribute neither trains, moves nor saves
    `net`.  `net` is frozen in place; pass a copy if the network is still trained.
    """

    def __init__(self, net: nn.Module):
        self.net = net.eval().requires_grad_(False)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Set all weights by parameter name; assign instead of copying on the meta device.

        Tensors of a memory-mapped file are then shared by all ranks of a node.
        """
        on_meta = any(parameter.is_meta for parameter in self.net.parameters())
        self.net.load_state_dict(weights, assign=on_meta)

    def to(self, device: torch.device | str) -> "Frozen":
        """Move `net` to a device; moving the module that owns this object does not move `net`."""
        self.net.to(device)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of `net`, without gradients."""
        with torch.no_grad():
            return self.net(*args, **kwargs)
