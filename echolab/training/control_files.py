"""Files in the run folder by which anybody who may write there steers a run that is going on.

STOP   save, and end; the same command goes on later        SAVE   save at this step, and go on
PAUSE  save, and wait until the file is removed             PRUNE  end: a sweep has seen enough

They are looked for by rank 0, about once a second, and removed once acted upon, PAUSE apart.  One
that cannot be looked for is not there; one that cannot be removed, such as a folder that is not
empty or a file that must not be changed, is acted upon once.
"""

import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from echolab.atomic_io import described
from echolab.training import distributed
from echolab.training.signals import StopSignals

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
        self._done: dict[str, float] = {}  # ctime of those that cannot be removed

    def pending(self) -> set[str]:
        """Return the names of REQUESTS that are there, and FENCED if another has taken the run."""
        if time.monotonic() - self._looked >= SECONDS:
            self._looked = time.monotonic()
            made = {name: self._made(name) for name in REQUESTS}
            self._found = {n for n, at in made.items() if at and self._done.get(n) != at}
            with suppress(OSError):  # the next look may succeed
                self._found |= {"FENCED"} if self._fenced() else set()
        return self._found

    def _made(self, name: str) -> float:
        """Return when a request was made or changed last; 0 where there is none."""
        try:
            return (self.folder / name).lstat().st_ctime
        except OSError:
            return 0.0

    def clear(self, *names: str) -> None:
        """They were acted upon; rank 0 removes them."""
        if distributed.rank() > 0:
            return
        for name in names:
            path, made = self.folder / name, self._made(name)
            self._found.discard(name)
            try:
                if path.is_dir() and not path.is_symlink():
                    path.rmdir()
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:
                if self._done.get(name) != made:
                    words = f"was acted upon, but cannot be removed ({described(error)})"
                    print(f"echolab: {path}: {words}; remove it", file=sys.stderr, flush=True)
                self._done[name] = made


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
    if distributed.rank() == 0:
        told["time"] = float(time.time() + needed + MARGIN_SECONDS > job_ends)
        told |= {name.lower(): 1.0 for name in requests.pending()}
    return told
