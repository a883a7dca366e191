"""Frozen networks, which are used and never trained: references, encoders, judges."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Frozen:
    """Calls `net` without gradients, in eval mode.

    Not an nn.Module: a module that holds one neither trains it, nor moves it, nor saves it.
    `net` itself is frozen; pass a copy if the network is still trained.
    """

    def __init__(self, net: nn.Module):
        self.net = net.eval().requires_grad_(False)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Set all weights by parameter name; a network on the meta device shares the tensors.

        Tensors of a mapped file are then shared by all ranks of a node, or moved to the rank's GPU.
        """
        on_meta = any(parameter.is_meta for parameter in self.net.parameters())
        self.net.load_state_dict(weights, assign=on_meta)

    def to(self, device: torch.device | str) -> "Frozen":
        """Move `net`, which is not moved with the module that holds this object."""
        self.net.to(device)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of `net`, outside the graph."""
        with torch.no_grad():
            return self.net(*args, **kwargs)
