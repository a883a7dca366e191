"""Cache shards of remote datasets on a local disk, for all processes of a machine.

    <sha256>.tar       a shard: it gets this name once its bytes have this sha256
    <sha256>.partial   a shard that is being fetched; as long as the shard from the start, to
                       reserve its room
    <sha256>.lock      held by the process that fetches it; room.lock by the one that makes room

A lock is the kernel's (flock): it ends with the process that held it.  A shard that is being read
has a shared lock, and is not evicted; open files would stay readable even then.
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
    """Return the requested folder, or $ECHOLAB_CACHE, or ~/.cache/echolab."""
    folder = requested or os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "echolab"
    return Path(folder).expanduser()


def _lock(file: int, how: int, path: Path) -> bool:
    """Try to lock a file without waiting; return if it is locked."""
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
    """Hold the lock file `path` if it is free within so many seconds; yield if it is held."""
    deadline = time.monotonic() + seconds
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    # A lock counts only on the file that has the name: a holder removes its file at the end.
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
                # A process forked in the block holds the same lock, and closing it here would not
                # free it: so the next holder takes a new file.
                path.unlink(missing_ok=True)
    finally:
        os.close(file)


def _same(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


class ShardCache:
    """At most `limit_bytes` of shards in `folder`; the least recently read are evicted first."""

    def __init__(self, folder: Path, limit_bytes: int, retry_policy: RetryPolicy) -> None:
        self.folder, self.limit_bytes, self.retry_policy = folder, limit_bytes, retry_policy
        # Killed processes leave partial shards, which count as used room.
        try:
            retry(lambda: folder.mkdir(parents=True, exist_ok=True))
            self._clear_leftovers()
        except OSError as error:
            raise write_error(folder, error) from error

    @contextmanager
    def open(self, shard: Shard, url: str) -> Iterator[int]:
        """Yield a file descriptor of the shard, fetched if needed, and kept while it is open.

        Raises FetchError, or DataError if the disk or the cache is too small.
        """
        file = self._cached(shard)
        if file is None:
            file = self._fetched(shard, url)
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # also for processes that were forked since
            os.close(file)

    def holds(self, shard: Shard) -> bool:
        """Return if the shard is in the cache."""
        return self._path(shard).exists()

    def discard(self, shard: Shard) -> None:
        """Remove a shard whose bytes have changed on disk; the next reader fetches it again."""
        remove_quietly(self._path(shard))

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _cached(self, shard: Shard) -> int | None:
        # A shared lock, which keeps the shard from being evicted while it is read.
        path = self._path(shard)
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        # Wait: only eviction locks it exclusively, and for a moment.
        while not _lock(file, fcntl.LOCK_SH, path):
            time.sleep(POLL_SECONDS)
        _mark_read(file)
        return file

    def _fetched(self, shard: Shard, url: str) -> int:
        deadline = time.monotonic() + self.retry_policy.deadline_seconds
        try:
            return retry(lambda: self._fetched_alone(shard, url, deadline))
        except OSError as error:
            raise write_error(self._path(shard), error) from error

    def _fetched_alone(self, shard: Shard, url: str, deadline: float) -> int:
        """Fetch it while no other process does, or wait for the one that does."""
        # The others wait for the lock, and have the shard in the cache when they get it.
        seconds = max(deadline - time.monotonic(), 0.0)
        with file_lock(self.folder / f"{shard.sha256}.lock", seconds) as held:
            if not held:
                raise UnreachableError(
                    f"{public_url(url)}: another process has been fetching it for {seconds:.3g} s; "
                    "check the server and the network"
                )
            file = self._cached(shard)  # another process was faster
            return self._fetch(shard, url, deadline) if file is None else file

    def _fetch(self, shard: Shard, url: str, deadline: float) -> int:
        partial = self.folder / f"{shard.sha256}.partial"
        # Reserve room, fetch with what is left of the deadline, and rename when it is verified.
        try:
            self._reserve(partial, shard.bytes, deadline)
            retry_policy = self.retry_policy._replace(deadline_seconds=deadline - time.monotonic())
            with partial.open("r+b") as file:
                fetch(url, file, Expected(shard.bytes, shard.sha256), retry_policy)
                return self._keep(file, partial, self._path(shard))
        except BaseException:
            remove_quietly(partial)
            raise

    def _keep(self, file: BinaryIO, partial: Path, path: Path) -> int:
        """Give the file its name, and a reader's lock before others can open it."""
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
        """Create an empty file as long as the shard, when there is room for it."""
        remove_quietly(partial)
        if size > self.limit_bytes:
            raise ConfigError(
                f"{self.folder}: a shard of {size} bytes does not fit in cache_gb="
                f"{self.limit_bytes / 1e9:.3g}; raise it"
            )
        # Wait until readers close shards that can be evicted, or until the deadline.
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
        # Evict those read longest ago first, except those that a process reads.
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
                with file_lock(path.with_suffix(".lock"), 0.0) as held:
                    if held:
                        remove_quietly(path)


def _mark_read(file: int) -> None:
    """Set the time of the last read, by which shards are evicted; the kernel's is too coarse."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def _remove_unread(path: Path) -> bool:
    """Remove a shard unless a process reads it; return if it is removed."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    # Its exclusive lock excludes readers, which hold shared ones.
    try:
        if not _lock(file, fcntl.LOCK_EX, path):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(file)


class Prefetcher:
    """Calls `fetch(shard)` for the first `limit` expected shards, one after another, in a thread.

    A new expectation replaces the old one.  The thread starts with the first expectation of a
    process: it would not survive a fork.
    """

    def __init__(self, fetch: Callable[[int], None], limit: int) -> None:
        self.fetch, self.limit = fetch, limit
        self._owner = 0

    def __getstate__(self) -> dict[str, object]:
        return {"fetch": self.fetch, "limit": self.limit, "_owner": 0}

    def expect(self, shards: Iterable[int]) -> None:
        """Take indices of shards in the order in which they will be read; never block."""
        # A forked process inherits no thread, so it starts its own.
        if self._owner != os.getpid():
            self._owner = os.getpid()
            self._expected: list[int] = []
            self._changed = Condition()
            Thread(target=self._work, name="prefetch", daemon=True).start()
        # Each shard once, in the order of its first sample.
        with self._changed:
            self._expected = list(dict.fromkeys(shards))[: self.limit]
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._expected:
                    self._changed.wait()
                shard = self._expected.pop(0)
            # A shard that cannot be fetched now is no reason to end the thread.
            try:
                self.fetch(shard)
            except (EcholabError, OSError):
                pass  # the reader of the shard tries again, and raises


class RemoteStore:
    """An address, read through the cache of this machine."""

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
