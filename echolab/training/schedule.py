"""The schedule of a run: supervised and preference epochs, repeated in cycles.

Batches of the datasets can be skipped (`Skip`): the number of steps does not change, since the
following batches replace the skipped ones.
"""

import copy
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from echolab.data.train_dataset import PREFERENCE_KINDS, StepPlan
from echolab.errors import ConfigError

KINDS = ("sft", "ndpo", "dpo", "sync")
GROUPS = ("sft", "preference")  # each draws batches from its own datasets


class Epoch(NamedTuple):
    """A number of optimizer steps of one kind, at one learning rate."""

    kind: str
    steps: int
    lr: float


class Position(NamedTuple):
    """Position of a step in the schedule."""

    number: int  # index of the epoch, counted over all cycles
    cycle: int
    epoch: Epoch
    within: int  # index of the step in the epoch, from 0


class Skip(NamedTuple):
    """A range of global batches that are skipped."""

    kind: str  # one of GROUPS
    first: int  # index of the first batch
    batches: int  # number of batches

    @property
    def stop(self) -> int:
        """Index of the first batch after the range."""
        return self.first + self.batches

    def check(self) -> "Skip":
        """Return self; raise ConfigError for values out of range."""
        if self.kind not in GROUPS or self.first < 0 or self.batches < 1:
            raise ConfigError(
                f"skip {tuple(self)}: kind is one of {', '.join(GROUPS)}, first 0 or more, "
                "batches 1 or more"
            )
        return self


class Rates(NamedTuple):
    """The settings that determine the learning rate from step `first` on."""

    first: int
    epochs: tuple[Epoch, ...]
    warmup: int
    decay: str

    def lr(self, step: int) -> float:
        """Return the learning rate of a step."""
        # The learning rate of the epoch, with warm-up from the first step of the run.
        ends = itertools.accumulate(epoch.steps for epoch in self.epochs)
        epoch = next((e for e, end in zip(self.epochs, ends, strict=True) if step < end), None)
        rate = (epoch or self.epochs[-1]).lr * min(1.0, (step + 1) / max(self.warmup, 1))
        if self.decay == "cosine":
            steps = sum(epoch.steps for epoch in self.epochs)
            rate *= 0.5 * (1 + math.cos(math.pi * step / steps))
        return rate


def group_of(kind: str) -> str:
    """Return the group of datasets that an epoch of this kind draws from."""
    return "preference" if kind in PREFERENCE_KINDS else "sft"


def merged(skips: Iterable[Skip], kind: str, stop: int | None = None) -> list[tuple[int, int]]:
    """Return the batches that a group skips as sorted, disjoint ranges [first, stop).

    With `stop`, only batches below it.
    """
    # Skips are sorted, so each can overlap only the last range.
    spans: list[tuple[int, int]] = []
    for skip in sorted(skip for skip in skips if skip.kind == kind):
        end = skip.stop if stop is None else min(skip.stop, stop)
        if spans and skip.first <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        elif skip.first < end:
            spans.append((skip.first, end))
    return spans


class Schedule:
    """The schedule of a run: maps a step to its epoch, batch and learning rate; stateless.

    The learning rate is that of the epoch, times a linear warm-up over the first `warmup` steps of
    the run, times (with decay="cosine") half a cosine from 1 to 0 over the run.  Steps that were
    trained with other settings keep their rate: `rates` has the settings by first step.
    """

    def __init__(
        self,
        epochs: Sequence[Epoch],
        *,
        cycles: int = 1,
        warmup: int = 0,
        decay: str = "constant",
        skipped: Iterable[Skip] = (),
    ) -> None:
        if not epochs or cycles < 1:
            raise ConfigError(f"schedule: {len(epochs)} epochs x {cycles} cycles; need 1 or more")
        for index, epoch in enumerate(epochs):
            if epoch.kind not in KINDS or epoch.steps < 1 or not epoch.lr >= 0:
                raise ConfigError(
                    f"schedule.epochs[{index}]: {tuple(epoch)}; kind is one of {', '.join(KINDS)},"
                    " steps 1 or more, lr 0 or more"
                )
        if decay not in ("constant", "cosine"):
            raise ConfigError(f"schedule.decay={decay}: unknown; constant or cosine")
        # List the epochs of all cycles, and the step at which each epoch starts.
        self.one_cycle = len(epochs)
        self.epochs = [Epoch(*epoch) for epoch in epochs] * cycles
        self.rates: tuple[Rates, ...] = (Rates(0, tuple(self.epochs), warmup, decay),)
        self.skipped = tuple(Skip(*skip).check() for skip in skipped)
        self._spans = {group: merged(self.skipped, group) for group in GROUPS}
        self.starts = [0]
        for epoch in self.epochs:
            self.starts.append(self.starts[-1] + epoch.steps)

    @property
    def prefers(self) -> bool:
        """Return whether there are preference epochs, which need pairs and a reference."""
        return any(group_of(epoch.kind) == "preference" for epoch in self.epochs)

    @property
    def steps(self) -> int:
        """Total number of optimizer steps of the run."""
        return self.starts[-1]

    def locate(self, step: int) -> Position:
        """Return the position of step `step` (from 0); `step == steps` is in the last epoch."""
        # Search linearly from the last epoch, since runs have few epochs.
        index = len(self.epochs) - 1
        while index and self.starts[index] > step:
            index -= 1
        within = step - self.starts[index]
        return Position(index, index // self.one_cycle, self.epochs[index], within)

    def place(self, step: int) -> StepPlan:
        """Return the dataset batch of a step: each group continues where its last epoch stopped."""
        kind = self.locate(step).epoch.kind
        return StepPlan(
            kind, *self._batch_index(group_of(kind), self._steps_done(group_of(kind), step))
        )

    def _steps_done(self, group: str, step: int) -> int:
        """Count the steps among the first `step` that took a batch of a group."""
        # Sum the complete epochs of the group and the finished part of the current epoch.
        index, _, epoch, within = self.locate(step)
        done = sum(e.steps for e in self.epochs[:index] if group_of(e.kind) == group)
        return done + (within if group_of(epoch.kind) == group else 0)

    def _batch_index(self, group: str, index: int) -> tuple[int, int]:
        """Return the batch of the `index`-th step of a group, and the number skipped before it."""
        # The ranges are sorted: each range at or below the batch shifts it by the range's length.
        batch = index
        for first, stop in self._spans[group]:
            if batch >= first:
                batch += stop - first
        return batch, batch - index

    def begun(self, group: str, step: int) -> int:
        """Return the index of a group's first batch after those of the first `step` steps."""
        done = self._steps_done(group, step)
        return self._batch_index(group, done - 1)[0] + 1 if done else 0

    def leaving_out(self, skips: Iterable[Skip]) -> "Schedule":
        """Return a copy of the schedule that also skips these batches."""
        schedule = copy.copy(self)
        schedule.skipped = tuple(dict.fromkeys([*self.skipped, *(skip.check() for skip in skips)]))
        schedule._spans = {group: merged(schedule.skipped, group) for group in GROUPS}
        return schedule

    def skipping(self, skip: Skip, step: int) -> "Schedule":
        """Return a copy of the schedule with `skip` added, for a run that continues from `step`.

        Raise ConfigError if a batch in `skip` was already trained on before `step`.
        """
        begun = self.begun(skip.check().kind, step)
        if skip.first < begun:
            raise ConfigError(
                f"skip of {skip.kind} batches {skip.first}:{skip.stop}: those below "
                f"{begun} were trained on before step {step}; begin there, or go back further"
            )
        return self.leaving_out([skip])

    def supervised_steps(self, step: int) -> int:
        """Count the supervised steps among the first `step`; the curriculum depends on them."""
        return self._steps_done("sft", step)

    def lr(self, step: int) -> float:
        """Return the learning rate of a step."""
        return next(rates for rates in reversed(self.rates) if rates.first <= step).lr(step)

    def is_boundary(self, step: int) -> bool:
        """Return whether an epoch ends at this step."""
        return step in self.starts[1:]

    def needs_reference(self, step: int) -> bool:
        """Return whether a preference epoch starts at this step."""
        begins = step < self.steps and step in self.starts
        return begins and group_of(self.locate(step).epoch.kind) == "preference"

    def keeps(self, step: int) -> bool:
        """Return whether to keep this step's checkpoint: an epoch ends here, or needs it."""
        return self.is_boundary(step) or self.needs_reference(step)

    def state_dict(self) -> dict[str, Any]:
        """Return the epochs, the skipped batches, and the rates by first step, as JSON."""
        return {
            "epochs": [list(epoch) for epoch in self.epochs],
            "skipped": [list(skip) for skip in self.skipped],
            "rates": [
                {**rates._asdict(), "epochs": [list(epoch) for epoch in rates.epochs]}
                for rates in self.rates
            ],
        }

    def continuing(self, state: Mapping[str, Any], step: int) -> "Schedule":
        """Return a copy of the schedule with the saved rates for the first `step` steps."""
        # Finished steps keep their rates; the current settings apply from `step` on.
        schedule, current = copy.copy(self), self.rates[-1]
        earlier = [rates for rates in self._saved_rates(state) if rates.first < step]
        same = bool(earlier) and earlier[-1][1:] == current[1:]
        schedule.rates = (
            *earlier,
            *([] if same else [current._replace(first=step if earlier else 0)]),
        )
        return schedule

    def _saved_rates(self, state: Mapping[str, Any]) -> list[Rates]:
        """Return the rates of a saved state; old states without rates get the current settings."""
        if "rates" not in state:
            epochs = tuple(Epoch(*epoch) for epoch in state["epochs"])
            return [self.rates[-1]._replace(first=0, epochs=epochs)]
        # JSON stores tuples as lists.
        return [
            Rates(**{**rates, "epochs": tuple(Epoch(*epoch) for epoch in rates["epochs"])})
            for rates in state["rates"]
        ]

    def check_continues(self, state: Mapping[str, Any], step: int) -> None:
        """Raise ConfigError if this schedule and the saved one differ in the first `step` steps."""
        # Compare epochs and rates, then the skipped batches.
        saved = self._saved_rates(state)[-1]
        self._check_epochs(saved.epochs, step)
        self._check_rates(saved, step)
        saved_skips = [Skip(*skip) for skip in state.get("skipped", [])]
        for group in GROUPS:
            # Compare only skips before the last batch trained on; later skips may change.
            begun = Schedule(saved.epochs, skipped=saved_skips).begun(group, step)
            was, now = merged(saved_skips, group, begun), merged(self.skipped, group, begun)
            if was != now:
                raise ConfigError(
                    f"the run left out {group} batches {was} up to step {step}, now {now}; give "
                    "back its events.jsonl as it was, or go back to a checkpoint before them"
                )

    def _check_epochs(self, saved: Sequence[Epoch], step: int) -> None:
        """Raise ConfigError if kind, length or rate of an epoch differs where it was trained."""
        done = 0
        for index, old in enumerate(saved):
            if done >= step:
                return
            # Find the trained part of this epoch, which must not change.
            new = self.epochs[index] if index < len(self.epochs) else None
            used = min(old.steps, step - done)
            passed = step > done + used  # later epochs were trained: its length must not change
            short = new is None or new.kind != old.kind or new.steps < used
            over = new is not None and new.steps <= used  # no step of the epoch remains
            if short or (passed and new and new.steps != old.steps) or (
                new and over and new.lr != old.lr
            ):  # fmt: skip
                raise ConfigError(
                    f"schedule.epochs[{index}]: {new and tuple(new)}, but the run trained "
                    f"{tuple(old)} up to step {step}; only what is still to come may change: give "
                    "this epoch as it was, or train another run with init_from= this one"
                )
            done += old.steps

    def _check_rates(self, saved: Rates, step: int) -> None:
        """Raise ConfigError for a changed warm-up after its end, or decay of a finished run."""
        # Such a setting only affects finished steps, so it must not change.
        current = self.rates[-1]
        for key, over in (
            ("warmup", step >= min(saved.warmup, self.steps)),
            ("decay", step >= self.steps),
        ):
            was, now = getattr(saved, key), getattr(current, key)
            if step and over and was != now:
                raise ConfigError(
                    f"schedule.{key}={now}: it was {was} and is over at step {step}; "
                    f"give schedule.{key}={was}, or train another run with init_from= this one"
                )
