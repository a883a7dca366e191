"""Control files: whoever may write to the run folder steers a running training by them.

STOP   save and end; the same command resumes             SAVE   save at this step
PAUSE  save and wait until the file is removed            PRUNE  end: a sweep needs no more of it

Rank 0 checks for them about once a second, and removes them once they were acted upon; PAUSE stays.
A file that cannot be checked counts as absent.  A file that cannot be removed, such as a folder
that is not empty, is acted upon once.
"""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from echolab.atomic_io import describe_error
from echolab.training import distributed

REQUESTS = ("STOP", "SAVE", "PAUSE", "PRUNE")
SECONDS = 1.0  # between two checks: a shared file system answers slowly


class ControlFiles:
    """The control files of one run folder."""

    def __init__(self, folder: Path, fenced: Callable[[], bool] | None = None) -> None:
        """Watch `folder`; `fenced` returns whether another process has taken the run."""
        self.folder, self._fenced = folder, fenced or (lambda: False)
        self._checked = float("-inf")
        self._pending: set[str] = set()
        self._done: dict[str, float] = {}  # ctime of those that cannot be removed

    def pending(self) -> set[str]:
        """Return the names of REQUESTS that are there, and FENCED if another has taken the run."""
        if time.monotonic() - self._checked >= SECONDS:
            self._checked = time.monotonic()
            made = {name: self._changed(name) for name in REQUESTS}
            self._pending = {n for n, at in made.items() if at and self._done.get(n) != at}
            with suppress(OSError):  # the next check may succeed
                self._pending |= {"FENCED"} if self._fenced() else set()
        return self._pending

    def _changed(self, name: str) -> float:
        """Return when a file was changed last, in seconds since 1970; 0 if there is none."""
        try:
            return (self.folder / name).lstat().st_ctime
        except OSError:
            return 0.0

    def clear(self, *names: str) -> None:
        """Remove the files of these requests, on rank 0, after they were acted upon."""
        if distributed.rank() > 0:
            return
        for name in names:
            path, made = self.folder / name, self._changed(name)
            self._pending.discard(name)
            try:
                if path.is_dir() and not path.is_symlink():
                    path.rmdir()
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:
                if self._done.get(name) != made:
                    words = f"was acted upon, but cannot be removed ({describe_error(error)})"
                    print(f"echolab: {path}: {words}; remove it", file=sys.stderr, flush=True)
                self._done[name] = made
