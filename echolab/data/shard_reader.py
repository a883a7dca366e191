"""Read datasets: a folder of plain WebDataset tars and one dataset.json, which is written last.

The files of a tar are named KEY.MEMBER: the key of a sample contains no dots, and all files with
the same key are the members of one sample:

    raw      mp4 (H.264, 25 fps, 4n+1 frames), flac (16 kHz mono), tracks.npz (boxes), json
    encoded  the same json, and safetensors instead of the media

dataset.json holds the geometry of the latents, sha256, bytes and number of samples of each shard,
and [offset, size, crc32] of each sample's members; the fingerprint is the hash of these entries.
Nothing is unpickled.

A dataset may also be remote: http(s)://, s3://, or another scheme that fsspec supports.
"""

import hashlib
import io
import json
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, TypeVar

from echolab.atomic_io import ABSENT, read_error, read_file, retry
from echolab.data.download import (
    RetryPolicy,
    backoff_seconds,
    fetch,
    join_url,
    parse_url,
    public_url,
)
from echolab.data.index import INDEX, Sample, SampleIndex, geometry_in, parse_index
from echolab.data.samples import MemberReader
from echolab.data.shard_cache import RemoteStore, ShardCache, cache_folder
from echolab.errors import ConfigError, DataError

CACHE_GB = 50.0
PREFETCHED_SHARDS = 4  # maximum
OPEN_FILES = 32  # per process and dataset; a bounded shuffle alternates between that many shards
RETRY_POLICY = RetryPolicy()

Result = TypeVar("Result")


class Store(Protocol):
    """The shards of a dataset by index, as open files."""

    def open(self, shard: int) -> AbstractContextManager[int]:
        """Return a file descriptor to read at offsets; raise OSError or DataError."""

    def path(self, shard: int) -> str:
        """Return the path or address of a shard, for messages."""

    def forget(self, shard: int) -> bool:
        """Drop a damaged cached copy; return False if there is only the original."""

    def release(self, shard: int) -> None:
        """Close the file, so that the next read reopens it: a stale handle never recovers."""

    def expect(self, shards: Iterable[int]) -> None:
        """Prepare for reading these shards next, in this order."""


class _OpenFile:
    """A file descriptor that is closed when the object is no longer referenced."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class LocalStore:
    """A local folder.  Each process keeps the most recently read files open."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = folder, names
        self._forget_files()

    def _forget_files(self) -> None:
        self._owner, self._lock = os.getpid(), Lock()
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "names": self.names}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @contextmanager
    def open(self, shard: int) -> Iterator[int]:
        # A forked child may inherit a lock held by a thread that does not exist in the child.
        if self._owner != os.getpid():
            self._forget_files()
        with self._lock:
            file = self._files.pop(shard, None) or _OpenFile(self.folder / self.names[shard])
            self._files[shard] = file
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        yield file.descriptor  # this reference keeps the file open, even if a thread drops it

    def path(self, shard: int) -> str:
        return str(self.folder / self.names[shard])

    def forget(self, shard: int) -> bool:
        return False

    def release(self, shard: int) -> None:
        if self._owner == os.getpid():
            with self._lock:
                self._files.pop(shard, None)

    def expect(self, shards: Iterable[int]) -> None:
        pass  # a local disk needs no preparation


class CorruptSampleError(DataError):
    """The bytes of a sample do not match dataset.json."""


