"""Timestep phase-aware modality allocation (PhDA): the weight of each modality at a noise level.

The curve is digitized from the published architecture figure (values from 0.5 to 1, ramp ends
rounded to hundreds).  The figure does not show how the weights are applied; both interpretations
are implemented:

* `ModalityDropout`: the weight is the probability of keeping the modality.  A kept modality has
  scale 1, as in the released inference code; guidance requires occasional dropout.
* `ModalityScaling`: the weight multiplies the modality's cross-attention output.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from echolab.types import Conditions, ModalityWeights

Allocator = Callable[[Conditions, Tensor, Tensor], tuple[Conditions, ModalityWeights | None]]


class Ramp(NamedTuple):
    """`low` up to timestep `start`, `high` from `end`, linear in between."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, timesteps: Tensor) -> Tensor:
        """Return the ramp at timesteps in 0..1000, any shape."""
        rise = ((timesteps.float() - self.start) / (self.end - self.start)).clamp(0, 1)
        return self.low + (self.high - self.low) * rise


class PhaseSchedule(NamedTuple):
    """One ramp per modality."""

    text: Ramp
    image: Ramp
    audio: Ramp

    def __call__(self, timesteps: Tensor) -> ModalityWeights:
        """Return the weights at timesteps [B], each [B]."""
        return ModalityWeights(*(ramp(timesteps) for ramp in self))


# Text has weight 1 at every timestep in all published schedules.
ALWAYS = Ramp(1.0, 1.0, 0.0, 1000.0)
FLAT = PhaseSchedule(ALWAYS, ALWAYS, ALWAYS)
PHDA = PhaseSchedule(ALWAYS, Ramp(0.5, 1.0, 300.0, 600.0), Ramp(0.5, 1.0, 500.0, 800.0))
# The figure's axis interpreted as denoising progress (0 = pure noise).
PHDA_BY_PROGRESS = PhaseSchedule(ALWAYS, Ramp(1.0, 0.5, 400.0, 700.0), Ramp(1.0, 0.5, 200.0, 500.0))


def _keep_or_zero(keep: Tensor, features: Tensor) -> Tensor:
    """Return the features [B, ...] of the clips to keep [B], zeros for the others."""
    return features * keep.to(features.dtype).view(-1, *[1] * (features.ndim - 1))


@dataclass(frozen=True)
class ModalityDropout:
    """Zero the image or audio features of a clip unless its uniform is below the weight."""

    schedule: PhaseSchedule

    def __call__(
        self, conditions: Conditions, timesteps: Tensor, uniforms: Tensor
    ) -> tuple[Conditions, None]:
        """Return the kept conditions, for timesteps [B] and uniforms [B, 2] (image, audio)."""
        # Text is never dropped: its weight is 1 in every published schedule.
        weights = self.schedule(timesteps)
        kept = conditions._replace(
            image=_keep_or_zero(uniforms[:, 0] < weights.image, conditions.image),
            audio=_keep_or_zero(uniforms[:, 1] < weights.audio, conditions.audio),
        )
        return kept, None


@dataclass(frozen=True)
class ModalityScaling:
    """Scale the outputs of cross-attention; leave the conditions unchanged."""

    schedule: PhaseSchedule

    def __call__(
        self, conditions: Conditions, timesteps: Tensor, uniforms: Tensor
    ) -> tuple[Conditions, ModalityWeights]:
        """Return the same conditions, and the weights [B] at timesteps [B]."""
        # The network multiplies its cross-attention outputs by the weights.
        return conditions, self.schedule(timesteps)


def without_dropout(phases: Allocator) -> Allocator:
    """Return the allocator of preference epochs: `phases`, but without modality dropout.

    Both clips of a pair were sampled with all conditions.  Training the preference without audio
    too would change the branch that guidance subtracts.
    """
    return ModalityDropout(FLAT) if isinstance(phases, ModalityDropout) else phases
