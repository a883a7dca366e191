"""Detect spikes of the loss and of the gradient norm, by the last steps of the same kind.

A value is a spike if it is too many robust standard deviations (1.4826 x the median absolute
deviation) above the median of a window, both computed on asinh(value / scale).  asinh is like a
logarithm but defined for all signs, since preference losses can be near zero or negative.  The
scale is the median of the absolute values, or up to ten times that for a window with mixed signs,
where a nearly linear scale is appropriate.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from echolab.errors import ConfigError

MEASURES = ("loss", "gradient_norm")
NORMAL = 1.4826  # standard deviations of normal noise in one median absolute deviation
# Minimum deviation, for a loss that hardly changes: at the usual threshold of 8, a value below 1.6
# times the median is never a spike.
MIN_DEVIATION = 0.05
MIXED = 10.0  # scale / median of absolute values if half of the values are negative


class SpikeConfig(NamedTuple):
    """Settings of `loss_spike`."""

    policy: str = "record"  # record, recompute or rollback
    threshold: float = 8.0  # robust standard deviations above the median
    window: int = 128  # steps of the same kind to compare with
    min_history: int = 48  # steps needed before a finite value can be a spike
    rollback_steps: int = 100  # minimum steps to go back in a rollback
    skip_batches: int = 200  # batches that a rollback skips, half of them before the spike
    max_rollbacks: int = 3  # maximum rollbacks and recomputations per run

    def check(self) -> "SpikeConfig":
        """Return self; raise ConfigError for a setting outside its range."""
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
        # Zero is allowed for each: no steps back, no batches skipped, no rollback.
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
    """A step whose loss or gradient norm is a spike."""

    step: int  # from 0, as in the ledger
    kind: str  # kind of the epoch: sft, ndpo, dpo
    measure: str  # one of MEASURES
    value: float
    usual: float  # median of the window; NaN if the window is empty
    deviations: float  # robust deviations above the median; infinite if the value is not finite

    @property
    def finite(self) -> bool:
        """True if the value is a finite number."""
        return math.isfinite(self.value)

    @property
    def reason(self) -> str:
        """A description of the spike, for messages."""
        subject = f"step {self.step} ({self.kind}): {self.measure.replace('_', ' ')} {self.value:g}"
        if not self.finite:
            return f"{subject} is not finite"
        return f"{subject}, usually {self.usual:g}: {self.deviations:.1f} robust deviations above"

    def details(self) -> dict[str, Any]:
        """Return the details for an event, as JSON."""
        # Strict JSON has no NaN and infinity: write them as text or null.
        usual = None if math.isnan(self.usual) else self.usual
        numeric = (
            {"value": self.value, "deviations": self.deviations}
            if self.finite
            else {"value": str(self.value), "deviations": None}
        )
        texts = {"epoch_kind": self.kind, "measure": self.measure, "reason": self.reason}
        return {**texts, "usual": usual, **numeric}


def scale_of(window: Sequence[float]) -> float:
    """Return the scale below which asinh(value / scale) is nearly linear; 0 if most are 0."""
    positive, negative = sum(value > 0 for value in window), sum(value < 0 for value in window)
    # Mixed signs need a larger scale, since a logarithm exaggerates differences near zero.
    agreement = abs(positive - negative) / max(positive + negative, 1)  # 1: all have one sign
    return median(map(abs, window)) / max(agreement, 1 / MIXED)


def deviations(value: float, window: Sequence[float]) -> float:
    """Return the robust standard deviations of `value` above the median of a nonempty `window`.

    The result is invariant under positive scaling of all values.  Return 0 if most of the window is
    0, since it then has no scale.
    """
    scale = scale_of(window)
    if not scale:
        return 0.0
    # Median and median absolute deviation are robust to single outliers.
    logs = [math.asinh(entry / scale) for entry in window]
    middle = median(logs)
    spread = NORMAL * median(abs(log - middle) for log in logs)
    return (math.asinh(value / scale) - middle) / max(spread, MIN_DEVIATION)


class SpikeDetector:
    """Detects spikes from the last values of each kind of epoch.

    All ranks pass the same values, so all ranks detect the same spikes.  The history is reset at
    each preference epoch: with a new reference, the loss starts at log 2, the loss of zero margin.
    """

    def __init__(self, *, threshold: float = 8.0, window: int = 128, min_history: int = 48) -> None:
        self.threshold, self.window, self.min_history = threshold, window, min_history
        self._epochs: dict[str, int] = {}
        self._values: dict[str, dict[str, deque[float]]] = {}

    def observe(
        self, kind: str, loss: float, gradient_norm: float, *, step: int, epoch: int = 0
    ) -> Spike | None:
        """Add the values of step `step` and return a spike if there is one, of the loss first.

        `epoch` is the index of the epoch in the run.  Values that are not finite are not added to
        the history; spikes are added, so that a lasting change of level becomes normal in time.
        """
        # Reset the history at a new preference epoch, which has a new reference.
        if kind not in self._values or (
            kind not in ("sft", "sync") and self._epochs[kind] != epoch
        ):
            self._values[kind] = {name: deque(maxlen=self.window) for name in MEASURES}
        self._epochs[kind] = epoch
        spikes: list[Spike] = []
        for measure, value in zip(MEASURES, (loss, gradient_norm), strict=True):
            window = self._values[kind][measure]
            usual = median(window) if window else math.nan
            # Do not add the value: the median of a window with NaN would be NaN.
            if not math.isfinite(value):
                spikes.append(Spike(step, kind, measure, value, usual, math.inf))
                continue
            if (
                len(window) >= self.min_history
                and (above := deviations(value, window)) > self.threshold
            ):
                spikes.append(Spike(step, kind, measure, value, usual, above))
            window.append(value)
        # Prefer a value that is not finite: training cannot continue with it.
        return min(spikes, key=lambda spike: spike.finite, default=None)

    def state_dict(self) -> dict[str, Any]:
        """Return the history as JSON, with exact values."""
        return {
            kind: {"epoch": self._epochs[kind], **{name: list(v) for name, v in values.items()}}
            for kind, values in self._values.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the history from `state_dict()`; a shorter window keeps the last values."""
        self._epochs = {kind: int(saved["epoch"]) for kind, saved in state.items()}
        self._values = {
            kind: {name: deque(saved[name], maxlen=self.window) for name in MEASURES}
            for kind, saved in state.items()
        }
