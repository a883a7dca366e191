"""Ranks that should hold the same weights do, and what is frozen stays as it was."""

import json
from typing import Any

from torch import nn

from echolab.errors import ReplicaError
from echolab.models.frozen import Frozen
from echolab.training.callbacks.callback import Callback
from echolab.training.engine.ema import Ema
from echolab.training.engine.master_weights import MOMENTS, Masters
from echolab.training.guards.replica_check import (
    Unchanged,
    check_replicas,
    frozen,
    replicated,
)
from echolab.training.intervals import Intervals
from echolab.training.run_state import RunState


class ReplicaCheck(Callback):
    """Compares digests of the weights: between ranks, and of frozen networks with their start."""

    def __init__(
        self, net: nn.Module, masters: Masters, ema: Ema, *, reference: object, intervals: Intervals
    ) -> None:
        self.net, self.masters, self.ema = net, masters, ema
        self.reference, self.intervals = reference, intervals
        self._frozen_base: Unchanged | None = None  # of adapters
        self._frozen_reference: Unchanged | None = None

    def on_start(self, state: RunState) -> None:
        """Watch the frozen base of adapters, if the network has one."""
        if parameters := frozen(self.net):
            self._frozen_base = Unchanged("the base of the adapters", parameters)

    def watch_reference(self) -> None:
        """Watch the reference, which must not change in its preference epoch."""
        parameters = self._reference_parameters()
        self._frozen_reference = Unchanged("the reference", parameters) if parameters else None

    def _reference_parameters(self) -> dict[str, Any]:
        reference = self.reference
        return dict(reference.net.named_parameters()) if isinstance(reference, Frozen) else {}

    def check_frozen(self) -> None:
        """Raise ReplicaError if a network that is not trained has changed; collective."""
        if self._frozen_base:
            self._frozen_base.check(frozen(self.net))
        if self._frozen_reference:
            self._frozen_reference.check(self._reference_parameters())

    def after_step(self, state: RunState) -> None:
        """Raise ReplicaError if ranks that should hold the same do not; collective."""
        if not self.intervals.due(self.intervals.replica_check_every, state.step):
            return
        tensors = replicated(self.net)
        if not self.masters.sharded:
            flats = {part: self.masters.flats(part) for part in MOMENTS} | self.ema.flats
            tensors |= {f"{part}/{i}": t for part, ts in flats.items() for i, t in enumerate(ts)}
        try:
            check_replicas(tensors, json.dumps(state.schedule.state_dict(), sort_keys=True))
        except ReplicaError as error:
            state.events.add(state.step, "replicas", words=str(error))
            raise
