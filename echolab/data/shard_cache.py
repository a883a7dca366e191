"""Cache shards of remote datasets on a local disk, for all processes of a machine.

    <sha256>.tar       a complete shard, verified by this sha256
    <sha256>.partial   a shard being fetched, with the full size from the start to reserve space
    <sha256>.lock      held by the process that fetches the shard
    room.lock          held by the process that evicts shards

Locks are kernel locks (flock): they are released when their process ends.  A shard being read has a
shared lock and is not evicted; even an evicted file would remain readable while it is open.
"""

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Condition, Thread
from typing import BinaryIO

from echolab.atomic_io import remove_quietly, retry, write_error
from echolab.data.download import (
    Expected,
    RetryPolicy,
    UnreachableError,
    fetch,
    join_url,
    public_url,
)
from echolab.data.index import Shard
from echolab.errors import ConfigError, DataError, EcholabError

FOLDER_VARIABLE = "ECHOLAB_CACHE"
POLL_SECONDS = 0.02
SHA256 = re.compile(r"[0-9a-f]{64}")


def cache_folder(requested: Path | str | None) -> Path:
    """Return the requested folder, else $ECHOLAB_CACHE, else ~/.cache/echolab."""
    folder = requested or os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "echolab"
    return Path(folder).expanduser()


def _lock(file: int, how: int, path: Path) -> bool:
    """Try to lock a file without waiting; return whether it is locked."""
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
def file_lock(path: Path, seconds: float) -> Iterator[bool]:
    """Wait up to `seconds` for the lock file `path`; yield whether it is held."""
    deadline = time.monotonic() + seconds
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    # The lock is valid only if `file` still has the name `path`: a holder removes its file.
    try:
        while not (held := _lock(file, fcntl.LOCK_EX, path) and _is_same_file(file, path)):
            if not _is_same_file(file, path):  # the last holder removed it: lock a new file
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
                # A process forked inside the block inherits the lock, which closing here would not
                # release: remove the file, so that the next holder locks a new file.
                path.unlink(missing_ok=True)
    finally:
        os.close(file)


def _is_same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


class ShardCache:
    """At most `limit_bytes` of shards in `folder`, with LRU eviction."""

    def __init__(self, folder: Path, limit_bytes: int, retry_policy: RetryPolicy) -> None:
        self.folder, self.limit_bytes, self.retry_policy = folder, limit_bytes, retry_policy
        # Remove partial shards of killed processes, which would use space.
        try:
            retry(lambda: folder.mkdir(parents=True, exist_ok=True))
            self._clear_leftovers()
        except OSError as error:
            raise write_error(folder, error) from error

    @contextmanager
    def open(self, shard: Shard, url: str) -> Iterator[int]:
        """Fetch the shard if needed and yield its file descriptor; do not evict it while open.

        Raise FetchError, or DataError if the disk or the cache is too small.
        """
        file = self._open_cached(shard)
        if file is None:
            file = self._open_fetched(shard, url)
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # also unlocks copies in forked processes
            os.close(file)

    def holds(self, shard: Shard) -> bool:
        """Return whether the shard is in the cache."""
        return self._path(shard).exists()

    def discard(self, shard: Shard) -> None:
        """Remove a shard that was damaged on disk; the next reader fetches it again."""
        remove_quietly(self._path(shard))

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _open_cached(self, shard: Shard) -> int | None:
        # Take a shared lock, which prevents eviction.
        path = self._path(shard)
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        # Only eviction takes an exclusive lock, and only briefly, so wait.
        while not _lock(file, fcntl.LOCK_SH, path):
            time.sleep(POLL_SECONDS)
        _mark_read(file)
        return file

    def _open_fetched(self, shard: Shard, url: str) -> int:
        deadline = time.monotonic() + self.retry_policy.deadline_seconds
        try:
            return retry(lambda: self._fetch_locked(shard, url, deadline))
        except OSError as error:
            raise write_error(self._path(shard), error) from error

    def _fetch_locked(self, shard: Shard, url: str, deadline: float) -> int:
        """Fetch the shard under a lock; if another process fetches it, wait for that process."""
        # Processes that waited for the lock then find the shard in the cache.
        seconds = max(deadline - time.monotonic(), 0.0)
        with file_lock(self.folder / f"{shard.sha256}.lock", seconds) as held:
            if not held:
                raise UnreachableError(
                    f"{public_url(url)}: another process has been fetching it for {seconds:.3g} s; "
                    "check the server and the network"
                )
            file = self._open_cached(shard)  # another process may have fetched it
            return self._fetch(shard, url, deadline) if file is None else file

    def _fetch(self, shard: Shard, url: str, deadline: float) -> int:
        partial = self.folder / f"{shard.sha256}.partial"
        # Reserve space, fetch within the rest of the deadline, and rename the verified file.
        try:
            self._reserve(partial, shard.bytes, deadline)
            retry_policy = self.retry_policy._replace(deadline_seconds=deadline - time.monotonic())
            with partial.open("r+b") as file:
                fetch(url, file, Expected(shard.bytes, shard.sha256), retry_policy)
                return self._publish(file, partial, self._path(shard))
        except BaseException:
            remove_quietly(partial)
            raise

    def _publish(self, file: BinaryIO, partial: Path, path: Path) -> int:
        """Rename a verified file; take a reader's lock before other processes can open it."""
        file.flush()
        os.fsync(file.fileno())
        reader = os.open(partial, os.O_RDONLY)
        try:
            _lock(reader, fcntl.LOCK_SH, partial)
            _mark_read(reader)
            partial.replace(path)
        except BaseException:
            os.close(reader)
            raise
        return reader

    def _reserve(self, partial: Path, size: int, deadline: float) -> None:
        """Create a file of the shard's size once there is space for it."""
        remove_quietly(partial)
        if size > self.limit_bytes:
            raise ConfigError(
                f"{self.folder}: a shard of {size} bytes does not fit in cache_gb="
                f"{self.limit_bytes / 1e9:.3g}; raise it"
            )
        # Wait until enough shards can be evicted, or until the deadline.
        while True:
            seconds = max(deadline - time.monotonic(), 0.0)
            with file_lock(self.folder / "room.lock", seconds) as held:
                if held and self._make_room(size):
                    with partial.open("wb") as file:
                        file.truncate(size)
                    return
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"{self.folder}: no room for {size} bytes within cache_gb="
                    f"{self.limit_bytes / 1e9:.3g}: all shards in it are being read; raise it"
                )
            time.sleep(POLL_SECONDS)

    def _make_room(self, size: int) -> bool:
        self._clear_leftovers()
        # Evict the least recently read shards first, except shards in use.
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
                    pass  # renamed or removed in the meantime

    def _clear_leftovers(self) -> None:
        """Remove partial shards of killed processes."""
        for path, _ in list(self._files()):
            if path.suffix == ".partial":
                with file_lock(path.with_suffix(".lock"), 0.0) as held:
                    if held:
                        remove_quietly(path)


