"""What preference epochs need beyond a step: the reference network, and beta's running state."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from echolab.errors import ConfigError
from echolab.training.checkpoints.checkpoint import open_on_all_ranks
from echolab.training.engine.ema import EMA


class Reference(Protocol):
    """`models.frozen.Frozen`, or a network's base or earlier adapters (`adapters.lora`)."""

    def load(self, weights: Mapping[str, Tensor]) -> None: ...

    def to(self, device: torch.device | str) -> Any: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class References:
    """Loads the averaged weights at the start of a preference epoch into its frozen reference.

    They are those of the checkpoint saved there, so that a resumed run meets the same reference;
    `pinned` is another checkpoint for all epochs.  Objectives that keep a state start it afresh
    with each epoch: a margin against an earlier reference says nothing.
    """

    def __init__(
        self,
        objectives: Mapping[str, Any],
        reference: Reference | None,
        pinned: Path | None = None,
    ) -> None:
        self.reference, self.pinned = reference, pinned
        self.stateful = {
            kind: objective
            for kind, objective in objectives.items()
            if hasattr(objective, "load_state_dict")
        }
        self._fresh = copy.deepcopy(self.state_dict())
        self._entered: Path | None = None

    def enter(self, boundary: Path, *, fresh: bool, device: torch.device) -> bool:
        """Make sure that the reference of the epoch that began at `boundary` is in place.

        Whether it was not yet.  Collective.
        """
        if self._entered == boundary:
            return False
        if self.reference is None:
            raise ConfigError("schedule: preference epochs need a reference; give ref_model=")
        self.reference.load(open_on_all_ranks(self.pinned or boundary).tensors(EMA))
        self.reference.to(device)
        if fresh:
            self.load_state_dict(self._fresh)
        self._entered = boundary
        return True

    def observe(self, kind: str, margin: float, share: float) -> None:
        """Tell the objective of a step its mean margin: `margin` / `share`, summed over ranks."""
        if share:
            self.stateful[kind].update(margin / share)

    def state_dict(self) -> dict[str, Any]:
        """Of every objective that has a state, by kind."""
        return {kind: dict(objective.state_dict()) for kind, objective in self.stateful.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; the reference is read again.

        A run that went back trains its way to the same boundary anew, and not always to the same
        weights.
        """
        self._entered = None
        for kind, objective in self.stateful.items():
            if kind in state:
                objective.load_state_dict(state[kind])
