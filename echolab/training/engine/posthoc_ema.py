"""Averages whose length is chosen after training (Karras et al. 2024, arXiv:2312.02696, section 3).

A power profile of exponent g weighs the weights of time tau in (0, t] by tau^g: it forgets the
start however long training goes on.  Its width, sigma, is its standard deviation relative to t.
From snapshots of a narrow and a wide one any other is made by least squares between profiles.
"""

import math
from collections.abc import Sequence

import torch

from echolab.errors import ConfigError

WIDEST = 1 / math.sqrt(12)  # of exponent 0: the plain mean of all


def width(exponent: float) -> float:
    """sigma of a profile: the standard deviation of Beta(g + 1, 1)."""
    return math.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3)))


def exponent_of(sigma: float) -> float:
    """The exponent of a profile of this width; raises ConfigError outside (0, 0.2887)."""
    if not 1e-4 <= sigma < WIDEST:
        raise ConfigError(f"ema width {sigma:g}: must lie in [0.0001, {WIDEST:.4f}); 0.1 is usual")
    low, high = 0.0, 2 / sigma  # width(g) < 1 / (g + 2)
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if width(middle) > sigma else (low, middle)
    return low


def newest_share(exponent: float, updates: int) -> float:
    """What the newest weights count for in the average after `updates` (from 1) of them."""
    return 1 - (1 - 1 / updates) ** (exponent + 1)


class Profile:
    """tau^g on (0, t], of integral 1."""

    def __init__(self, exponent: float, time: float) -> None:
        self.exponent, self.time = exponent, time

    def dot(self, other: "Profile") -> float:
        """The integral of the product: of tau^(g + h) up to the earlier end, both normalised."""
        g, h = self.exponent, other.exponent
        early = min(self.time, other.time)
        shares = (early / self.time) ** (g + 1) * (early / other.time) ** (h + 1)
        return (g + 1) * (h + 1) * shares / ((g + h + 1) * early)


def coefficients(kept: Sequence[Profile], wanted: Profile) -> list[float]:
    """How much of each kept average makes the wanted one, nearest in the mean square."""
    matrix = torch.tensor([[a.dot(b) for b in kept] for a in kept], dtype=torch.float64)
    right = torch.tensor([a.dot(wanted) for a in kept], dtype=torch.float64)
    # Close snapshots make it nearly singular: the smallest solution, by SVD.
    found = torch.linalg.lstsq(matrix, right[:, None], rcond=1e-12, driver="gelsd").solution
    return [float(value) for value in found[:, 0]]
