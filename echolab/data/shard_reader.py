"""The shard contract: a folder of plain WebDataset tars and one dataset.json, written last.

A key names a sample and has no dots; a sample is its members, each named by what follows the dot:

    raw      mp4 (H.264, 25 fps, 4n+1 frames), flac (16 kHz mono), tracks.npz (boxes), json
    encoded  the same json, and safetensors in place of what it was made from

dataset.json holds the geometry of the latents, for each shard its sha256, bytes and number of
samples, and for each sample its members' [offset, size, crc32]; its fingerprint is the hash of all
that.  Nothing is unpickled.

The folder may also lie behind an address: http(s)://, s3://, or what else fsspec knows.
"""

import hashlib
import io
import json
import stat
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from echolab.atomic_io import ABSENT, read_error, read_whole, retried
from echolab.data.index import INDEX, Sample, geometry_in
from echolab.data.member_reader import Pieces
from echolab.data.remote.cache import ShardCache, cache_folder
from echolab.data.remote.download import Patience, fetch, pause
from echolab.data.remote.stores import LocalStore, RemoteStore, Store
from echolab.data.remote.transport import joined, shown, url_of
from echolab.data.sample_index import Table, parse_index
from echolab.data.shard_writer import ShardWriter as ShardWriter
from echolab.data.verify import verify as verify
from echolab.errors import ConfigError, DataError

CACHE_GB = 50.0
AHEAD = 4  # shards fetched before they are asked for
PATIENCE = Patience()

Result = TypeVar("Result")


class Damaged(DataError):
    """Bytes of a sample that do not match dataset.json."""


class ShardDataset:
    """A dataset, read sample by sample at random.  May be copied into workers, forked or not.

    Every read is checked against dataset.json; what does not match is a DataError that names
    shard, sample and byte offset.  A file system that fails, and not in passing, is a StorageError.
    """

    def __init__(
        self, folder: Path | str, index: dict[str, Any], table: Table, store: Store
    ) -> None:
        self.folder = folder
        self.kind: str = index["kind"]
        self.encoders: dict[str, str] = index["encoders"]
        self.geometry = geometry_in(index)
        self.description: dict[str, Any] = index["description"]
        self.fingerprint: str = index["fingerprint"]
        self.shards, self.keys = table.shards, table.keys
        self.form: Mapping[str, Sequence[int]] | None = None  # shapes of its samples, once known
        self._table, self._store = table, store

    def __len__(self) -> int:
        return len(self._table)

    @cached_property
    def keys_digest(self) -> str:
        """Return a hash of the keys and of the numbers of samples: equal where order can be."""
        digest = hashlib.sha256(json.dumps(self.samples_by_shard).encode())
        for key in self.keys:
            digest.update(f"{key}\n".encode())
        return digest.hexdigest()

    @property
    def samples_by_shard(self) -> list[int]:
        """Number of samples of each shard; samples are numbered shard after shard."""
        return [shard.samples for shard in self.shards]

    def sample(self, i: int) -> Sample:
        """Where sample `i` lies."""
        i = range(len(self))[i]
        return Sample(
            self.keys[i], self.shards[self._table.shard_of(i)].name, self._table.members(i)
        )

    def expect(self, samples: Iterable[int]) -> None:
        """These samples will be read next: remote shards are fetched meanwhile."""
        self._store.expect(self._table.shard_of(i) for i in samples)

    def read(self, i: int) -> dict[str, bytes]:
        """The members of sample `i`."""
        return {
            name: self.take(i, name, Pieces.rest)
            for name in self._table.members(range(len(self))[i])
        }

    def take(self, i: int, name: str, use: Callable[[Pieces], Result]) -> Result:
        """What `use` makes of one member; KeyError where sample `i` has none of that name.

        All of the member is compared with its checksum, whatever `use` leaves.  `use` may see bytes
        that are damaged: what it makes of them, or raises, is dropped.
        """
        i = range(len(self))[i]
        place = self._table.members(i)[name]
        try:
            return self._take(i, name, place, use)
        except Damaged:
            # A copy may have rotted on the local disk; the original is asked once more.
            if not self._store.forget(self._table.shard_of(i)):
                raise
            return self._take(i, name, place, use)

    def _take(
        self, i: int, name: str, place: tuple[int, int, int], use: Callable[[Pieces], Result]
    ) -> Result:
        """Bear with errors of the file system that pass; they say nothing of the bytes."""
        shard = self._table.shard_of(i)

        def attempt() -> Result:
            try:
                return self._take_once(i, name, place, use)
            except OSError:
                self._store.release(shard)
                raise

        try:
            return retried(attempt, final=())
        except OSError as error:
            raise read_error(self._where(i), error) from error

    def _take_once(
        self, i: int, name: str, place: tuple[int, int, int], use: Callable[[Pieces], Result]
    ) -> Result:
        offset, size, crc32 = place
        with self._store.open(self._table.shard_of(i)) as file:
            pieces = Pieces(file, offset, size)
            try:
                return use(pieces)
            finally:
                pieces.skip(size - pieces.passed)
                if pieces.crc32 != crc32 or pieces.passed != size:
                    cut = f"is cut at {pieces.passed}"
                    what = "does not match its checksum" if pieces.passed == size else cut
                    raise Damaged(
                        f"{self._where(i)}, byte {offset}: {name} of {size} bytes {what}; run "
                        f"`echolab data verify {self.folder}`"
                    )

    def _where(self, i: int) -> str:
        return f"{self._store.place(self._table.shard_of(i))}: sample {self.keys[i]}"


