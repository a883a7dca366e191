"""Write a dataset folder: tars by webdataset, each written atomically, and dataset.json last."""

import os
import re
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import webdataset

from echolab.atomic_io import lock_folder, make_folder, remove_quietly, write_atomic, write_error
from echolab.data.index import (
    INDEX,
    SHARD,
    Members,
    Sample,
    Shard,
    encoded_index,
    missing_members,
    split_name,
)
from echolab.data.tars import read_tar
from echolab.errors import DataError
from echolab.geometry import WAN, LatentGeometry

MAX_SHARD_BYTES = 2 * 1024**3


class _Partial:
    """The file object that webdataset writes one tar to, under a temporary name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.file: BinaryIO | None = self.partial.open("wb")

    def write(self, data: bytes) -> int:
        # After an error tarfile may still flush when it is garbage-collected: ignore that.
        return self.file.write(data) if self.file else len(data)

    def finish(self) -> None:
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None
            self.partial.replace(self.path)

    def abandon(self) -> None:
        file, self.file = self.file, None
        if file:
            try:
                file.close()
            except OSError:
                pass  # such as a full disk: an earlier error is reported already
        remove_quietly(self.partial)


class ShardWriter:
    """Writes samples to a new dataset folder, which is complete when the `with` block succeeds.

    Each tar is written under a temporary name, renamed, and read back; dataset.json is written
    last.  After an exception there is no dataset.json, and the next writer removes the leftovers.
    Other writers of the folder raise BusyError until the block ends.
    """

    def __init__(
        self,
        folder: Path,
        *,
        kind: str,
        encoders: dict[str, str] | None = None,
        geometry: LatentGeometry = WAN,
        samples_per_shard: int = 64,
        description: dict[str, Any] | None = None,
    ) -> None:
        if not re.fullmatch(r"[a-z]+", kind) or samples_per_shard < 1:
            raise DataError(
                f"{folder}: kind={kind!r}, samples_per_shard={samples_per_shard}: need a word of "
                "lower-case letters, and 1 or more"
            )
        self.folder, self.kind = Path(folder), kind
        self.encoders, self.description = dict(encoders or {}), dict(description or {})
        self.geometry = geometry  # written for kinds that hold latents
        self.samples_per_shard = samples_per_shard
        self._keys: set[str] = set()
        self._shards: list[Shard] = []
        self._samples: list[Sample] = []
        self._output: _Partial | None = None
        self._tars: Any = None

    def __enter__(self) -> Self:
        # Lock the folder until the block ends.
        make_folder(self.folder)
        with ExitStack() as stack:
            stack.enter_context(lock_folder(self.folder))
            if (self.folder / INDEX).exists():
                raise DataError(f"{self.folder}: already holds a dataset; choose another folder")
            # Remove leftovers of a killed writer.
            try:
                for path in self.folder.iterdir():
                    if SHARD.fullmatch(path.name.removesuffix(".partial")):
                        path.unlink()
            except OSError as error:
                raise write_error(self.folder, error) from error
            self._held = stack.pop_all()
        return self

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """Add one sample with all members of its kind, named as in MEMBERS; raise DataError."""
        # Check the sample before writing any of its bytes.
        for name in members:
            split_name(f"{key}.{name}")
        if key in self._keys or not members:
            raise DataError(
                f"{self.folder}: sample {key} has no member, or its key was written before; give "
                "each sample a key of its own"
            )
        missing = missing_members(self.kind, members)
        if missing:
            raise DataError(
                f"{self.folder}: sample {key} has no {missing[0]}, which {self.kind} samples have; "
                "remove the folder and make it again"
            )
        # Open the first tar at the first sample.
        try:
            if self._tars is None:
                self._tars = webdataset.ShardWriter(
                    f"{self.kind}-%06d.tar",
                    maxcount=self.samples_per_shard,
                    maxsize=MAX_SHARD_BYTES,
                    opener=self._open,
                    post=self._finish_shard,
                    verbose=0,
                    encoder=False,
                    mtime=0,  # so that the same samples yield the same bytes
                )
            self._tars.write({"__key__": key, **members})
        except OSError as error:
            raise write_error(self._path(), error) from error
        self._keys.add(key)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an exception write no dataset.json, so that no reader accepts the folder.
        try:
            if kind is None:
                self._finish()
        finally:
            with self._held:
                # Remove an unfinished tar.
                if self._output:
                    self._output.abandon()

    def _finish(self) -> None:
        try:
            if self._tars is not None:
                self._tars.close()
        except OSError as error:
            raise write_error(self._path(), error) from error
        shards = [shard._asdict() for shard in self._shards]
        samples = [sample._asdict() for sample in self._samples]
        index = encoded_index(
            self.kind, self.encoders, self.description, shards, samples, self.geometry
        )
        write_atomic(self.folder / INDEX, index)

    def _open(self, name: str) -> _Partial:
        self._output = _Partial(self.folder / name)
        return self._output

    def _path(self) -> Path:
        return self._output.path if self._output else self.folder

    def _finish_shard(self, name: str) -> None:
        assert self._output is not None
        self._output.finish()
        # Read the tar back: locations and checksums are those of the bytes on disk.
        members, sha256, size = read_tar(self.folder / name)
        samples: dict[str, Members] = {}
        for member in members:
            key, kind = split_name(member.name)
            samples.setdefault(key, {})[kind] = (member.offset, member.size, member.crc32)
        self._shards.append(Shard(name, sha256, size, len(samples)))
        self._samples += [Sample(key, name, located) for key, located in samples.items()]