class ShardDataset:
    """A dataset with random access to samples.  It may be copied to forked or spawned workers.

    Every read is checked against dataset.json; a mismatch raises a DataError that names shard,
    sample and byte offset.  A file system that fails repeatedly raises StorageError.
    """

    def __init__(
        self, folder: Path | str, index: dict[str, Any], samples: SampleIndex, store: Store
    ) -> None:
        self.folder = folder
        self.kind: str = index["kind"]
        self.encoders: dict[str, str] = index["encoders"]
        self.geometry = geometry_in(index)
        self.description: dict[str, Any] = index["description"]
        self.fingerprint: str = index["fingerprint"]
        self.shards, self.keys = samples.shards, samples.keys
        self.common_shapes: Mapping[str, Sequence[int]] | None = None  # set once known
        self._samples, self._store = samples, store

    def __len__(self) -> int:
        return len(self._samples)

    @cached_property
    def keys_digest(self) -> str:
        """Return a hash of the keys and shard sizes; equal hashes allow the same sample order."""
        # Use a hash, since a list of all keys would be too large for a checkpoint.
        digest = hashlib.sha256(json.dumps(self.samples_by_shard).encode())
        for key in self.keys:
            digest.update(f"{key}\n".encode())
        return digest.hexdigest()

    @property
    def samples_by_shard(self) -> list[int]:
        """Return the number of samples of each shard; samples are numbered shard after shard."""
        return [shard.samples for shard in self.shards]

    def sample(self, i: int) -> Sample:
        """Return the location of sample `i`."""
        i = range(len(self))[i]
        shard = self.shards[self._samples.shard_of(i)]
        return Sample(self.keys[i], shard.name, self._samples.members(i))

    def expect(self, samples: Iterable[int]) -> None:
        """Announce the samples that will be read next, so that remote shards are prefetched."""
        self._store.expect(self._samples.shard_of(i) for i in samples)

    def read(self, i: int) -> dict[str, bytes]:
        """Return the members of sample `i`."""
        members = self._samples.members(range(len(self))[i])
        return {name: self.take(i, name, MemberReader.rest) for name in members}

    def take(self, i: int, name: str, use: Callable[[MemberReader], Result]) -> Result:
        """Return `use(member)` for one member; raise KeyError if sample `i` has no such member.

        The checksum of the full member is always verified, even if `use` reads only a part.  If it
        does not match, the result or error of `use` is discarded.
        """
        i = range(len(self))[i]
        location = self._samples.members(i)[name]
        try:
            return self._take(i, name, location, use)
        except CorruptSampleError:
            # A cached copy may be damaged on the local disk: fetch and read the original once.
            if not self._store.forget(self._samples.shard_of(i)):
                raise
            return self._take(i, name, location, use)

    def _take(
        self,
        i: int,
        name: str,
        location: tuple[int, int, int],
        use: Callable[[MemberReader], Result],
    ) -> Result:
        """Return the result of `_take_once`; retry transient errors of the file system."""
        shard = self._samples.shard_of(i)

        def attempt() -> Result:
            try:
                return self._take_once(i, name, location, use)
            except OSError:
                self._store.release(shard)
                raise

        # Retry every OSError: the file existed when the dataset was opened.
        try:
            return retry(attempt, final=())
        except OSError as error:
            raise read_error(self._where(i), error) from error

    def _take_once(
        self,
        i: int,
        name: str,
        location: tuple[int, int, int],
        use: Callable[[MemberReader], Result],
    ) -> Result:
        # `use` may read damaged bytes: verify the checksum whether it returns or raises.
        offset, size, crc32 = location
        with self._store.open(self._samples.shard_of(i)) as file:
            member = MemberReader(file, offset, size)
            try:
                return use(member)
            finally:
                # Include the unread rest in the checksum, also if `use` raised.
                member.skip(size - member.position)
                if member.crc32 != crc32 or member.position != size:
                    cut = f"is cut at {member.position}"
                    fault = "does not match its checksum" if member.position == size else cut
                    raise CorruptSampleError(
                        f"{self._where(i)}, byte {offset}: {name} of {size} bytes {fault}; run "
                        f"`echolab data verify {self.folder}`"
                    )

    def _where(self, i: int) -> str:
        return f"{self._store.path(self._samples.shard_of(i))}: sample {self.keys[i]}"


def open_dataset(
    location: Path | str,
    *,
    cache_dir: Path | str | None = None,
    cache_gb: float = CACHE_GB,
    retry_policy: RetryPolicy = RETRY_POLICY,
) -> ShardDataset:
    """Open the dataset in a local folder or at a remote address.

    Remote shards are downloaded to the folder `cache_dir` ($ECHOLAB_CACHE, ~/.cache/echolab), which
    holds at most `cache_gb` GB (1e9 bytes) and is shared by all processes of the machine.
    Raise DataError if dataset.json or a shard is missing or truncated, FetchError if a server
    fails, StorageError if a file system fails, ConfigError for a bad address or cache.
    """
    url = parse_url(location)
    if url:
        return _open_remote(url, cache_folder(cache_dir), cache_gb, retry_policy)
    return _open_local(Path(location))


