"""How long a rank may stay in a section; of the sections of a step, learnt from earlier ones."""

from collections.abc import Mapping
from typing import NamedTuple

from echolab.errors import ConfigError
from echolab.training.sections import Beat

STEP = ("forward", "backward", "optimizer", "vote")  # the sections of a step: one deadline
KINDS = ("init", "first_step", "step", "eval", "save", "data_wait", "teardown")


class Deadlines(NamedTuple):
    """Seconds.  `step` is a ceiling: a step may take `factor` times the longest seen, or `floor`.

    The others are not learnt.  What shares a section may take a thousand times as long as what was
    seen of it: a validation and the parity gate, a copy and a whole save, a batch and a reference.
    """

    init: float = 1800.0
    first_step: float = 1800.0
    step: float = 600.0
    eval: float = 3600.0
    save: float = 1800.0
    data_wait: float = 900.0
    teardown: float = 300.0
    factor: float = 10.0
    floor: float = 60.0

    def check(self) -> "Deadlines":
        """Itself; ConfigError for what is not positive."""
        for name, value in self._asdict().items():
            if not value > 0:
                raise ConfigError(f"supervise.{name}={value:g}: must be above 0 seconds")
        return self


def kind_of(beat: Beat) -> str | None:
    """Which deadline holds for a beat; None for a pause."""
    if beat.section == "pause":
        return None
    if beat.section not in STEP:
        return beat.section
    # Compilation, allocation and the choice of kernels are in the first step.
    return "step" if 0 <= beat.first < beat.step - 1 else "first_step"


def limit(deadlines: Deadlines, kind: str, longest: Mapping[str, float]) -> float:
    """Seconds allowed; for a step the ceiling where none was seen yet."""
    ceiling = float(getattr(deadlines, kind))
    if kind != "step" or not (seen := max(longest[name] for name in STEP)):
        return ceiling
    return min(max(deadlines.factor * seen, deadlines.floor), ceiling)


def longest_of(beats: Mapping[int, Beat]) -> dict[str, float]:
    """The longest stay of any rank, by section."""
    stays: dict[str, float] = {}
    for beat in beats.values():
        for name, seconds in beat.longest.items():
            stays[name] = max(stays.get(name, 0.0), seconds)
    return stays


def overdue(
    beats: Mapping[int, Beat], now: float, deadlines: Deadlines, *, elsewhere: bool = False
) -> dict[int, float]:
    """Ranks past their limit, with it in seconds; empty where somebody is rightly waited for.

    A rank within a step waits for the slowest: while another that is not ahead of it loads data,
    validates or saves, and may, it is not to blame.  With ranks `elsewhere` that cannot be seen a
    step may take as long as waiting for data.
    """
    stays = longest_of(beats)
    limits: dict[int, float] = {}
    for rank, beat in beats.items():
        if kind := kind_of(beat):
            limits[rank] = limit(deadlines, kind, stays)
            if elsewhere and kind == "step":
                waiting = limit(deadlines, "data_wait", stays)
                limits[rank] = max(limits[rank], waiting)
    late = {r: limits[r] for r in limits if now - beats[r].since > limits[r]}

    def excused(rank: int) -> bool:
        return beats[rank].section in STEP and any(
            other not in late and beat.section not in STEP and beat.step <= beats[rank].step
            for other, beat in beats.items()
            if other in limits
        )

    return {rank: allowed for rank, allowed in late.items() if not excused(rank)}
