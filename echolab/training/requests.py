"""Files in the run folder by which anybody who may write there steers a run that is going on.

STOP   save, and end; the same command goes on later        SAVE   save at this step, and go on
PAUSE  save, and wait until the file is removed             PRUNE  end: a sweep has seen enough

They are looked for by rank 0, about once a second, and removed once acted upon, PAUSE apart.
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path

from echolab.training import ranks
from echolab.training.stopping import StopSignals

REQUESTS = ("STOP", "SAVE", "PAUSE", "PRUNE")
SECONDS = 1.0  # between two looks: a shared file system answers slowly
MARGIN_SECONDS = 60.0  # before a job's end: for the step that goes on, and for leaving


class Requests:
    """What is asked for in one run folder."""

    def __init__(self, folder: Path, fenced: Callable[[], bool] | None = None) -> None:
        """`fenced` says whether another process has taken the run: looked at as often."""
        self.folder, self._fenced = folder, fenced or (lambda: False)
        self._looked = float("-inf")
        self._found: set[str] = set()

    def pending(self) -> set[str]:
        """Names of REQUESTS that are there, and FENCED where the run is not ours any more."""
        if time.monotonic() - self._looked >= SECONDS:
            self._looked = time.monotonic()
            self._found = {name for name in REQUESTS if (self.folder / name).exists()}
            self._found |= {"FENCED"} if self._fenced() else set()
        return self._found

    def clear(self, *names: str) -> None:
        """They were acted upon; rank 0 removes the files."""
        if ranks.rank() == 0:
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
                self._found.discard(name)


def asked(
    signals: StopSignals, requests: Requests, *, job_ends: float, needed: float
) -> dict[str, float]:
    """This rank's part of the vote (`vote.Vote`) on whether to end, save or wait.

    `needed` is how many seconds it takes to come to the end with a checkpoint.  One clock alone
    counts, and one pair of eyes: rank 0's.
    """
    told = {"late": float(needed > signals.seconds_left)}
    if signals.received:
        told[signal.Signals(signals.received).name.lower()] = 1.0
    if ranks.rank() == 0:
        told["time"] = float(time.time() + needed + MARGIN_SECONDS > job_ends)
        told |= {name.lower(): 1.0 for name in requests.pending()}
    return told
