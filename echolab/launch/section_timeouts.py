"""Timeouts of sections: how long a rank may stay in one before it counts as hung."""

import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from echolab.errors import ConfigError
from echolab.heartbeat import HeartbeatState

STEP = ("forward", "backward", "optimizer", "vote")  # the sections of a step share one timeout
TICK_SECONDS = 2.0  # the longest pause between two polls of a supervisor that is running


class SectionTimeouts(NamedTuple):
    """Timeouts in seconds.

    `step` is an upper bound: a step may take `safety_factor` times the longest step so far, and at
    least `min_step_timeout`.  The other timeouts are fixed, because one section covers work of very
    different length: a validation and the export check, a copy and a full checkpoint, a batch and a
    reference.
    """

    init: float = 1800.0
    first_step: float = 1800.0
    step: float = 600.0
    eval: float = 3600.0
    save: float = 1800.0
    data_wait: float = 900.0
    teardown: float = 300.0
    safety_factor: float = 10.0
    min_step_timeout: float = 60.0

    def check(self) -> "SectionTimeouts":
        """Return self; raise ConfigError for a value that is not positive."""
        for name, value in self._asdict().items():
            if not value > 0:
                raise ConfigError(f"timeouts.{name}={value:g}: must be above 0 seconds")
        return self


def timeout_name(state: HeartbeatState) -> str | None:
    """Return the name of the timeout that applies to a rank; None during a pause."""
    if state.section == "pause":
        return None
    if state.section not in STEP:
        return state.section
    # The first step includes compilation, allocation and the choice of kernels.
    return "step" if 0 <= state.first_step < state.step - 1 else "first_step"


def allowed_seconds(timeouts: SectionTimeouts, name: str, longest: Mapping[str, float]) -> float:
    """Return the seconds allowed by timeout `name`; `longest` are the longest stays by section."""
    upper_bound = float(getattr(timeouts, name))
    if name != "step" or not (longest_step := max(longest[section] for section in STEP)):
        return upper_bound
    return min(max(timeouts.safety_factor * longest_step, timeouts.min_step_timeout), upper_bound)


def longest_stays(states: Iterable[HeartbeatState]) -> dict[str, float]:
    """Return the longest stay in seconds of any rank, by section."""
    stays: dict[str, float] = {}
    for state in states:
        for section, seconds in state.longest.items():
            stays[section] = max(stays.get(section, 0.0), seconds)
    return stays


def overdue_ranks(
    states: Mapping[int, HeartbeatState],
    now: float,
    timeouts: SectionTimeouts,
    *,
    has_remote_ranks: bool = False,
) -> dict[int, float]:
    """Return the ranks that exceeded their timeout, each with that timeout in seconds.

    A rank within a step waits for the slowest rank.  It is excused while another rank that is not
    ahead of it loads data, validates or saves within its own timeout.  With `has_remote_ranks`,
    which cannot be observed, a step may take as long as a wait for data.
    """
    # Find each rank's timeout.
    longest = longest_stays(states.values())
    limits: dict[int, float] = {}
    for rank, state in states.items():
        if name := timeout_name(state):
            limits[rank] = allowed_seconds(timeouts, name, longest)
            if has_remote_ranks and name == "step":
                limits[rank] = max(limits[rank], allowed_seconds(timeouts, "data_wait", longest))
    overdue = {rank: limits[rank] for rank in limits if now - states[rank].since > limits[rank]}

    # Excuse those that wait for a rank that is still within its own.
    def is_excused(rank: int) -> bool:
        return states[rank].section in STEP and any(
            other not in overdue and state.section not in STEP and state.step <= states[rank].step
            for other, state in states.items()
            if other in limits
        )

    return {rank: seconds for rank, seconds in overdue.items() if not is_excused(rank)}


def stop_timeout(
    timeouts: SectionTimeouts, grace: float | None, states: Iterable[HeartbeatState]
) -> float | None:
    """Return the seconds after a signal within which a step must end; None if there is no limit.

    `grace` is the time until the ranks are killed, None if nothing kills them.  Without it a step
    may take its usual time, and the other sections have their own timeouts.  No step has to end if
    a rank saves or exits already.
    """
    states = list(states)
    sections = {state.section for state in states}
    if sections & {"save", "teardown"}:
        return None
    if grace is not None:
        return grace
    if sections - {*STEP, "data_wait"}:
        return None
    longest = longest_stays(states)
    data_wait = min(timeouts.safety_factor * longest["data_wait"], timeouts.data_wait)
    return max(allowed_seconds(timeouts, "step", longest), data_wait)


class RunningClock:
    """Clock that excludes the time in which this process did not run.

    While a job is suspended or the machine sleeps, nothing ticks.  No rank could have made progress
    during such a gap.
    """

    def __init__(self) -> None:
        self._last_tick = time.monotonic()
        self._gaps: list[tuple[float, float]] = []

    def tick(self) -> float:
        """Return time.monotonic() and record a gap if there was one; call it often."""
        now = time.monotonic()
        if now - self._last_tick > TICK_SECONDS:
            self._gaps.append((self._last_tick + TICK_SECONDS, now))
        self._last_tick = now
        return now

    def elapsed(self, since: float) -> float:
        """Return the seconds from time.monotonic() `since` to the last tick, without gaps."""
        gaps = sum(max(end - max(begin, since), 0.0) for begin, end in self._gaps)
        return self._last_tick - since - gaps
