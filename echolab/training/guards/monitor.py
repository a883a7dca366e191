"""Watches over the steps of one attempt: what is odd is written down, named, or ends the run.

Every rank is given the same numbers, so every rank decides the same.
"""

import json
import math
import socket
from collections.abc import Mapping
from typing import Any

from torch import nn

from echolab.errors import DivergedError, ReplicaError
from echolab.models.frozen import Frozen
from echolab.training import distributed
from echolab.training.config import Training
from echolab.training.engine.ema import Ema
from echolab.training.engine.engine_report import check_clipped
from echolab.training.engine.master_weights import MOMENTS, Masters
from echolab.training.guards import events, spike_policy
from echolab.training.guards.host_memory import HostMemory
from echolab.training.guards.replica_check import (
    REMEDY,
    Unchanged,
    check_replicas,
    frozen,
    odd,
    odd_rank,
    replicated,
)
from echolab.training.guards.spike_policy import Action, What
from echolab.training.guards.spikes import Spike, SpikeDetector
from echolab.training.guards.stragglers import OWN_PACE, Stragglers
from echolab.training.schedule import Schedule, Skip
from echolab.training.step_sync import Vote

APART = 1e-5  # share by which the ranks' norms of the same gradient may differ


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
            distributed.gather_text(socket.gethostname()),
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
        self, vote: Vote, own: tuple[float, float], step: int, schedule: Schedule
    ) -> tuple[Action, Spike | None]:
        """What to do about step `step` (from 0); `own` is this rank's loss and norm.

        Collective.  DivergedError where nothing sane is left to do, EcholabError where the gradient
        was not clipped, ReplicaError where the ranks' norms of the whole gradient differ.
        """
        self._check_norms(vote, own[1], step)
        loss = vote.loss / distributed.world() if not vote.not_finite else math.nan
        number, _, epoch, _ = schedule.locate(step)
        spike = self.detector.observe(
            epoch.kind, loss, vote.norm / distributed.world(), step=step, epoch=number
        )
        first = self._first_not_finite(all(map(math.isfinite, own))) if vote.not_finite else None
        try:
            return spike_policy.decide(spike, self.guards, self.history.events, schedule), spike
        except DivergedError as error:
            error.rank, error.step = first, step
            raise

    def _check_norms(self, vote: Vote, norm: float, step: int) -> None:
        if vote.not_finite:
            return
        check_clipped(vote.clipped, self.training.optim.clip, step + 1)
        spread = distributed.world() * vote.norm_squared - vote.norm**2
        if spread > (APART * vote.norm) ** 2:
            told = distributed.gather_text(f"{norm:.9g}")
            raise ReplicaError(
                f"step {step + 1}: the norm of the gradient is not the same on all ranks: "
                f"{odd(told)} ({', '.join(dict.fromkeys(told))}); {REMEDY}",
                rank=odd_rank(told),
            )

    def _first_not_finite(self, finite: bool) -> int | None:
        told = distributed.gather_text("" if finite else "not")
        return next((rank for rank, text in enumerate(told) if text), None)

    def note(
        self, spike: Spike, event: str, to: int | None = None, skip: Skip | None = None
    ) -> None:
        """Write down what was done about a spike."""
        self.history.add(spike.step, event, **spike_policy.event_details(spike, to, skip))

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

    def check_replicas(
        self, net: nn.Module, masters: Masters, ema: Ema, step: int, state: Mapping[str, Any]
    ) -> None:
        """ReplicaError where ranks that should hold the same do not; collective."""
        named = replicated(net)
        if not masters.sharded:
            held = {part: masters.flats(part) for part in MOMENTS} | ema.flats
            named |= {f"{part}/{i}": t for part, ts in held.items() for i, t in enumerate(ts)}
        try:
            check_replicas(named, json.dumps(state, sort_keys=True))
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
