"""Retention: removal of old checkpoints and of what killed attempts left."""

import shutil
from collections.abc import Callable
from pathlib import Path

from echolab.errors import CheckpointError
from echolab.training.checkpoints.checkpoint import (
    REPLACED,
    discard,
    folder_of,
    open_checkpoint,
    recover,
    saved_steps,
)

PARTIAL = ".partial-"  # a folder that is being written
NEVER_FEWER = 2  # valid ones that stay at least
ASIDE = "rolled-back-"  # and a number: a folder of those that a rollback moved away


def tidy(folder: Path) -> None:
    """Create the folder, and remove what a killed save left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
    # Killed saves leave partial folders, here and among the snapshots.
    for path in [*folder.rglob(f"{PARTIAL}*"), *folder.glob(f"{REPLACED}*")]:
        shutil.rmtree(path, ignore_errors=True)


class Retention:
    """Keeps the newest valid checkpoints, and those that `keep` is true for.

    `check` raises if nothing may be removed any more.
    """

    def __init__(
        self,
        folder: Path,
        keep: Callable[[int], bool],
        newest: int = 2,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.keep, self.newest = folder, keep, max(newest, NEVER_FEWER)
        self.check = check
        self.valid: dict[int, bool] = {}  # by step: verified, or written by this process

    def _is_valid(self, step: int) -> bool:
        if step not in self.valid:
            try:
                open_checkpoint(folder_of(self.folder, step))
                self.valid[step] = True
            except CheckpointError:
                self.valid[step] = False
        return self.valid[step]

    def prune(self, last: int) -> None:
        """Remove checkpoints older than `last` once enough newer ones are known to be complete.

        One from an earlier attempt is verified before it counts.  Those above `last` are left.
        """
        newer = 0
        for step in [step for step in saved_steps(self.folder) if step <= last]:
            # Enough newer ones are valid: this one may go, unless it is to be kept.
            if newer >= self.newest:
                if not self.keep(step):
                    self.check()
                    discard(folder_of(self.folder, step))
            elif self._is_valid(step):
                newer += 1


def set_aside(folder: Path, step: int) -> Path | None:
    """Move all checkpoints newer than `step` to rolled-back-<n>, which nothing reads.

    The newest first: if killed midway, the run resumes from the newest one left.  Return the new
    folder, or None if there was nothing to move; raise OSError.
    """
    newer = [other for other in saved_steps(folder) if other > step]
    if not newer:
        return None
    # A fresh folder each time: an earlier rollback is never overwritten.
    numbers = [int(path.name.removeprefix(ASIDE)) for path in folder.glob(f"{ASIDE}*")]
    to = folder / f"{ASIDE}{max(numbers, default=0) + 1}"
    to.mkdir()
    for other in newer:
        path = folder_of(folder, other)
        path.rename(to / path.name)
    return to
