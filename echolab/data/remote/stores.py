"""Where the shards of a dataset lie: each store gives open files of whole shards."""

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Lock
from typing import Protocol

from echolab.data.index import Shard
from echolab.data.prefetch import Ahead
from echolab.data.remote.cache import ShardCache
from echolab.data.remote.transport import joined, shown

OPEN_FILES = 32  # a process and dataset; a bounded shuffle reads so many shards in turn


class Store(Protocol):
    """Whole shards by number."""

    def open(self, shard: int) -> AbstractContextManager[int]:
        """A file descriptor to read at offsets; raises OSError or DataError."""

    def place(self, shard: int) -> str:
        """What a message calls it."""

    def forget(self, shard: int) -> bool:
        """Drop a copy whose bytes are wrong; False where there is only the original."""

    def release(self, shard: int) -> None:
        """Close the file, so that the next read opens it anew: a stale handle stays stale."""

    def expect(self, shards: Iterable[int]) -> None:
        """These will be read next, in this order."""


class _Open:
    """A file that is closed when nobody has it any more."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class LocalStore:
    """A folder.  Keeps the files that were read last open, in each process its own."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = folder, names
        self._forget_files()

    def _forget_files(self) -> None:
        self._owner, self._lock = os.getpid(), Lock()
        self._files: OrderedDict[int, _Open] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "names": self.names}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @contextmanager
    def open(self, shard: int) -> Iterator[int]:
        if self._owner != os.getpid():  # forked, perhaps while another thread had the lock
            self._forget_files()
        with self._lock:
            file = self._files.pop(shard, None) or _Open(self.folder / self.names[shard])
            self._files[shard] = file
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        yield file.number  # `file` stays open here, though another thread may drop it

    def place(self, shard: int) -> str:
        return str(self.folder / self.names[shard])

    def forget(self, shard: int) -> bool:
        return False

    def release(self, shard: int) -> None:
        if self._owner == os.getpid():
            with self._lock:
                self._files.pop(shard, None)

    def expect(self, shards: Iterable[int]) -> None:
        pass  # the disk is near


class RemoteStore:
    """An address, through the cache of this machine."""

    def __init__(self, url: str, shards: list[Shard], cache: ShardCache, ahead: int) -> None:
        self.url, self.shards, self.cache = url, shards, cache
        self.ahead = Ahead(self._fetch, ahead)

    def open(self, shard: int) -> AbstractContextManager[int]:
        return self.cache.open(self.shards[shard], self._url(shard))

    def place(self, shard: int) -> str:
        return shown(self._url(shard))

    def forget(self, shard: int) -> bool:
        self.cache.discard(self.shards[shard])
        return True

    def release(self, shard: int) -> None:
        pass  # the cache opens it for each read

    def expect(self, shards: Iterable[int]) -> None:
        self.ahead.expect(shards)

    def _fetch(self, shard: int) -> None:
        if not self.cache.holds(self.shards[shard]):
            with self.open(shard):
                pass

    def _url(self, shard: int) -> str:
        return joined(self.url, self.shards[shard].name)