def _mark_read(file: int) -> None:
    """Set the time of the last read for LRU eviction; the kernel's own time is too coarse."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def _remove_unread(path: Path) -> bool:
    """Remove a shard unless a process reads it; return whether it is removed."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    # The exclusive lock fails while readers hold shared locks.
    try:
        if not _lock(file, fcntl.LOCK_EX, path):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(file)


class Prefetcher:
    """Calls `fetch(shard)` for the first `limit` expected shards, one after another, in a thread.

    Each call of `expect` replaces the previous list.  The thread starts at the first call in each
    process, since it would not survive a fork.
    """

    def __init__(self, fetch: Callable[[int], None], limit: int) -> None:
        self.fetch, self.limit = fetch, limit
        self._owner = 0

    def __getstate__(self) -> dict[str, object]:
        return {"fetch": self.fetch, "limit": self.limit, "_owner": 0}

    def expect(self, shards: Iterable[int]) -> None:
        """Set the indices of the shards that will be read next, in order; never block."""
        # A forked process inherits no thread, so it starts a new one.
        if self._owner != os.getpid():
            self._owner = os.getpid()
            self._expected: list[int] = []
            self._changed = Condition()
            Thread(target=self._work, name="prefetch", daemon=True).start()
        # Keep each shard once, in the order of its first sample.
        with self._changed:
            self._expected = list(dict.fromkeys(shards))[: self.limit]
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._expected:
                    self._changed.wait()
                shard = self._expected.pop(0)
            # A shard that cannot be fetched must not end the thread.
            try:
                self.fetch(shard)
            except (EcholabError, OSError):
                pass  # the reader of the shard retries and raises the error


class RemoteStore:
    """A remote dataset, read through the cache of this machine."""

    def __init__(self, url: str, shards: list[Shard], cache: ShardCache, prefetched: int) -> None:
        self.url, self.shards, self.cache = url, shards, cache
        self.prefetcher = Prefetcher(self._fetch, prefetched)

    def open(self, shard: int) -> AbstractContextManager[int]:
        return self.cache.open(self.shards[shard], self._url(shard))

    def path(self, shard: int) -> str:
        return public_url(self._url(shard))

    def forget(self, shard: int) -> bool:
        self.cache.discard(self.shards[shard])
        return True

    def release(self, shard: int) -> None:
        pass  # the cache opens it for each read

    def expect(self, shards: Iterable[int]) -> None:
        self.prefetcher.expect(shards)

    def _fetch(self, shard: int) -> None:
        if not self.cache.holds(self.shards[shard]):
            with self.open(shard):
                pass

    def _url(self, shard: int) -> str:
        return join_url(self.url, self.shards[shard].name)
