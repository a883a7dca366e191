"""Is a dataset whole?  Every fault is one line that names shard, sample and byte offset."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from echolab.data.index import INDEX, SHARD, read_index, split_name
from echolab.data.tars import TarFault, TarMember, map_tar, walk
from echolab.errors import DataError

Expected = dict[tuple[str, str], tuple[int, int, int]]  # (key, member) -> offset, size, crc32


def verify(folder: Path | str) -> list[str]:
    """All faults of a dataset; an empty list says that every byte is as it was written."""
    folder = Path(folder)
    try:
        index = read_index(folder)
        return list(_faults(folder, index))
    except DataError as error:
        return [str(error)]
    except (KeyError, TypeError, ValueError) as error:
        return [f"{folder / INDEX}: cannot be understood ({type(error).__name__}: {error})"]


def _faults(folder: Path, index: dict[str, Any]) -> Iterator[str]:
    named = {shard["name"] for shard in index["shards"]}
    expected: dict[str, Expected] = {name: {} for name in named}
    seen: set[str] = set()
    for sample in index["samples"]:
        if sample["key"] in seen or sample["shard"] not in named:
            yield f"{folder / INDEX}: sample {sample['key']}: twice, or in a shard not listed"
            continue
        seen.add(sample["key"])
        for member, (offset, size, crc32) in sample["members"].items():
            expected[sample["shard"]][sample["key"], member] = (offset, size, crc32)
    for shard in index["shards"]:
        yield from _shard_faults(folder / shard["name"], shard, expected[shard["name"]])
    for path in sorted(folder.glob("*.tar*")):
        if path.name not in named:
            yield f"{path}: not listed in {INDEX}"


def _shard_faults(path: Path, shard: dict[str, Any], expected: Expected) -> Iterator[str]:
    if not SHARD.fullmatch(shard["name"]):
        yield f"{path}: {shard['name']!r} is no name of a shard"
        return
    try:
        with map_tar(path) as tar:
            if len(tar) != shard["bytes"]:
                yield f"{path}: {len(tar)} bytes, {INDEX} says {shard['bytes']}"
            found = list(_member_faults(path, tar, expected))
            yield from found
            whole = hashlib.sha256(tar).hexdigest() == shard["sha256"]
    except OSError as error:
        yield f"{path}: {error.strerror}"
        return
    if not whole and not found:
        yield f"{path}: sha256 differs from {INDEX}, in a byte that belongs to no sample"
    if len({key for key, _ in expected}) != shard["samples"]:
        yield f"{path}: {INDEX} counts {shard['samples']} samples and lists another number"


def _member_faults(path: Path, tar: memoryview, expected: Expected) -> Iterator[str]:
    found: set[tuple[str, str]] = set()
    closed: set[str] = set()
    current = ""
    try:
        for member in walk(tar):
            at = f"{path}: byte {member.header}"
            try:
                name = split_name(member.name)
            except DataError as error:
                yield f"{at}: {error}"
                continue
            if name[0] != current:
                closed.add(current)
                current = name[0]
                if current in closed:
                    yield f"{at}: sample {current} goes on after another sample began"
            if name in found:
                yield f"{at}: sample {name[0]}: a second {name[1]}"
            found.add(name)
            yield from _content_faults(path, member, name, expected.get(name))
    except TarFault as fault:
        yield f"{path}: {fault}{_whose(expected, fault.offset)}"
    for (key, kind), (offset, _, _) in expected.items():
        if (key, kind) not in found:
            yield f"{path}: byte {offset}: sample {key}: {kind} is missing"


def _content_faults(
    path: Path, member: TarMember, name: tuple[str, str], expected: tuple[int, int, int] | None
) -> Iterator[str]:
    at = f"{path}: byte {member.offset}: sample {name[0]}: {name[1]}"
    if expected is None:
        yield f"{at} is not in {INDEX}"
    elif (member.offset, member.size) != expected[:2]:
        yield f"{at} of {member.size} bytes, {INDEX} says {expected[1]} at byte {expected[0]}"
    elif member.crc32 != expected[2]:
        yield f"{at} does not match its checksum"


def _whose(expected: Expected, offset: int) -> str:
    """The sample whose member a damaged byte range belongs to, as far as dataset.json tells."""
    for (key, kind), (start, size, _) in expected.items():
        if start - 512 <= offset <= start + size + 511:
            return f" (sample {key}, {kind})"
    return ""