def open_dataset(
    place: Path | str,
    *,
    cache: Path | str | None = None,
    cache_gb: float = CACHE_GB,
    patience: Patience = PATIENCE,
) -> ShardDataset:
    """Open the dataset in a folder or behind an address.

    Remote shards are fetched whole into the folder `cache` ($ECHOLAB_CACHE, ~/.cache/echolab), at
    most `cache_gb` GB (1e9 bytes) of them, which all processes of the machine share.
    Raises DataError when dataset.json or a shard is missing or cut, FetchError where a server is at
    fault, StorageError where a file system is, ConfigError for a bad address or cache.
    """
    url = url_of(place)
    if url:
        return _open_remote(url, cache_folder(cache), cache_gb, patience)
    return _open_local(Path(place))


def _open_local(folder: Path) -> ShardDataset:
    path = folder / INDEX
    try:
        index, table = parse_index(read_whole(path), path)
    except ABSENT as error:
        raise DataError(f"{path}: not there; the folder is no whole dataset") from error
    for shard in table.shards:
        path = folder / shard.name
        size = _size(path)
        if size != shard.bytes:
            found = "is not there" if size is None else f"has {size} bytes"
            raise DataError(
                f"{path}: {found}, dataset.json says {shard.bytes}; "
                f"run `echolab data verify {folder}`"
            )
    store = LocalStore(folder, [shard.name for shard in table.shards])
    return ShardDataset(folder, index, table, store)


def _size(path: Path) -> int | None:
    """Return the bytes of a file, None where there is none."""
    try:
        status = retried(path.stat)
    except ABSENT:
        return None
    except OSError as error:
        raise read_error(path, error) from error
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _open_remote(url: str, cache: Path, cache_gb: float, patience: Patience) -> ShardDataset:
    if not cache_gb > 0:
        raise ConfigError(f"cache_gb={cache_gb}: must be above 0")
    index, table = _remote_index(joined(url, INDEX), patience)
    kept = ShardCache(cache, int(cache_gb * 1e9), patience)
    # What is fetched ahead must not push out what is still to be read.
    largest = max((shard.bytes for shard in table.shards), default=1)
    ahead = min(AHEAD, kept.limit_bytes // (2 * largest))
    return ShardDataset(shown(url), index, table, RemoteStore(url, table.shards, kept, ahead))


def _remote_index(url: str, patience: Patience) -> tuple[dict[str, Any], Table]:
    """dataset.json behind an address: it names no hash of its own, but its fingerprint tells."""
    deadline = time.monotonic() + patience.deadline_seconds
    attempt = 0
    while True:
        attempt += 1
        data = io.BytesIO()
        left = deadline - time.monotonic()
        fetch(url, data, None, patience._replace(deadline_seconds=left))
        try:
            return parse_index(data.getvalue(), shown(url))
        except DataError:
            seconds = pause(attempt, patience)
            if attempt == patience.attempts or time.monotonic() + seconds > deadline:
                raise
            time.sleep(seconds)
