"""A run's schedule: epochs that are supervised or preference epochs, repeated in cycles."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from echolab.data.micro_batches import Place
from echolab.errors import ConfigError

KINDS = ("sft", "ndpo", "dpo")


class Epoch(NamedTuple):
    """So many optimizer steps of one kind, at one learning rate."""

    kind: str
    steps: int
    lr: float


class Position(NamedTuple):
    """Where a step falls."""

    number: int  # of the epoch, counted over all cycles
    cycle: int
    epoch: Epoch
    within: int  # steps of this epoch done before


class Schedule:
    """The whole run as a function of the step; holds no state.

    The learning rate is the epoch's, times a linear warm-up over the run's first `warmup` steps,
    times (with decay="cosine") half a cosine from 1 to 0 over the run.
    """

    def __init__(
        self,
        epochs: Sequence[Epoch],
        *,
        cycles: int = 1,
        warmup: int = 0,
        decay: str = "constant",
    ) -> None:
        if not epochs or cycles < 1:
            raise ConfigError(f"schedule: {len(epochs)} epochs x {cycles} cycles; need 1 or more")
        for number, epoch in enumerate(epochs):
            if epoch.kind not in KINDS or epoch.steps < 1 or not epoch.lr >= 0:
                raise ConfigError(
                    f"schedule.epochs[{number}]: {tuple(epoch)}; kind is one of {', '.join(KINDS)},"
                    " steps 1 or more, lr 0 or more"
                )
        if decay not in ("constant", "cosine"):
            raise ConfigError(f"schedule.decay={decay}: unknown; constant or cosine")
        self.one_cycle = len(epochs)
        self.epochs = [Epoch(*epoch) for epoch in epochs] * cycles
        self.warmup, self.decay = warmup, decay
        self.starts = [0]
        for epoch in self.epochs:
            self.starts.append(self.starts[-1] + epoch.steps)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.starts[-1]

    def locate(self, step: int) -> Position:
        """The epoch that step `step` (from 0) belongs to; the end belongs to the last."""
        number = len(self.epochs) - 1
        while number and self.starts[number] > step:
            number -= 1
        within = step - self.starts[number]
        return Position(number, number // self.one_cycle, self.epochs[number], within)

    def place(self, step: int) -> Place:
        """The dataset batch of a step: sft and preference epochs each go on where they stopped."""
        number, _, epoch, within = self.locate(step)
        supervised = epoch.kind == "sft"
        before = sum(e.steps for e in self.epochs[:number] if (e.kind == "sft") == supervised)
        return Place(epoch.kind, before + within)

    def supervised_steps(self, step: int) -> int:
        """How many of the first `step` steps are supervised: what the curriculum counts."""
        number, _, epoch, within = self.locate(step)
        done = sum(e.steps for e in self.epochs[:number] if e.kind == "sft")
        return done + (within if epoch.kind == "sft" else 0)

    def lr(self, step: int) -> float:
        """Learning rate of a step."""
        rate = self.locate(step).epoch.lr * min(1.0, (step + 1) / max(self.warmup, 1))
        if self.decay == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return rate

    def is_boundary(self, step: int) -> bool:
        """Whether an epoch ends at this step."""
        return step in self.starts[1:]

    def needs_reference(self, step: int) -> bool:
        """Whether a preference epoch starts at this step."""
        return step < self.steps and step in self.starts and self.locate(step).epoch.kind != "sft"

    def state_dict(self) -> dict[str, Any]:
        """The epochs, as JSON."""
        return {"epochs": [list(epoch) for epoch in self.epochs]}

    def check_continues(self, state: dict[str, Any], step: int) -> None:
        """Raise ConfigError unless the steps done under the saved schedule are this one's too."""
        saved = [Epoch(*epoch) for epoch in state["epochs"]]
        done = 0
        for number, old in enumerate(saved):
            if done >= step:
                return
            new = self.epochs[number] if number < len(self.epochs) else None
            used = min(old.steps, step - done)
            passed = step > done + used  # later epochs have begun: its length is history
            short = new is None or new.kind != old.kind or new.steps < used
            if short or (passed and new and new.steps != old.steps):
                raise ConfigError(
                    f"schedule.epochs[{number}]: {new and tuple(new)}, but the run trained "
                    f"{tuple(old)} up to step {step}; only what is still to come may change"
                )
            done += old.steps
