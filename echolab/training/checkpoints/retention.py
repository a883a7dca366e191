"""Retention of checkpoints: remove old checkpoints and partial folders, and keep snapshots.

    checkpoints/snapshots/step-000500/  the power averages of a checkpoint, its state, a manifest

A snapshot is a checkpoint with only the power averages, from which an EMA of any width can be
computed after training (`engine.ema`).  Its files are hard links to those of the checkpoint, so
they remain when the checkpoint is removed.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from echolab.errors import CheckpointError
from echolab.training.checkpoints.checkpoint import (
    REPLACED,
    Checkpoint,
    discard,
    folder_of,
    open_checkpoint,
    recover,
    saved_steps,
)
from echolab.training.checkpoints.manifest import MANIFEST, STATE, Manifest, files_of, serialize
from echolab.training.engine.ema import POWER, Profile, coefficients, exponent_of

PARTIAL = ".partial-"  # prefix of a folder that is being written
NEVER_FEWER = 2  # minimum number of valid checkpoints to keep
ASIDE = "rolled-back-"  # prefix of a folder (with a number) of checkpoints that a rollback moved


def tidy(folder: Path) -> None:
    """Create the folder, and remove partial folders of killed saves."""
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
    # Partial folders may exist here and among the snapshots.
    for path in [*folder.rglob(f"{PARTIAL}*"), *folder.glob(f"{REPLACED}*")]:
        shutil.rmtree(path, ignore_errors=True)


class Retention:
    """Keeps the `newest` valid checkpoints, and all checkpoints whose step passes `keep`.

    `check` raises if this process must not remove files, since another took over the run.
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
        self.valid: dict[int, bool] = {}  # by step: whether verified, or written by this process

    def _is_valid(self, step: int) -> bool:
        if step not in self.valid:
            try:
                open_checkpoint(folder_of(self.folder, step))
                self.valid[step] = True
            except CheckpointError:
                self.valid[step] = False
        return self.valid[step]

    def prune(self, last: int) -> None:
        """Remove old checkpoints up to step `last`, except the newest valid ones.

        A checkpoint of an earlier attempt is verified before it counts as valid.  Checkpoints above
        `last` are not removed.
        """
        newer = 0
        for step in [step for step in saved_steps(self.folder) if step <= last]:
            # Remove this checkpoint if enough newer ones are valid and `keep` does not protect it.
            if newer >= self.newest:
                if not self.keep(step):
                    self.check()
                    discard(folder_of(self.folder, step))
            elif self._is_valid(step):
                newer += 1


def set_aside(folder: Path, step: int) -> Path | None:
    """Move all checkpoints newer than `step` to rolled-back-<n>, which is never read.

    The newest is moved first, so that after a kill the run resumes from the newest checkpoint that
    was not moved.  Return the new folder, or None if there was nothing to move; raise OSError.
    """
    newer = [newer_step for newer_step in saved_steps(folder) if newer_step > step]
    if not newer:
        return None
    # Use a new folder each time, so that earlier rollbacks are not overwritten.
    indices = [int(path.name.removeprefix(ASIDE)) for path in folder.glob(f"{ASIDE}*")]
    target = folder / f"{ASIDE}{max(indices, default=0) + 1}"
    target.mkdir()
    for newer_step in newer:
        path = folder_of(folder, newer_step)
        path.rename(target / path.name)
    return target


SNAPSHOTS = "snapshots"


def keep_snapshot(written: Path, manifest: Manifest, folder: Path) -> None:
    """Keep the power averages in `written` as a snapshot in `folder`; raise OSError."""
    parts = {part: names for part, names in files_of(manifest).items() if part.startswith(POWER)}
    names = [STATE, *(name for own in parts.values() for name in own)]
    path = folder_of(folder, manifest["step"])
    # Write under a temporary name, so that a killed save leaves no incomplete snapshot.
    partial = folder / f".partial-{path.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in names:
        try:
            # Hard links need no space, and remain when the checkpoint is removed.
            os.link(written / name, partial / name)
        except OSError:  # the file system has no hard links
            shutil.copyfile(written / name, partial / name)
    files = {name: manifest["files"][name] for name in sorted(names)}
    (partial / MANIFEST).write_bytes(serialize({**manifest, "files": files}))
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


def _power_averages(newest: Checkpoint) -> list[tuple[Checkpoint, str, Profile]]:
    """Return (checkpoint, part, profile) of every power average up to the newest checkpoint."""
    folder = newest.path.parent / SNAPSHOTS
    earlier = [step for step in saved_steps(folder) if step < newest.step]
    sources = []
    # Use every snapshot before the checkpoint, and the checkpoint itself.
    for checkpoint in [*(open_checkpoint(folder_of(folder, s)) for s in earlier[::-1]), newest]:
        for part in checkpoint.parts:
            if part.startswith(POWER):
                sigma = float(part.removeprefix(POWER))
                profile = Profile(exponent_of(sigma), checkpoint.state["ema"]["updates"])
                sources.append((checkpoint, part, profile))
    return sources


def average_of_width(newest: Checkpoint, sigma: float) -> dict[str, Tensor]:
    """Return the EMA of width `sigma` at a checkpoint, by parameter name, in fp32.

    Raise CheckpointError if the run kept no power averages, or a snapshot is damaged.
    """
    requested = Profile(exponent_of(sigma), newest.state["ema"]["updates"])
    sources = _power_averages(newest)
    if not sources:
        raise CheckpointError(
            f"{newest.path}: this run kept no averages to make another from; train with "
            "optim.posthoc_ema_stds=[0.05,0.1] and snapshot_every"
        )
    # Express the requested profile as a linear combination of the saved profiles.
    shares = coefficients([profile for _, _, profile in sources], requested)
    opened = [checkpoint.tensors(part) for checkpoint, part, _ in sources]
    return {name: _weighted_sum(opened, shares, name) for name in opened[-1]}


def _weighted_sum(
    opened: Sequence[Mapping[str, Tensor]], shares: Sequence[float], name: str
) -> Tensor:
    """Sum in double precision, since large coefficients of opposite signs nearly cancel."""
    total = torch.zeros(opened[-1][name].shape, dtype=torch.float64)
    for tensors, share in zip(opened, shares, strict=True):
        total += share * tensors[name].double()
    return total.float()
