"""How long a rank may stay in a section; of the sections of a step, learnt from earlier ones."""

import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from echolab.errors import ConfigError
from echolab.heartbeat import Beat

STEP = ("forward", "backward", "optimizer", "vote")  # the sections of a step: one deadline
TICK_SECONDS = 2.0  # that may pass between two looks of a supervisor that is run
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
                raise ConfigError(f"timeouts.{name}={value:g}: must be above 0 seconds")
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


def unheard_limit(deadlines: Deadlines, grace: float | None, beats: Iterable[Beat]) -> float | None:
    """Return the seconds after a signal within which a step must end; None: none must.

    `grace` is the time until the ranks are killed, None where nobody will.  Then a step may take
    its usual time, and other sections have deadlines of their own.  Nobody waits for the vote of
    ranks that save or end already.
    """
    told = dict(enumerate(beats))
    sections = {beat.section for beat in told.values()}
    if sections & {"save", "teardown"}:
        return None
    if grace is not None:
        return grace
    if sections - {*STEP, "data_wait"}:
        return None
    stays = longest_of(told)
    waits = min(deadlines.factor * stays["data_wait"], deadlines.data_wait)
    return max(limit(deadlines, "step", stays), waits)


class RunningClock:
    """Measures the time in which this process was run.

    While a job is frozen or stopped as a whole, or the machine sleeps, nothing ticks; such a gap is
    no time in which anybody could have made progress.
    """

    def __init__(self) -> None:
        self._ticked = time.monotonic()
        self._gaps: list[tuple[float, float]] = []

    def tick(self) -> float:
        """Return time.monotonic(); to be called often."""
        now = time.monotonic()
        if now - self._ticked > TICK_SECONDS:
            self._gaps.append((self._ticked + TICK_SECONDS, now))
        self._ticked = now
        return now

    def ran(self, since: float) -> float:
        """Return the seconds from `since`, of time.monotonic(), to the last tick, without gaps."""
        lost = sum(max(end - max(begin, since), 0.0) for begin, end in self._gaps)
        return self._ticked - since - lost