def _open_local(folder: Path) -> ShardDataset:
    path = folder / INDEX
    try:
        index, samples = parse_index(read_file(path), path)
    except ABSENT as error:
        raise DataError(f"{path}: not there; the folder is no complete dataset") from error
    # Detect a missing or truncated shard at the start, not after hours of training.
    for shard in samples.shards:
        path = folder / shard.name
        size = _size(path)
        if size != shard.bytes:
            actual = "is not there" if size is None else f"has {size} bytes"
            raise DataError(
                f"{path}: {actual}, dataset.json says {shard.bytes}; "
                f"run `echolab data verify {folder}`"
            )
    store = LocalStore(folder, [shard.name for shard in samples.shards])
    return ShardDataset(folder, index, samples, store)


def _size(path: Path) -> int | None:
    """Return the size of a file in bytes, or None if it does not exist."""
    # Do not retry if the file is absent; other errors of a shared file system may be transient.
    try:
        status = retry(path.stat)
    except ABSENT:
        return None
    except OSError as error:
        raise read_error(path, error) from error
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _open_remote(
    url: str, cache_dir: Path, cache_gb: float, retry_policy: RetryPolicy
) -> ShardDataset:
    if not cache_gb > 0:
        raise ConfigError(f"cache_gb={cache_gb}: must be above 0")
    index, samples = _remote_index(join_url(url, INDEX), retry_policy)
    cache = ShardCache(cache_dir, int(cache_gb * 1e9), retry_policy)
    # Prefetched shards must not evict shards that are still to be read.
    largest = max((shard.bytes for shard in samples.shards), default=1)
    prefetched = min(PREFETCHED_SHARDS, cache.limit_bytes // (2 * largest))
    store = RemoteStore(url, samples.shards, cache, prefetched)
    return ShardDataset(public_url(url), index, samples, store)


def _remote_index(url: str, retry_policy: RetryPolicy) -> tuple[dict[str, Any], SampleIndex]:
    """Fetch and parse a remote dataset.json; retry if it is invalid."""
    # During an upload dataset.json may be incomplete.
    deadline = time.monotonic() + retry_policy.deadline_seconds
    attempt = 0
    while True:
        attempt += 1
        data = io.BytesIO()
        remaining = deadline - time.monotonic()
        fetch(url, data, None, retry_policy._replace(deadline_seconds=remaining))
        try:
            return parse_index(data.getvalue(), public_url(url))
        except DataError:
            seconds = backoff_seconds(attempt, retry_policy)
            if attempt == retry_policy.attempts or time.monotonic() + seconds > deadline:
                raise
            time.sleep(seconds)


# Provenance.  Latents of different autoencoders look similar but represent different images, and
# so do features.  Every dataset, checkpoint and candidates file stores the fingerprints of its
# encoders by name (video, text, image, audio); a foreign dataset stores none and is trusted.


def check_same_encoders(
    name_a: object, encoders_a: Mapping[str, str], name_b: object, encoders_b: Mapping[str, str]
) -> None:
    """Raise a DataError that names the first encoder that differs between `a` and `b`."""
    # Compare only encoders that both sides name.
    for part in sorted(encoders_a.keys() & encoders_b.keys()):
        if encoders_a[part] != encoders_b[part]:
            raise DataError(
                f"{name_a}: its {part} encoder is {encoders_a[part][:12]}, that of {name_b} is "
                f"{encoders_b[part][:12]}; encode both with the same encoder"
            )


def shared_samples(dataset_a: ShardDataset, dataset_b: ShardDataset) -> int:
    """Return the number of samples in both datasets, by key, sizes and checksums."""
    # Do not compare offsets, since the shards may be packed differently.
    index_of = {key: i for i, key in enumerate(dataset_a.keys)}
    return sum(
        _checksums(dataset_a, index_of[key]) == _checksums(dataset_b, i)
        for i, key in enumerate(dataset_b.keys)
        if key in index_of
    )


def _checksums(dataset: ShardDataset, i: int) -> dict[str, tuple[int, int]]:
    """Return size and checksum of each member of a sample."""
    return {name: location[1:] for name, location in dataset.sample(i).members.items()}
