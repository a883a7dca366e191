"""Write files atomically, append lines, lock folders, and retry transient errors.

Three kinds of file errors are distinguished: wrong bytes, which the caller checks; a full disk
(`FULL`); and all other errors of the operating system, such as ESTALE, ETIMEDOUT, ENOTCONN, EACCES
or EIO of a shared file system.  The last kind may be transient: the operation is retried for about
half a minute, and then raises StorageError.
"""

import errno
import fcntl
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, TypeVar

from echolab.errors import BusyError, ConfigError, DiskFullError, StorageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
PAUSES = (0.1, 0.5, 2.0, 8.0, 20.0)  # seconds before each retry
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # the file does not exist
NO_RETRY: tuple[float, ...] = ()  # no pauses, so no retries
MAX_WAITING_LINES = 10_000  # log lines held in memory while the log cannot be written
LOCK = ".lock"
_HELD: dict[Path, int] = {}  # lock file -> thread of this process that holds it

Result = TypeVar("Result")


def retry(
    action: Callable[[], Result],
    *,
    pauses: Sequence[float] | None = None,
    final: tuple[type[OSError], ...] = ABSENT,
) -> Result:
    """Return `action()`; after a transient OSError wait and retry.

    Raise the OSError of the last attempt; do not retry errors in `FULL` or of the types `final`.
    """
    # Retries do not help for full disks and missing files, which only the user can change.
    for pause in PAUSES if pauses is None else pauses:
        try:
            return action()
        except OSError as error:
            if error.errno in FULL or isinstance(error, final):
                raise
        time.sleep(pause)
    return action()


def describe_error(error: OSError) -> str:
    """Return the message and number of an OSError: "Stale file handle, errno 116"."""
    return f"{error.strerror or error}, errno {error.errno}"


def read_error(path: Path | str, error: OSError) -> StorageError:
    """Return the StorageError for a file that the operating system cannot read."""
    return StorageError(
        f"{path}: could not be read ({describe_error(error)}); its bytes may be undamaged: check "
        "the file system and its permissions, then run the same command again"
    )


def read_file(path: Path) -> bytes:
    """Return the bytes of a file; raise StorageError, or one of `ABSENT` if it does not exist."""
    # Retry: a file on a shared file system may be readable a moment later.
    try:
        return retry(path.read_bytes)
    except ABSENT:
        raise
    except OSError as error:
        raise read_error(path, error) from error


def write_atomic(path: Path, data: bytes, *, patient: bool = False) -> None:
    """Write to a temporary name in the same folder, then rename: no reader sees a partial file.

    Raise DiskFullError or StorageError if the file cannot be written; with `patient` only after
    retries.
    """
    partial = path.with_name(path.name + ".partial")

    def write() -> None:
        # Remove a link, which in an untrusted folder could point to any file.
        if partial.is_symlink() and (partial.is_file() or not partial.exists()):
            partial.unlink()
        # Flush to disk before the rename, so that a crash cannot leave an empty file.
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    try:
        retry(write, pauses=None if patient else NO_RETRY)
    except OSError as error:
        remove_quietly(partial)
        raise write_error(path, error) from error


def check_writable(out: Path, *, folder: bool = False) -> None:
    """Create the parent folder of `out`, and check that a file can be written there.

    Commands call this at their start, so that no work is wasted on a result that cannot be saved.
    With `folder`, `out` itself is a folder.  Raise ConfigError if it is not writable.
    """
    if not folder and out.is_dir():
        raise ConfigError(f"{out}: is a folder; name a file in it")
    if folder and out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; name a folder")
    # Write a small file: permissions are not enough, as the disk may be full or read-only.
    probe = (out if out.is_dir() else out.parent) / f"{out.name}.{os.getpid()}.trial"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"x")
        finally:
            remove_quietly(probe)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{out}: cannot be written ({reason}); give another path") from error


