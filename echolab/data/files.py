"""Files that are whole or not there, and files that only grow."""

import errno
import os
from pathlib import Path

from echolab.errors import ConfigError, DataError


def write_whole(path: Path, data: bytes) -> None:
    """Write to a temporary name beside `path`, then rename: no reader ever sees half a file.

    Raises DataError, in one line, when the disk is full or the folder cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        if partial.is_symlink() and (partial.is_file() or not partial.exists()):
            partial.unlink()  # in a stranger's folder: it would be written through
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        remove_quietly(partial)
        raise write_error(path, error) from error


def prove_writable(out: Path, *, folder: bool = False) -> None:
    """Make the folder that `out` is to be written in, and write and remove a small file there.

    For the start of a command, so that no work is done for what cannot be kept.  With `folder`,
    `out` is to be a folder itself.  Raises ConfigError.
    """
    if not folder and out.is_dir():
        raise ConfigError(f"{out}: is a folder; name a file in it")
    if folder and out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; name a folder")
    probe = (out if out.is_dir() else out.parent) / f"{out.name}.{os.getpid()}.trial"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"x")
        finally:
            remove_quietly(probe)
    except OSError as error:
        what = error.strerror or str(error)
        raise ConfigError(f"{out}: cannot be written ({what}); give another place") from error


def sync(path: Path) -> None:
    """Have a file or folder on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_text(path: Path, text: str) -> None:
    """Add whole lines to a file, below whatever a killed process left of one.

    Raises DataError, in one line, when the disk is full or the folder cannot be written; what was
    there stays.
    """
    try:
        with path.open("ab+") as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                text = "\n" + text
            file.write(text.encode())
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> DataError:
    """The one line for a file that could not be written."""
    remedy = {
        errno.ENOSPC: "free some space or choose another folder",
        errno.EDQUOT: "free some of your quota or choose another folder",
        errno.EFBIG: "raise the file size limit (ulimit -f) or choose another folder",
    }.get(error.errno or 0, "check that the folder exists and can be written")
    what = error.strerror or str(error)
    return DataError(f"{path}: could not be written ({what}); {remedy}")


def remove_quietly(path: Path) -> None:
    """Remove a leftover; one that cannot be removed is no reason to hide the first error."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass
