"""Files that are whole or not there, and files that only grow."""

import errno
import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from echolab.errors import BusyError, ConfigError, DataError

LOCK = ".lock"
_HELD: dict[Path, int] = {}  # locks of this process, and the thread that holds each


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


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; raise DataError, in one line, if that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep all other writers out of a folder while the block runs.

    The lock is the kernel's, so that it goes with its holder however that ends.  The thread that
    holds a folder may take it again.  Raises BusyError, which names the holder, and DataError if
    the folder is not there or cannot be written.
    """
    path = folder.resolve() / LOCK
    if _HELD.get(path) == threading.get_ident():
        yield
        return
    file = _locked(path)
    _HELD[path] = threading.get_ident()
    try:
        yield
    finally:
        del _HELD[path]
        remove_quietly(path)  # while it is held: whoever waits sees that it is another file
        file.close()


def _locked(path: Path) -> TextIO:
    """Open and lock the file of a lock, and write into it who holds it."""
    while True:
        if path.is_symlink():  # it came with a stranger's files: what it points to is not ours
            remove_quietly(path)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            file = os.fdopen(os.open(path, flags, 0o666), "r+", encoding="utf-8")
        except OSError as error:
            raise write_error(path, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                return file
            file.close()
        except BlockingIOError as error:
            with file:
                file.seek(0)
                holder = file.read().strip() or "another process"
            raise BusyError(
                f"{path.parent}: {holder} is writing there; wait until it is done, or give another "
                "folder"
            ) from error
        except OSError as error:
            file.close()
            raise write_error(path, error) from error


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
