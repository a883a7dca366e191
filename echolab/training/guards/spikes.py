"""Detection of spikes of the loss and of the gradient's norm, from the last steps of the same kind.

A value is a spike if it lies too many robust standard deviations (1.4826 x the median absolute
deviation) above the median of a window, both measured on asinh(value / scale): a logarithm that
passes through zero, since losses of preferences come near zero, and some are negative.  The scale
is the median of the absolute values, and up to ten times that if signs are mixed: values on both
sides of zero have no order of magnitude, and are measured linearly.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from echolab.errors import ConfigError

MEASURES = ("loss", "gradient_norm")
NORMAL = 1.4826  # standard deviations of normal noise in one median absolute deviation
# The deviation of a loss that hardly moves is taken to be at least this, so that at the usual
# threshold of 8 a value below 1.6 times the median is no spike.
MIN_DEVIATION = 0.05
MIXED = 10.0  # times the median of absolute values is the scale, where half are negative


class SpikeConfig(NamedTuple):
    """Settings of `loss_spike`."""

    policy: str = "record"  # or recompute, rollback
    threshold: float = 8.0  # robust standard deviations above the median
    window: int = 128  # steps of the same kind
    min_history: int = 48  # steps needed before anything but NaN is a spike
    rollback_steps: int = 100  # steps that a rollback goes back at least
    skip_batches: int = 200  # that a rollback leaves out, half of them before the spike
    max_rollbacks: int = 3  # times that a run goes back, under any policy

    def check(self) -> "SpikeConfig":
        """Return itself; raise ConfigError for a setting outside its range."""
        if self.policy not in ("record", "recompute", "rollback"):
            raise ConfigError(
                f"loss_spike.policy={self.policy}: unknown; record, recompute or rollback"
            )
        if not self.threshold > 0:
            raise ConfigError(f"loss_spike.threshold={self.threshold}: must be above 0; 8 is usual")
        if not 2 <= self.min_history <= self.window:
            raise ConfigError(
                f"loss_spike.min_history={self.min_history}: must be 2 or more and at most "
                "loss_spike.window="
                f"{self.window}; 48 and 128 are usual"
            )
        # Zero is meaningful for each: no steps back, no batches skipped, no rollback.
        counts = {
            "rollback_steps": self.rollback_steps,
            "skip_batches": self.skip_batches,
            "max_rollbacks": self.max_rollbacks,
        }
        for setting, value in counts.items():
            if value < 0:
                raise ConfigError(f"loss_spike.{setting}={value}: must be 0 or more")
        return self


class Spike(NamedTuple):
    """A step that is unlike those before it."""

    step: int  # from 0, as the ledger counts
    kind: str  # of the epoch: sft, ndpo, dpo
    measure: str  # of MEASURES
    value: float
    usual: float  # the median of the window; NaN before there is one
    deviations: float  # above it; infinite where the value is not finite

    @property
    def finite(self) -> bool:
        """Whether the value is a finite number."""
        return math.isfinite(self.value)

    @property
    def reason(self) -> str:
        """A description."""
        what = f"step {self.step} ({self.kind}): {self.measure.replace('_', ' ')} {self.value:g}"
        if not self.finite:
            return f"{what} is not finite"
        return f"{what}, usually {self.usual:g}: {self.deviations:.1f} robust deviations above"

    def details(self) -> dict[str, Any]:
        """Return the details for an event: JSON has no NaN."""
        # The log is read by other programs, so NaN and infinity become null.
        usual = None if math.isnan(self.usual) else self.usual
        numbers = (
            {"value": self.value, "deviations": self.deviations}
            if self.finite
            else {"value": str(self.value), "deviations": None}
        )
        words = {"epoch_kind": self.kind, "measure": self.measure, "reason": self.reason}
        return {**words, "usual": usual, **numbers}


def scale_of(window: Sequence[float]) -> float:
    """Return the value below which asinh(value / scale) is linear; 0 if most values are 0."""
    positive, negative = sum(one > 0 for one in window), sum(one < 0 for one in window)
    # Values of both signs need a larger scale: near zero a logarithm exaggerates.
    agreement = abs(positive - negative) / max(positive + negative, 1)  # 1: all of one sign
    return median(map(abs, window)) / max(agreement, 1 / MIXED)


def deviations(value: float, window: Sequence[float]) -> float:
    """Return the robust standard deviations of `value` above the median of `window`, not empty.

    The same for any positive multiple of all numbers; 0 if most of the window is 0, which gives no
    scale for other values.
    """
    scale = scale_of(window)
    if not scale:
        return 0.0
    # Robust: median and median absolute deviation ignore single outliers.
    logs = [math.asinh(one / scale) for one in window]
    middle = median(logs)
    spread = NORMAL * median(abs(one - middle) for one in logs)
    return (math.asinh(value / scale) - middle) / max(spread, MIN_DEVIATION)


class SpikeDetector:
    """Remembers the last values of each kind of epoch.

    Every rank gives it the same values, so every rank finds the same.  Each preference epoch resets
    the history: with a new reference, the loss starts at log 2, that of zero margin.
    """

    def __init__(self, *, threshold: float = 8.0, window: int = 128, min_history: int = 48) -> None:
        self.threshold, self.window, self.min_history = threshold, window, min_history
        self._epochs: dict[str, int] = {}
        self._values: dict[str, dict[str, deque[float]]] = {}

    def observe(
        self, kind: str, loss: float, gradient_norm: float, *, step: int, epoch: int = 0
    ) -> Spike | None:
        """Return the spike of step `step`, if it is one; the loss is judged first.

        `epoch` is the index of the epoch in the run.  Values that are not finite are not
        remembered; spikes are, so that a lasting change of level becomes usual by itself.
        """
        # A new reference starts from log 2: earlier values say nothing of it.
        if kind not in self._values or (kind != "sft" and self._epochs[kind] != epoch):
            self._values[kind] = {name: deque(maxlen=self.window) for name in MEASURES}
        self._epochs[kind] = epoch
        spikes: list[Spike] = []
        for measure, value in zip(MEASURES, (loss, gradient_norm), strict=True):
            window = self._values[kind][measure]
            usual = median(window) if window else math.nan
            # Not remembered: the median of a window with NaN would be NaN.
            if not math.isfinite(value):
                spikes.append(Spike(step, kind, measure, value, usual, math.inf))
                continue
            if (
                len(window) >= self.min_history
                and (above := deviations(value, window)) > self.threshold
            ):
                spikes.append(Spike(step, kind, measure, value, usual, above))
            window.append(value)
        # A value that is not finite comes first: it cannot be trained on.
        return min(spikes, key=lambda spike: spike.finite, default=None)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decisions depend on, as JSON, exactly."""
        return {
            kind: {"epoch": self._epochs[kind], **{name: list(v) for name, v in values.items()}}
            for kind, values in self._values.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; a shorter window takes the last values."""
        self._epochs = {kind: int(saved["epoch"]) for kind, saved in state.items()}
        self._values = {
            kind: {name: deque(saved[name], maxlen=self.window) for name in MEASURES}
            for kind, saved in state.items()
        }
