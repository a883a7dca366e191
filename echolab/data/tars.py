"""Read plain tars of any format (ustar, pax or GNU) strictly, several in parallel.

tarfile and webdataset accept a tar that is truncated at the end of a member, so a truncated shard
looks like a shorter shard.  This reader checks every header's checksum, every padding byte and the
end of the archive, and reports the byte offset of a fault.

Bytes are read once and sequentially, not memory-mapped: a bad disk then raises OSError instead of
sending a signal.
"""

import hashlib
import multiprocessing
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from isal import isal_zlib

from echolab.errors import DataError

BLOCK = 512
END = 2 * BLOCK  # two blocks of zeros end an archive
CHUNK = 2**20
LONGEST_EXTRA = 2**20  # maximum bytes of an extended header; a longer length is damaged

PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)


class TarError(Exception):
    """A fault in a tar, with its byte offset."""

    def __init__(self, offset: int, what: str) -> None:
        super().__init__(f"byte {offset}: {what}")
        self.offset, self.what = offset, what


class TarMember(NamedTuple):
    """One plain file in a tar, or a folder, whose name ends with a slash."""

    name: str
    header: int  # byte offset of its first header; a long name has an extra header
    offset: int  # byte offset of its data
    size: int
    crc32: int


class HashingReader:
    """Reads the bytes of a file sequentially and hashes them."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.position, self.sha256 = file, 0, hashlib.sha256()

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes; fewer at the end of the file."""
        data = self.file.read(size)
        self.sha256.update(data)
        self.position += len(data)
        return data

    def checksum(self, size: int) -> tuple[int, int]:
        """Read the next `size` bytes; return their crc32 and their number, smaller at the end."""
        # Read in chunks, so that a large member does not fill memory.
        crc32 = count = 0
        while data := self.take(min(CHUNK, size - count)):
            crc32, count = isal_zlib.crc32(data, crc32), count + len(data)
        return crc32, count


