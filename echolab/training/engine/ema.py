"""fp32 averages of the weights, sharded like the fp32 master weights of each rank.

Averaging is elementwise, so each rank averages its own pieces without communication, under every
ZeRO stage.  (Lightning's own EMA callback loses its average under ZeRO.)

Power profiles allow averages whose length is chosen after training (post-hoc EMA: Karras et al.
2024, arXiv:2312.02696, section 3).  A profile of exponent g weights the network at time tau in
(0, t] by tau^g, so it forgets the start for any length of training.  Its width sigma is its
standard deviation relative to t.  From snapshots of a narrow and a wide profile, any other profile
is approximated by least squares.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from echolab.errors import ConfigError
from echolab.training.engine.master_weights import Masters

WIDEST = 1 / math.sqrt(12)  # width of exponent 0, the plain mean over all steps
EMA, POWER = "ema", "power-"  # names of checkpoint parts: the EMA, and the prefix of power averages
REFERENCE = "ref_model"  # name of the checkpoint part of a mixed reference model


def part_of(decay: float) -> str:
    """Return the name of the checkpoint part of an additional average."""
    return f"{EMA}-{decay!r}"


def part_names(
    more: Sequence[float], widths: Sequence[float], keeps_reference: bool = False
) -> list[str]:
    """Return the names of the checkpoint parts of all averages."""
    reference = [REFERENCE] if keeps_reference else []
    return [EMA, *map(part_of, more), *(f"{POWER}{width!r}" for width in widths), *reference]


class Ema:
    """average <- d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)).

    n is the number of updates: a young average forgets its start quickly (TensorFlow's rule).
    Validation and sampling use the average of `decay`.  Additional averages have the decays `more`,
    or power profiles of `widths`, from which averages of other widths can be computed later.

    With `keeps_reference`, the weights of a reference model are held in the same layout, so that
    they are mixed without communication, and saved and restored like an average; see
    `mix_reference`.
    """

    def __init__(
        self,
        decay: float,
        more: Sequence[float] = (),
        widths: Sequence[float] = (),
        *,
        keeps_reference: bool = False,
    ) -> None:
        # Averages diverge for decays outside [0, 1); equal decays would have the same part name.
        for number in (decay, *more):
            if not 0 <= number < 1:
                raise ConfigError(f"ema_decay={number:g}: must lie in [0, 1); 0.999 is usual")
        for name, numbers in (("extra_ema_decays", more), ("posthoc_ema_stds", widths)):
            if len(set(numbers)) < len(numbers):
                raise ConfigError(f"{name}={list(numbers)}: one is given twice; give each once")
        self.decay, self.more, self.widths = decay, tuple(more), tuple(widths)
        self.keeps_reference = keeps_reference
        self.updates = 0
        self._decays = {EMA: decay, **{part_of(number): number for number in more}}
        self._exponents = {f"{POWER}{width!r}": exponent_of(width) for width in widths}
        self.flats: dict[str, list[Tensor]] = {}  # by part, laid out as `Masters.local`

    @property
    def parts(self) -> list[str]:
        """Names of the checkpoint parts of all averages."""
        return part_names(self.more, self.widths, self.keeps_reference)

    def start(self, masters: Masters) -> None:
        """Start all averages from the current weights."""
        for part in self.parts:
            self.flats[part] = [tensor.detach().clone() for tensor in masters.local]

    @torch.no_grad()
    def update(self, masters: Masters) -> None:
        """Update all averages after an optimizer step."""
        # The share of a power profile depends only on the number of updates.
        young = (1 + self.updates) / (10 + self.updates)
        shares = {part: 1 - min(decay, young) for part, decay in self._decays.items()}
        for part, exponent in self._exponents.items():
            shares[part] = newest_share(exponent, self.updates + 1)
        for part, share in shares.items():
            torch._foreach_lerp_(self.flats[part], masters.local, share)
        self.updates += 1

    @torch.no_grad()
    def mix_reference(self, masters: Masters, alpha: float) -> None:
        """Set reference <- (1 - alpha) reference + alpha weights, as trl's SyncRefModelCallback."""
        for reference, weights in zip(self.flats[REFERENCE], masters.local, strict=True):
            reference.mul_(1.0 - alpha).add_(weights, alpha=alpha)

    @contextmanager
    def applied(self, masters: Masters, part: str = EMA) -> Iterator[None]:
        """Use an average as the network's weights in the context; then restore them bit-exactly."""
        # Copy only the network's weights; masters and averages do not change.
        saved = masters.snapshot()
        try:
            masters.show(self.flats[part])
            yield
        finally:
            masters.unshow(saved)

    def state_dict(self) -> dict[str, Any]:
        """Return settings and update count as JSON; the averages are parts of the checkpoint."""
        settings = {"decay": self.decay, "more": list(self.more), "widths": list(self.widths)}
        reference = {"keeps_reference": True} if self.keeps_reference else {}
        return {**settings, **reference, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the update count from `state_dict()`."""
        self.updates = int(state["updates"])


# -- power profiles ------------------------------------------------------------


def width(exponent: float) -> float:
    """Return the width sigma of a profile: the standard deviation of Beta(g + 1, 1)."""
    return math.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3)))


def exponent_of(sigma: float) -> float:
    """Return the exponent of a profile of width `sigma`.

    Raise ConfigError outside [0.0001, 0.2887).
    """
    if not 1e-4 <= sigma < WIDEST:
        raise ConfigError(f"ema width {sigma:g}: must lie in [0.0001, {WIDEST:.4f}); 0.1 is usual")
    # Bisection, since the width decreases with the exponent.
    low, high = 0.0, 2 / sigma  # upper bound, since width(g) < 1 / (g + 2)
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if width(middle) > sigma else (low, middle)
    return low


def newest_share(exponent: float, updates: int) -> float:
    """Return the share of the newest weights in the average after `updates` updates (from 1)."""
    return 1 - (1 - 1 / updates) ** (exponent + 1)


class Profile:
    """The profile tau^g on (0, t], normalized to integral 1; `exponent` is g, `time` is t."""

    def __init__(self, exponent: float, time: float) -> None:
        self.exponent, self.time = exponent, time

    def dot(self, other: "Profile") -> float:
        """Integrate the product of two profiles, tau^(g + h) up to the earlier end."""
        g, h = self.exponent, other.exponent
        # After the earlier end, one of the profiles is zero.
        early = min(self.time, other.time)
        shares = (early / self.time) ** (g + 1) * (early / other.time) ** (h + 1)
        return (g + 1) * (h + 1) * shares / ((g + h + 1) * early)


def coefficients(kept: Sequence[Profile], wanted: Profile) -> list[float]:
    """Return the coefficients of the `kept` profiles that best approximate `wanted`.

    The approximation is by least squares.
    """
    # Solve the normal equations.
    matrix = torch.tensor([[a.dot(b) for b in kept] for a in kept], dtype=torch.float64)
    right = torch.tensor([a.dot(wanted) for a in kept], dtype=torch.float64)
    # Close snapshots make the matrix nearly singular: use the minimum-norm solution, by SVD.
    solution = torch.linalg.lstsq(matrix, right[:, None], rcond=1e-12, driver="gelsd").solution
    return [float(value) for value in solution[:, 0]]
