"""Whether a checkpoint will fit on the disk, asked before it is begun."""

import os
from pathlib import Path

from echolab.errors import SaveError

SPARE = 1.05  # for headers, folders and what else is written meanwhile
FACTOR = 2  # at the start of a run: a new one is whole before an old one goes


def check_room(folder: Path, needed: int, files: int = 20) -> None:
    """SaveError where `folder`'s disk has not `needed` bytes x 1.05, or not so many inodes.

    Looks at what a user without privileges may take.  A quota shows only when a write fails.
    """
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    wanted = int(needed * SPARE)
    if free < wanted:
        raise SaveError(
            f"{folder}: a checkpoint needs {wanted:,} bytes, {free:,} are free; make room, or "
            "give another run folder"
        )
    if found.f_files and found.f_favail < files:  # 0: a file system without fixed inodes
        raise SaveError(
            f"{folder}: a checkpoint needs {files} inodes, {found.f_favail} are free; remove files "
            "there, or give another run folder"
        )
