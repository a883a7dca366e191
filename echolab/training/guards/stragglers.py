"""Stragglers: ranks slower than the others, with their host and section of the step.

Only sections without collectives are compared: in the others the fast ranks wait for the slow.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from echolab.training import distributed

OWN_PACE = ("data_wait", "forward")  # sections in which no rank waits for another
STEP = ("data_wait", "forward", "backward", "optimizer", "vote")
SHARE = 0.05  # of the step: shorter sections are ignored
LIMIT = 0.75  # of the score
WINDOWS = 3  # in a row


class Straggler(NamedTuple):
    """A rank that has been slow for some windows in a row."""

    rank: int
    host: str
    section: str
    score: float  # seconds of the fastest rank / its own, in the last window
    seconds: float  # its own, in the last window
    best: float  # the fastest rank's

    @property
    def words(self) -> str:
        """One line for people."""
        return (
            f"rank {self.rank} on {self.host} is slow in {self.section}: {self.seconds:.3g} s, "
            f"the fastest rank {self.best:.3g} s (score {self.score:.2f})"
        )


def scores(
    windows: Sequence[Mapping[str, float]], sections: Sequence[str] = OWN_PACE
) -> list[dict[str, float]]:
    """Return best / own in 0 to 1 for each rank and section, given its seconds by section.

    A section counts for a rank that spends at least SHARE of its step in it.
    """
    best = {name: min(window[name] for window in windows) for name in sections}
    return [
        {
            name: best[name] / window[name]
            for name in sections
            if window[name] > 0 and window[name] >= SHARE * sum(window[n] for n in STEP)
        }
        for window in windows
    ]


class Stragglers:
    """Compares the ranks' seconds from one call of `look` to the next."""

    def __init__(self, hosts: Sequence[str], sections: Sequence[str] = OWN_PACE) -> None:
        """Set the `hosts` by rank.

        Leave out of `sections` those with collectives: `forward` has some under ZeRO 3 and if ranks
        share a clip.
        """
        self.hosts, self.sections = list(hosts), tuple(sections)
        self._last = dict.fromkeys(STEP, 0.0)
        self._low: dict[tuple[int, str], int] = {}  # windows in a row

    def start(self, seconds: Mapping[str, float]) -> None:
        """Begin a window; what came before, such as the first step, is left out."""
        self._last = {name: seconds[name] for name in STEP}

    def look(self, seconds: Mapping[str, float]) -> tuple[dict[str, float], list[Straggler]]:
        """Return values for the log, and ranks that have just been slow for WINDOWS windows.

        `seconds` is `Heartbeat.seconds`.  Collective: one all-reduce of a few numbers for each
        rank.
        """
        own = [seconds[name] - self._last[name] for name in STEP]
        self.start(seconds)
        world, rank, width = distributed.world(), distributed.rank(), len(STEP)
        if world == 1:
            return {}, []
        # Each rank fills its own row; the sum over ranks is the table.
        flat = [0.0] * (world * width)
        flat[rank * width : (rank + 1) * width] = own
        flat = distributed.sums(flat)
        rows = [flat[first : first + width] for first in range(0, len(flat), width)]
        return self.judge([dict(zip(STEP, row, strict=True)) for row in rows])

    def judge(
        self, windows: Sequence[Mapping[str, float]]
    ) -> tuple[dict[str, float], list[Straggler]]:
        """Return the same, given all ranks' seconds of one window."""
        stragglers, low = [], {}
        of_ranks = scores(windows, self.sections)
        for rank, own in enumerate(of_ranks):
            for section, score in own.items():
                if score >= LIMIT:
                    continue
                # Slow in several windows in a row, reported once.
                low[rank, section] = self._low.get((rank, section), 0) + 1
                if low[rank, section] == WINDOWS:
                    spent = windows[rank][section]
                    best = score * spent
                    host = self.hosts[rank]
                    stragglers.append(Straggler(rank, host, section, score, spent, best))
        self._low = low
        worst = min((score for own in of_ranks for score in own.values()), default=1.0)
        return {"perf/straggler_score": worst}, stragglers