def walk(tar: HashingReader) -> Iterator[TarMember]:
    """Yield the members of a tar in order, including folders; raise TarError or OSError."""
    # Extended headers precede the header of their file, and hold its long name or size.
    first, extra = tar.position, dict[str, str]()
    while True:
        position = tar.position
        header = tar.take(BLOCK)
        if len(header) < BLOCK:
            raise TarError(position, "the tar is cut: no end of archive")
        if not any(header):
            break
        info = _parse_header(header, position)
        if info.type in (*PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
            extra |= _read_extended_header(info, tar, position)
            continue
        yield _read_member(info, extra, tar, first)
        first, extra = tar.position, {}
    if extra:
        raise TarError(position, "the tar is cut: an extended header without its file")
    _check_end(tar)


def _parse_header(header: bytes, position: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError, ValueError) as error:
        raise TarError(position, f"damaged header ({error})") from error


def _read_member(
    info: tarfile.TarInfo, extra: dict[str, str], tar: HashingReader, first: int
) -> TarMember:
    name, start = extra.get("path", info.name), tar.position
    if info.type == tarfile.DIRTYPE and not info.size:
        return TarMember(f"{name.rstrip('/')}/", first, start, 0, 0)
    # Links, devices and sparse files do not store their content at their offset.
    if info.type not in PLAIN:
        raise TarError(first, f"{name!r} is not a plain file")
    if any(key.startswith("GNU.sparse") for key in extra):
        raise TarError(first, f"{name!r} is stored with holes; pack it without --sparse")
    # Pax stores sizes from 8 GiB on, which do not fit the plain header.
    size = int(extra["size"]) if extra.get("size", "").isdecimal() else info.size
    crc32, count = tar.checksum(size)
    if count < size:
        raise TarError(start, f"{name} is cut: {count} of {size} bytes")
    _check_padding(tar, size, name)
    return TarMember(name, first, start, size, crc32)


def _check_padding(tar: HashingReader, size: int, name: str) -> None:
    """Raise TarError unless the data of `size` bytes is zero-padded to a full block."""
    position, missing = tar.position, -size % BLOCK
    padding = tar.take(missing)
    if len(padding) < missing or any(padding):
        raise TarError(position, f"the padding after {name} is damaged or cut")


def _read_extended_header(
    info: tarfile.TarInfo, tar: HashingReader, position: int
) -> dict[str, str]:
    """Return the records of an extended header for the next file."""
    # A damaged length must not allocate too much memory.
    if not 0 < info.size <= LONGEST_EXTRA:
        raise TarError(position, f"damaged header (an extended header of {info.size} bytes)")
    data = tar.take(info.size)
    if len(data) < info.size:
        raise TarError(position, f"an extended header is cut: {len(data)} of {info.size} bytes")
    _check_padding(tar, info.size, "an extended header")
    # GNU stores only the name, pax a list of records.
    try:
        if info.type == tarfile.GNUTYPE_LONGNAME:
            return {"path": data.rstrip(b"\0").decode()}
        records = dict(_parse_records(data))
    except (UnicodeDecodeError, ValueError) as error:
        raise TarError(position, f"damaged extended header ({error})") from error
    if info.type == tarfile.XGLTYPE:  # global records of the archive, such as comments
        if {"path", "size"} & set(records):
            raise TarError(position, "an extended header gives all files one name or size")
        return {}
    return records


def _parse_records(data: bytes) -> Iterator[tuple[str, str]]:
    """Yield pax records `LENGTH key=value\\n`; raise ValueError unless they fill `data`."""
    while data:
        length, space, _ = data.partition(b" ")
        end = int(length) if length.isdigit() else 0
        record = data[len(length) + 1 : end]
        key, equals, value = record[:-1].partition(b"=")
        if not (space and equals and key and record.endswith(b"\n") and end <= len(data)):
            raise ValueError(f"no record: {data[:20]!r}")
        # Names must be UTF-8, since keys are; other fields may hold any bytes.
        yield key.decode(), value.decode(errors="strict" if key == b"path" else "replace")
        data = data[end:]


def _check_end(tar: HashingReader) -> None:
    """Raise TarError unless the rest of the file is all zeros, and at least one block of them."""
    second = tar.position
    while data := tar.take(CHUNK):
        if data.count(0) < len(data):
            offset = tar.position - len(data.lstrip(b"\0"))
            raise TarError(offset, "there are bytes after the end of the archive")
    if tar.position - second < END - BLOCK:
        raise TarError(second, "the tar is cut: half an end of archive")


def read_tar(path: Path) -> tuple[list[TarMember], str, int]:
    """Return all members of a tar, its sha256 and size in bytes; raise TarError or OSError."""
    with path.open("rb") as file:
        tar = HashingReader(file)
        members = list(walk(tar))
        return members, tar.sha256.hexdigest(), tar.position


# Several in parallel

Job = TypeVar("Job")
Result = TypeVar("Result")


MIN_BYTES = 2**27  # minimum per process; for less, starting a process takes longer than reading


def count_processes(workers: int | None, sizes: Sequence[int]) -> int:
    """Return the number of processes for files of the given sizes in bytes.

    By default use one process per core, fewer for little data.  Raise DataError if `workers` is
    less than 1.
    """
    if workers is not None and workers < 1:
        raise DataError(f"workers={workers}: must be 1 or more")
    useful = min(len(os.sched_getaffinity(0)), sum(sizes) // MIN_BYTES)
    return max(1, min(useful if workers is None else workers, len(sizes)))


def map_parallel(
    work: Callable[[Job], Result], jobs: Iterable[Job], workers: int
) -> Iterator[tuple[int, Result]]:
    """Yield (index of the job, its result) in the order of completion; run one worker in process.

    `work` must be picklable; an exception in `work` ends all jobs.  `jobs` is consumed lazily.
    """
    if workers == 1:
        yield from ((index, work(job)) for index, job in enumerate(jobs))
        return
    # Spawn instead of fork, since this process may have threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        index_of: dict[Future[Result], int] = {}
        # Keep a few jobs queued, and yield results as they complete.
        try:
            for index, job in enumerate(jobs):
                index_of[pool.submit(work, job)] = index
                if len(index_of) >= 2 * workers:
                    yield from _pop_completed(index_of)
            while index_of:
                yield from _pop_completed(index_of)
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died (killed, or out of memory); run again with workers=1"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _pop_completed(index_of: dict[Future[Result], int]) -> list[tuple[int, Result]]:
    """Wait for at least one job; remove the completed jobs and return their results."""
    done, _ = wait(index_of, return_when=FIRST_COMPLETED)
    return [(index_of.pop(future), future.result()) for future in done]
