"""Watches over the steps of one attempt: what is odd is written down, named, or ends the run.

Every rank is given the same numbers, so every rank decides the same.
"""

import json
import math
import socket
from collections.abc import Mapping
from typing import Any

from torch import nn

from echolab.errors import ReplicaError
from echolab.models.frozen import Frozen
from echolab.training import ranks
from echolab.training.engine.live import check_clipped
from echolab.training.guards import events, recovery
from echolab.training.guards.digests import Unchanged, check_replicas, frozen, replicated
from echolab.training.guards.host_memory import HostMemory
from echolab.training.guards.recovery import Action, What
from echolab.training.guards.spikes import Spike, SpikeDetector
from echolab.training.guards.stragglers import OWN_PACE, Stragglers
from echolab.training.parts import Training
from echolab.training.schedule import Schedule, Skip
from echolab.training.vote import Vote


class Guarding:
    """Spikes, replicas, frozen networks, slow ranks and host memory."""

    def __init__(self, training: Training) -> None:
        """Collective."""
        guards = training.guards
        self.training, self.guards = training, guards
        self.detector = SpikeDetector(
            limit=guards.limit, window=guards.window, warmup=guards.warmup
        )
        self.history = events.History(training.folder)
        self.memory = HostMemory(training.host_memory_gb)
        machine = training.machine
        waits = machine.strategy == "zero3" or machine.sequence_parallel > 1
        self.stragglers = Stragglers(
            ranks.gather_text(socket.gethostname()),
            [name for name in OWN_PACE if not (waits and name == "forward")],
        )
        self._reference: Unchanged | None = None
        self._base: Unchanged | None = None

    def start(self, net: nn.Module, seconds: Mapping[str, float]) -> None:
        """The weights are in place, and the first step begins."""
        self.stragglers.start(seconds)
        if still := frozen(net):
            self._base = Unchanged("the base of the adapters", still)

    # -- every step ---------------------------------------------------------------------------

    def judge(
        self, vote: Vote, norm: float, step: int, schedule: Schedule
    ) -> tuple[Action, Spike | None]:
        """What to do about step `step` (from 0), whose gradient had `norm` before clipping.

        DivergedError where nothing sane is left to do, EcholabError where it was not clipped.
        """
        check_clipped(vote.clipped, self.training.optim.clip, step + 1)
        loss = vote.loss / ranks.world() if not vote.not_finite else math.nan
        number, _, epoch, _ = schedule.locate(step)
        spike = self.detector.observe(epoch.kind, loss, norm, step=step, epoch=number)
        return recovery.decide(spike, self.guards, self.history.events, schedule), spike

    def note(
        self, spike: Spike, event: str, to: int | None = None, skip: Skip | None = None
    ) -> None:
        """Write down what was done about a spike."""
        self.history.add(spike.step, event, **recovery.told(spike, to, skip))

    def record(self, action: Action, spike: Spike | None) -> None:
        """Write a spike down that training goes on after."""
        if action.what is What.RECORD and spike:
            self.note(spike, action.event)

    # -- now and then -------------------------------------------------------------------------

    def reference_entered(self) -> None:
        """A preference epoch has its reference in place: from here on it must not change."""
        named = self._frozen_reference()
        self._reference = Unchanged("the reference", named) if named else None

    def _frozen_reference(self) -> dict[str, Any]:
        reference = self.training.reference
        return dict(reference.net.named_parameters()) if isinstance(reference, Frozen) else {}

    def check_frozen(self, net: nn.Module) -> None:
        """ReplicaError where a network that nobody trains has changed; collective."""
        if self._base:
            self._base.check(frozen(net))
        if self._reference:
            self._reference.check(self._frozen_reference())

    def check_replicas(self, net: nn.Module, step: int, state: Mapping[str, Any]) -> None:
        """ReplicaError where ranks that should hold the same do not; collective."""
        try:
            check_replicas(replicated(net), json.dumps(state, sort_keys=True))
        except ReplicaError as error:
            self.history.add(step, "replicas", words=str(error))
            raise

    def look(self, step: int, seconds: Mapping[str, float]) -> dict[str, float]:
        """Values for the log; slow ranks are written down.  Collective."""
        values, slow = self.stragglers.look(seconds)
        for one in slow:
            told = {name: value for name, value in one._asdict().items() if name != "rank"}
            self.history.add(step, "straggler", slow_rank=one.rank, words=one.words, **told)
        return values | self.memory.values()
