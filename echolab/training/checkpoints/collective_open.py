"""Checkpoints that all ranks open: rank 0 verifies every byte, the others see that it is the same.

All functions are collective, and raise CheckpointError or StorageError on every rank or on none.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from echolab.atomic_io import read_error
from echolab.errors import CheckpointError, StorageError
from echolab.training import distributed
from echolab.training.checkpoints.checkpoint import (
    Checkpoint,
    latest_valid,
    open_checkpoint,
    open_verified,
    recover,
    saved_steps,
)
from echolab.training.checkpoints.manifest import REMEDY


def open_alike(path: Path) -> Checkpoint:
    """The checkpoint at `path`."""
    found = _alike(path.parent, lambda: open_checkpoint(path))
    assert found
    return found


def newest(folder: Path, at_most: int | None = None) -> Checkpoint | None:
    """The newest valid one, of step `at_most` or before; rank 0 says which it passed over."""

    def find() -> Checkpoint | None:
        recover(folder)
        found, rejected = latest_valid(folder, at_most)
        for line in rejected:
            print(f"echolab: passed over: {line}", file=sys.stderr)
        return found

    return _alike(folder, find)


def oldest(folder: Path, at_most: int) -> Checkpoint | None:
    """The oldest valid one, of step `at_most` or before."""

    def find() -> Checkpoint | None:
        steps = sorted(step for step in saved_steps(folder) if step <= at_most)
        tried = (latest_valid(folder, step)[0] for step in steps)
        return next((found for found in tried if found), None)

    return _alike(folder, find)


def _alike(folder: Path, find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """What `find` returns on rank 0: one in `folder`, which other ranks may see later or not."""
    found: Checkpoint | None = None
    fault, broken, told = "", "", "[]"
    if distributed.rank() == 0:
        try:
            found = find()
        except CheckpointError as error:
            fault = str(error)
        except StorageError as error:
            broken = str(error)
        except OSError as error:
            broken = str(read_error(folder, error))
        told = json.dumps([found.path.name, found.digest] if found else [])
    distributed.raise_together(CheckpointError, fault)
    distributed.raise_together(StorageError, broken)
    told = distributed.gather_text(told)[0]
    if json.loads(told) and distributed.rank() > 0:
        name, digest = json.loads(told)
        try:
            found = open_verified(folder / name)
            if found.digest != digest:
                fault = f"{folder / name}: is not the checkpoint that rank 0 found; {REMEDY}"
        except CheckpointError as error:
            fault = str(error)
        except StorageError as error:
            broken = str(error)
    distributed.raise_together(CheckpointError, fault)
    distributed.raise_together(StorageError, broken)
    return found