def make_folder(folder: Path) -> None:
    """Create a folder and its parents; raise StorageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder against other writers while the block runs.

    The kernel releases the lock when its process ends.  The lock is reentrant for its thread.
    Raise BusyError, which names the holder, and StorageError if the folder does not exist or cannot
    be written.
    """
    # Reentrant, since a function that locks the folder may call another such function.
    path = folder.resolve() / LOCK
    if _HELD.get(path) == threading.get_ident():
        yield
        return
    file = _open_locked(path)
    _HELD[path] = threading.get_ident()
    try:
        yield
    finally:
        del _HELD[path]
        remove_quietly(path)  # while locked: the next holder detects that the file was replaced
        file.close()


def _open_locked(path: Path) -> TextIO:
    """Open and lock a lock file, and write its holder into it."""
    while True:
        # Remove a link, which in an untrusted folder could point to any file.
        if path.is_symlink():
            remove_quietly(path)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            file = os.fdopen(os.open(path, flags, 0o666), "r+", encoding="utf-8")
        except OSError as error:
            raise write_error(path, error) from error
        # Retry if the last holder removed the file after it was opened here.
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


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_text(path: Path, text: str, *, patient: bool = False) -> None:
    """Append complete lines to a file, on a new line if a killed process left an incomplete one.

    Raise DiskFullError or StorageError if the lines cannot be written; with `patient` only after
    retries.
    """

    def append() -> None:
        # Append all lines in one write, so that concurrent writers do not interleave within lines.
        with path.open("ab+") as file:
            end = file.tell()
            torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
            file.write(("\n" + text if torn else text).encode())

    try:
        retry(append, pauses=None if patient else NO_RETRY)
    except OSError as error:
        raise write_error(path, error) from error


class LineLog:
    """A log that never fails: lines that cannot be written are queued and written later.

    The queue holds at most `limit` lines; then the oldest are dropped.  Failures, late lines and
    lost lines are reported on standard error.
    """

    def __init__(self, path: Path, limit: int = MAX_WAITING_LINES) -> None:
        self.path = path
        self._waiting: deque[str] = deque(maxlen=limit)
        self._failing, self._dropped = False, 0

    def add(self, line: str) -> None:
        """Write a line, which must end with a line break, after all queued lines."""
        # A full queue drops its oldest line.
        self._dropped += len(self._waiting) == self._waiting.maxlen
        self._waiting.append(line)
        self._write(patient=False)

    def close(self) -> None:
        """Write the queued lines with retries, and report lines that cannot be written."""
        if self._waiting:
            self._write(patient=True)
        if self._waiting:
            lost = len(self._waiting) + self._dropped
            self._report(f"{self.path}: {lost} lines are lost: the file could not be written")

    def _write(self, *, patient: bool) -> None:
        """Write the queued lines one by one; after a failure keep the rest."""
        # Separate writes ensure that no line is written twice.
        written = 0
        while self._waiting:
            try:
                append_text(self.path, self._waiting[0], patient=patient)
            except StorageError as error:
                if not self._failing:
                    self._report(f"{error}; lines are kept in memory, and written later")
                self._failing = True
                return
            self._waiting.popleft()
            written += 1
        if self._failing:
            self._report(f"{self.path}: {written} lines written late, {self._dropped} dropped")
        self._failing, self._dropped = False, 0

    def _report(self, message: str) -> None:
        print(f"echolab: {message}", file=sys.stderr, flush=True)


def write_error(path: Path, error: OSError) -> StorageError:
    """Return the StorageError or DiskFullError for a file that could not be written."""
    # Suggest a remedy for each error.
    remedy = {
        errno.ENOSPC: "free some space or choose another folder",
        errno.EDQUOT: "free some of your quota or choose another folder",
        errno.EFBIG: "raise the file size limit (ulimit -f) or choose another folder",
        errno.EROFS: "mount it for writing or choose another folder",
    }.get(error.errno or 0, "check that the folder exists and can be written")
    kind = DiskFullError if error.errno in FULL else StorageError
    return kind(f"{path}: could not be written ({describe_error(error)}); {remedy}")


def remove_quietly(path: Path) -> None:
    """Remove a leftover file; ignore errors, which would hide the original error."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass
