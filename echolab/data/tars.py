"""A strict reader of plain tars.

tarfile and webdataset end cleanly on a tar that is cut at a member's border, so a cut shard looks
like a shorter shard.  This walk takes nothing for granted: every header's checksum, every padding
byte and the end of the archive are checked, and a fault is told with its byte offset.
"""

import hashlib
import mmap
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

BLOCK = 512
END = 2 * BLOCK  # two blocks of zeros end an archive


class TarFault(Exception):
    """What is wrong with a tar, and at which byte."""

    def __init__(self, offset: int, what: str) -> None:
        super().__init__(f"byte {offset}: {what}")
        self.offset = offset


class TarMember(NamedTuple):
    """One plain file inside a tar."""

    name: str
    header: int  # byte offset of its header
    offset: int  # byte offset of its data
    size: int
    crc32: int


def walk(tar: memoryview) -> Iterator[TarMember]:
    """The members of a whole tar held in memory (or mapped), in order; raises TarFault."""
    position = 0
    while True:
        header = bytes(tar[position : position + BLOCK])
        if len(header) < BLOCK:
            raise TarFault(position, "the tar is cut: no end of archive")
        if not any(header):
            break
        member = _member(tar, header, position)
        yield member
        position = _after(tar, member)
    if len(tar) < position + END:
        raise TarFault(position, "the tar is cut: half an end of archive")
    if bytes(tar[position:]).strip(b"\0"):
        raise TarFault(position, "there is something after the end of the archive")


def _member(tar: memoryview, header: bytes, position: int) -> TarMember:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError, ValueError) as error:
        raise TarFault(position, f"damaged header ({error})") from error
    if not info.isreg() or info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise TarFault(position, f"{info.name!r} is not a plain file")
    start = position + BLOCK
    if start + info.size > len(tar):
        have = max(0, len(tar) - start)
        raise TarFault(start, f"{info.name} is cut: {have} of {info.size} bytes")
    return TarMember(
        info.name, position, start, info.size, zlib.crc32(tar[start : start + info.size])
    )


def _after(tar: memoryview, member: TarMember) -> int:
    """Where the next header starts; the padding up to there must be zeros."""
    end = member.offset + member.size
    after = member.offset + -(-member.size // BLOCK) * BLOCK
    if after > len(tar) or any(tar[end:after]):
        raise TarFault(end, f"the padding after {member.name} is damaged or cut")
    return after


@contextmanager
def map_tar(path: Path) -> Iterator[memoryview]:
    """The bytes of a file, mapped; raises OSError."""
    with path.open("rb") as file:
        if not path.stat().st_size:  # an empty file cannot be mapped
            yield memoryview(b"")
            return
        with (
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as tar,
        ):
            yield tar


def read_tar(path: Path) -> tuple[list[TarMember], str, int]:
    """All members of a tar, its sha256 and its size in bytes; raises TarFault or OSError."""
    with map_tar(path) as tar:
        return list(walk(tar)), hashlib.sha256(tar).hexdigest(), len(tar)
