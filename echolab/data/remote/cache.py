"""Whole shards of remote datasets on a local disk, shared by every process of a machine.

    <sha256>.tar       a shard: it bears this name only once its bytes had this sha256
    <sha256>.partial   one on its way; as long as the whole from the start, to keep its room
    <sha256>.lock      held by who fetches it; room.lock by who counts and clears

A lock is the kernel's (flock): it goes with the process that held it.  What is being read is locked
too, shared, and so is not cleared away; open files would stay readable even then.
"""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from echolab.atomic_io import remove_quietly, retried, write_error
from echolab.data.index import Shard
from echolab.data.remote.download import Expected, Patience, UnreachableError, fetch
from echolab.data.remote.transport import shown
from echolab.errors import ConfigError, DataError

FOLDER_VARIABLE = "ECHOLAB_CACHE"
POLL_SECONDS = 0.02
SHA256 = re.compile(r"[0-9a-f]{64}")


def cache_folder(wanted: Path | str | None) -> Path:
    """The folder asked for, or $ECHOLAB_CACHE, or ~/.cache/echolab."""
    place = wanted or os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "echolab"
    return Path(place).expanduser()


def _lock(file: int, how: int, path: Path) -> bool:
    """Whether the lock was had; never waits."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise DataError(
            f"{path}: this file system keeps no locks ({error.strerror}); "
            "choose a cache folder on a local disk"
        ) from error
    return True


@contextmanager
def locked(path: Path, seconds: float) -> Iterator[bool]:
    """Hold the lock file `path`, if it can be had within so many seconds; gives whether."""
    deadline = time.monotonic() + seconds
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while not (held := _lock(file, fcntl.LOCK_EX, path) and _same(file, path)):
            if not _same(file, path):  # its last holder removed it: lock the new one
                os.close(file)
                file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            elif time.monotonic() >= deadline:
                break
            else:
                time.sleep(POLL_SECONDS)
        try:
            yield held
        finally:
            if held:
                # A process forked meanwhile holds the same lock, and closing it here would not free
                # it: so the next holder takes a new file.
                path.unlink(missing_ok=True)
    finally:
        os.close(file)


def _same(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


class ShardCache:
    """At most `limit_bytes` of shards in `folder`; the longest unread go first."""

    def __init__(self, folder: Path, limit_bytes: int, patience: Patience) -> None:
        self.folder, self.limit_bytes, self.patience = folder, limit_bytes, patience
        try:
            retried(lambda: folder.mkdir(parents=True, exist_ok=True))
            self._clear_leftovers()
        except OSError as error:
            raise write_error(folder, error) from error

    @contextmanager
    def open(self, shard: Shard, url: str) -> Iterator[int]:
        """A file descriptor of the whole shard, fetched if need be, and kept while it is open.

        Raises FetchError, or DataError when the disk or the cache is too small.
        """
        file = self._cached(shard)
        if file is None:
            file = self._fetched(shard, url)
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # for processes forked meanwhile too
            os.close(file)

    def holds(self, shard: Shard) -> bool:
        """Whether it is there now."""
        return self._path(shard).exists()

    def discard(self, shard: Shard) -> None:
        """Forget a shard whose bytes have changed on the disk; the next to ask fetches it."""
        remove_quietly(self._path(shard))

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _cached(self, shard: Shard) -> int | None:
        path = self._path(shard)
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        # Only who clears it away ever has it for himself, and for a moment.
        while not _lock(file, fcntl.LOCK_SH, path):
            time.sleep(POLL_SECONDS)
        _mark(file)
        return file

    def _fetched(self, shard: Shard, url: str) -> int:
        deadline = time.monotonic() + self.patience.deadline_seconds
        try:
            return retried(lambda: self._fetched_alone(shard, url, deadline))
        except OSError as error:
            raise write_error(self._path(shard), error) from error

    def _fetched_alone(self, shard: Shard, url: str, deadline: float) -> int:
        """Fetch it while no other process does, or wait for the one that does."""
        seconds = max(deadline - time.monotonic(), 0.0)
        with locked(self.folder / f"{shard.sha256}.lock", seconds) as held:
            if not held:
                raise UnreachableError(
                    f"{shown(url)}: another process has been fetching it for {seconds:.3g} s; "
                    "check the server and the network"
                )
            file = self._cached(shard)  # another process was faster
            return self._fetch(shard, url, deadline) if file is None else file

    def _fetch(self, shard: Shard, url: str, deadline: float) -> int:
        partial = self.folder / f"{shard.sha256}.partial"
        try:
            self._reserve(partial, shard.bytes, deadline)
            patience = self.patience._replace(deadline_seconds=deadline - time.monotonic())
            with partial.open("r+b") as file:
                fetch(url, file, Expected(shard.bytes, shard.sha256), patience)
                return self._keep(file, partial, self._path(shard))
        except BaseException:
            remove_quietly(partial)
            raise

    def _keep(self, file: BinaryIO, partial: Path, path: Path) -> int:
        """Give the file its name, and a reader's lock before anyone can find it."""
        file.flush()
        os.fsync(file.fileno())
        reader = os.open(partial, os.O_RDONLY)
        try:
            _lock(reader, fcntl.LOCK_SH, partial)
            _mark(reader)
            partial.replace(path)
        except BaseException:
            os.close(reader)
            raise
        return reader

    def _reserve(self, partial: Path, size: int, deadline: float) -> None:
        """Make an empty file as long as the shard, once there is room for it."""
        remove_quietly(partial)
        if size > self.limit_bytes:
            raise ConfigError(
                f"{self.folder}: a shard of {size} bytes does not fit in cache_gb="
                f"{self.limit_bytes / 1e9:.3g}; raise it"
            )
        while True:
            seconds = max(deadline - time.monotonic(), 0.0)
            with locked(self.folder / "room.lock", seconds) as held:
                if held and self._make_room(size):
                    with partial.open("wb") as file:
                        file.truncate(size)
                    return
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"{self.folder}: no room for {size} bytes within cache_gb="
                    f"{self.limit_bytes / 1e9:.3g}: all of it is in use; raise it"
                )
            time.sleep(POLL_SECONDS)

    def _make_room(self, size: int) -> bool:
        self._clear_leftovers()
        kept = [(stat.st_mtime_ns, stat.st_size, path) for path, stat in self._files()]
        used = sum(kept_size for _, kept_size, _ in kept)
        for _, freed, path in sorted(kept):
            if used + size <= self.limit_bytes:
                break
            if path.suffix == ".tar" and _remove_unread(path):
                used -= freed
        return used + size <= self.limit_bytes

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.iterdir():
            if path.suffix in (".tar", ".partial") and SHA256.fullmatch(path.stem):
                try:
                    yield path, path.stat()
                except FileNotFoundError:
                    pass  # finished or removed since

    def _clear_leftovers(self) -> None:
        """Remove what killed processes were fetching."""
        for path, _ in list(self._files()):
            if path.suffix == ".partial":
                with locked(path.with_suffix(".lock"), 0.0) as held:
                    if held:
                        remove_quietly(path)


def _mark(file: int) -> None:
    """As read now: what was read last is cleared last.  The kernel's own clock is too coarse."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def _remove_unread(path: Path) -> bool:
    """Remove a shard unless somebody reads it now."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        if not _lock(file, fcntl.LOCK_EX, path):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(file)
