"""Who is next, when several take turns by weight: a pure function of the position.

Position p falls on a point of [0, 1) that moves on by the golden ratio, and each member owns an
interval as long as its weight.  Such points lie evenly, so a member has had its share, give or take
a few, at every moment; and how many points of the first p fall into an interval is a sum of floors,
which takes a hundred small steps whatever p is.  All in integers: the same on every machine.
"""

from collections.abc import Sequence

import numpy as np

from echolab.data.shuffle import random_bits
from echolab.errors import ConfigError

TURN = 1 << 64  # a full turn of the circle
GOLDEN = 0x9E3779B97F4A7C15  # TURN / golden ratio, odd


def floor_sum(count: int, modulus: int, slope: int, offset: int) -> int:
    """Sum of (slope * i + offset) // modulus over i in [0, count), as Euclid would."""
    total = 0
    while count:
        quotient, slope = divmod(slope, modulus)
        total += count * (count - 1) // 2 * quotient
        quotient, offset = divmod(offset, modulus)
        total += count * quotient
        # What is left counts lattice points below a line: look at them from the other axis.
        top = slope * count + offset
        count, offset = divmod(top, modulus)
        modulus, slope = slope, modulus
    return total


class Mixing:
    """Members by weight; weights are relative, and a member of weight 0 never has a turn."""

    def __init__(self, weights: Sequence[float], *parts: object) -> None:
        """`parts` name the seed.  Raises ConfigError for weights that say nothing."""
        if not weights or not all(0 <= w < float("inf") for w in weights) or not sum(weights):
            raise ConfigError(
                f"weights {list(weights)}: need one 0 or more for each dataset, and one above 0"
            )
        total = sum(weights)
        last = max(i for i, weight in enumerate(weights) if weight)  # it owns what rounding leaves
        self._bounds = [0]
        for i, weight in enumerate(weights):
            end = self._bounds[-1] + round(weight / total * TURN)
            self._bounds.append(min(end, TURN) if i < last else TURN)
        self._start = int(random_bits(1, *parts, "mixing")[0])

    def before(self, position: int) -> list[int]:
        """How many of the first `position` turns each member had."""

        def below(bound: int) -> int:
            """Points in [0, bound): those that wrap around when TURN - bound is added do not."""
            wraps = floor_sum(position, TURN, GOLDEN, self._start + TURN - bound)
            return position - (wraps - floor_sum(position, TURN, GOLDEN, self._start))

        counts = [below(bound) for bound in self._bounds]
        return [after - before for before, after in zip(counts, counts[1:], strict=False)]

    def members(self, first: int, stop: int) -> np.ndarray:
        """Who has the turns [first, stop); int64."""
        at = np.arange(first, stop, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(self._start)
        inner = [bound for bound in self._bounds[1:] if bound < TURN]
        return np.searchsorted(np.array(inner, dtype=np.uint64), at, side="right")
