"""A strict reader of plain tars, whoever wrote them: ustar, pax or GNU.

tarfile and webdataset end cleanly on a tar that is cut at a member's border, so a cut shard looks
like a shorter shard.  This walk takes nothing for granted: every header's checksum, every padding
byte and the end of the archive are checked, and a fault is told with its byte offset.

Bytes are read in order and once, never mapped: a bad disk is then an OSError, not a signal.
"""

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from isal import isal_zlib

BLOCK = 512
END = 2 * BLOCK  # two blocks of zeros end an archive
CHUNK = 2**20
LONGEST_EXTRA = 2**20  # bytes of an extended header; longer ones are damaged lengths

PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)


class TarFault(Exception):
    """What is wrong with a tar, and at which byte."""

    def __init__(self, offset: int, what: str) -> None:
        super().__init__(f"byte {offset}: {what}")
        self.offset, self.what = offset, what


class TarMember(NamedTuple):
    """One plain file inside a tar, or a folder: its name ends with a slash."""

    name: str
    header: int  # byte offset of its first header: a long name has one of its own
    offset: int  # byte offset of its data
    size: int
    crc32: int


class Passing:
    """The bytes of a file in order, hashed as they pass."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.position, self.sha256 = file, 0, hashlib.sha256()

    def take(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end of the file."""
        data = self.file.read(size)
        self.sha256.update(data)
        self.position += len(data)
        return data

    def checksum(self, size: int) -> tuple[int, int]:
        """(crc32, number of bytes there were) of the next `size` bytes."""
        crc32 = passed = 0
        while data := self.take(min(CHUNK, size - passed)):
            crc32, passed = isal_zlib.crc32(data, crc32), passed + len(data)
        return crc32, passed


def walk(tar: Passing) -> Iterator[TarMember]:
    """The members of a tar in order, its folders too; raises TarFault or OSError."""
    first, extra = tar.position, dict[str, str]()
    while True:
        position = tar.position
        header = tar.take(BLOCK)
        if len(header) < BLOCK:
            raise TarFault(position, "the tar is cut: no end of archive")
        if not any(header):
            break
        info = _parsed(header, position)
        if info.type in (*PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
            extra |= _extra(info, tar, position)
            continue
        yield _member(info, extra, tar, first)
        first, extra = tar.position, {}
    if extra:
        raise TarFault(position, "the tar is cut: an extended header without its file")
    _end(tar)


def _parsed(header: bytes, position: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError, ValueError) as error:
        raise TarFault(position, f"damaged header ({error})") from error


def _member(info: tarfile.TarInfo, extra: dict[str, str], tar: Passing, first: int) -> TarMember:
    name, start = extra.get("path", info.name), tar.position
    if info.type == tarfile.DIRTYPE and not info.size:
        return TarMember(f"{name.rstrip('/')}/", first, start, 0, 0)
    if info.type not in PLAIN:
        raise TarFault(first, f"{name!r} is not a plain file")
    if any(key.startswith("GNU.sparse") for key in extra):
        raise TarFault(first, f"{name!r} is stored with holes; pack it without --sparse")
    size = int(extra["size"]) if extra.get("size", "").isdecimal() else info.size
    crc32, have = tar.checksum(size)
    if have < size:
        raise TarFault(start, f"{name} is cut: {have} of {size} bytes")
    _padding(tar, size, name)
    return TarMember(name, first, start, size, crc32)


def _padding(tar: Passing, size: int, name: str) -> None:
    """What fills the last block of `size` bytes must be zeros."""
    position, missing = tar.position, -size % BLOCK
    padding = tar.take(missing)
    if len(padding) < missing or any(padding):
        raise TarFault(position, f"the padding after {name} is damaged or cut")


def _extra(info: tarfile.TarInfo, tar: Passing, position: int) -> dict[str, str]:
    """What an extended header says of the file that follows it."""
    if not 0 < info.size <= LONGEST_EXTRA:
        raise TarFault(position, f"damaged header (an extended header of {info.size} bytes)")
    data = tar.take(info.size)
    if len(data) < info.size:
        raise TarFault(position, f"an extended header is cut: {len(data)} of {info.size} bytes")
    _padding(tar, info.size, "an extended header")
    try:
        if info.type == tarfile.GNUTYPE_LONGNAME:
            return {"path": data.rstrip(b"\0").decode()}
        records = dict(_records(data))
    except (UnicodeDecodeError, ValueError) as error:
        raise TarFault(position, f"damaged extended header ({error})") from error
    if info.type == tarfile.XGLTYPE:  # of the whole archive: comments and the like
        if {"path", "size"} & set(records):
            raise TarFault(position, "an extended header gives all files one name or size")
        return {}
    return records


def _records(data: bytes) -> Iterator[tuple[str, str]]:
    """Pax records `LENGTH key=value\\n`; ValueError where they do not fill `data`."""
    while data:
        length, space, _ = data.partition(b" ")
        end = int(length) if length.isdigit() else 0
        record = data[len(length) + 1 : end]
        key, equals, value = record[:-1].partition(b"=")
        if not (space and equals and key and record.endswith(b"\n") and end <= len(data)):
            raise ValueError(f"no record: {data[:20]!r}")
        # Other fields may hold any bytes; a name that is not UTF-8 is none that a key can be.
        yield key.decode(), value.decode(errors="strict" if key == b"path" else "replace")
        data = data[end:]


def _end(tar: Passing) -> None:
    """After one block of zeros: at least one more, and zeros only."""
    second = tar.position
    while data := tar.take(CHUNK):
        if data.count(0) < len(data):
            at = tar.position - len(data.lstrip(b"\0"))
            raise TarFault(at, "there is something after the end of the archive")
    if tar.position - second < END - BLOCK:
        raise TarFault(second, "the tar is cut: half an end of archive")


def read_tar(path: Path) -> tuple[list[TarMember], str, int]:
    """All members of a tar, its sha256 and its size in bytes; raises TarFault or OSError."""
    with path.open("rb") as file:
        tar = Passing(file)
        members = list(walk(tar))
        return members, tar.sha256.hexdigest(), tar.position
