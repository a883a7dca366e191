"""Is a dataset whole?  Every fault is one line that names shard, sample and byte offset.

Of each shard: its size and sha256, the structure of the tar to its last block, each member's place,
size and crc32 against dataset.json, and that the content can be decoded.
"""

import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from echolab.data.index import INDEX, Shard, geometry_in, missing_members
from echolab.data.member_reader import Pieces
from echolab.data.names import PARTIAL, dotted, split_file
from echolab.data.parallel import processes, spread
from echolab.data.sample_index import Table, parse_index
from echolab.data.samples import COMPARED, TENSORS, TRIED, Shapes, shapes_of, take_about, usual
from echolab.data.tars import BLOCK, Passing, TarFault, TarMember, walk
from echolab.data.validate_member import Undecodable, content_fault
from echolab.errors import DataError, printable
from echolab.geometry import WAN, LatentGeometry
from echolab.progress import Advance

Place = tuple[int, int, int]  # offset, size, crc32
Name = tuple[str, str]  # key, member

# Of a tar header: name, size, the digits of its checksum, and the first part of a long name.
OWN_FIELDS = ((0, 100), (124, 136), (148, 154), (345, 500))


class Fault(NamedTuple):
    """One thing that is not as dataset.json says."""

    file: str  # a shard, or dataset.json
    what: str
    byte: int | None = None
    sample: str | None = None

    def line(self, folder: Path) -> str:
        """For people."""
        byte = "" if self.byte is None else f"byte {self.byte}: "
        sample = "" if self.sample is None else f"sample {self.sample}: "
        line = printable(f"{folder / self.file}: {byte}{sample}{self.what}")
        return line.replace("\n", "\\n")


class _Look(NamedTuple):
    """How closely to look."""

    deep: bool
    kind: str  # of the dataset
    form: Shapes  # that all samples of it must have
    geometry: LatentGeometry = WAN  # of its latents


class _Shard:
    """What dataset.json says of one shard, and whose each byte is."""

    def __init__(self, about: Shard, expected: dict[Name, Place], foreign: bool) -> None:
        self.name, self.bytes, self.sha256 = about.name, about.bytes, about.sha256
        self.expected, self.foreign = expected, foreign
        places = sorted((place[0], place[1], key) for (key, _), place in expected.items())
        self._keys = [key for _, _, key in places]
        # A member's bytes go from the end of the one before it to the end of its own last block.
        self._ends = [offset + size + -size % BLOCK for offset, size, _ in places]

    def owner(self, byte: int) -> str | None:
        """The sample that a byte belongs to; the end of the archive belongs to the last one."""
        if not self._keys:
            return None
        return self._keys[min(bisect_right(self._ends, byte), len(self._keys) - 1)]

    def fault(self, byte: int, what: str, sample: str | None = None) -> Fault:
        return Fault(self.name, what, byte, self.owner(byte) if sample is None else sample)


def verify(
    folder: Path | str,
    *,
    workers: int | None = 1,
    deep: bool = False,
    advance: Advance | None = None,
) -> list[str]:
    """All faults of a dataset, a line each; an empty list says that every byte is as written."""
    folder = Path(folder)
    found = find_faults(folder, workers=workers, deep=deep, advance=advance)
    return [fault.line(folder) for fault in found]


def find_faults(
    folder: Path,
    *,
    workers: int | None = 1,
    deep: bool = False,
    advance: Advance | None = None,
) -> list[Fault]:
    """All faults of a dataset, shard by shard.

    `workers` processes share the shards, None is one a core; `deep` also decodes videos, sounds
    and pictures, and looks whether tensors can be trained on: shapes that fit, finite values.
    """
    path = folder / INDEX
    try:
        index, table = parse_index(path.read_bytes(), path)
    except DataError as error:
        return [Fault(INDEX, str(error).removeprefix(f"{path}: "))]
    except OSError as error:
        why = "not there" if isinstance(error, FileNotFoundError) else error.strerror
        return [Fault(INDEX, f"{why}; the folder is no whole dataset")]
    kind = index["kind"]
    found = _doubled_keys(table.keys) + _lacking(kind, table)
    found += _other_files(folder, {shard.name for shard in table.shards})
    count = processes(workers, [shard.bytes for shard in table.shards])
    results: dict[int, list[Fault]] = {}
    geometry = geometry_in(index)
    form = _form(folder, table, kind, geometry) if deep and kind in TENSORS else {}
    look = _Look(deep, kind, form, geometry)
    shards = _shards(table, kind == "foreign")
    for number, result in spread(partial(_shard_faults, folder, look), shards, count):
        results[number] = result
        if advance is not None:
            advance(len(results), "")
    return found + [fault for number in sorted(results) for fault in results[number]]


def _doubled_keys(keys: Sequence[str]) -> list[Fault]:
    counts = Counter(keys)
    return [Fault(INDEX, "is listed twice", None, key) for key, n in counts.items() if n > 1]


def _lacking(kind: str, table: Table) -> list[Fault]:
    """Samples without a member that their kind requires."""
    return [
        Fault(
            table.shards[table.shard_of(i)].name,
            f"has no {name}, which {kind} samples have",
            None,
            table.keys[i],
        )
        for i in range(len(table))
        for name in missing_members(kind, table.members(i))
    ]


def _shards(table: Table, foreign: bool) -> Iterator[_Shard]:
    starts = table.shard_starts.tolist()
    for shard, first, stop in zip(table.shards, starts, starts[1:], strict=False):
        samples = [(table.keys[i], table.members(i)) for i in range(first, stop)]
        expected = {(key, name): at for key, found in samples for name, at in found.items()}
        yield _Shard(shard, expected, foreign)


def _other_files(folder: Path, named: set[str]) -> list[Fault]:
    """Tars that nobody would read, and what a killed writer left."""
    names = sorted(path.name for path in folder.iterdir())
    tars = [name for name in names if re.search(r"\.(tar|tgz|partial)(\.|$)", name)]
    extra = [name for name in tars if name not in named and name != PARTIAL]
    return [Fault(name, f"not listed in {INDEX}", 0) for name in extra]


def _form(folder: Path, table: Table, kind: str, geometry: LatentGeometry) -> Shapes:
    """Return the shapes that all samples must have, as training finds them."""
    found: list[Shapes] = []
    for i in range(min(len(table), TRIED)):
        place = table.members(i).get("safetensors")
        try:
            with (folder / table.shards[table.shard_of(i)].name).open("rb") as file:
                if place:
                    pieces = Pieces(file.fileno(), *place[:2])
                    found.append(shapes_of(pieces, kind, geometry))
        except (OSError, Undecodable):
            continue
        if len(found) == COMPARED:
            break
    return usual(found)


def _shard_faults(folder: Path, look: _Look, shard: _Shard) -> list[Fault]:
    try:
        with (folder / shard.name).open("rb") as file:
            return list(_tar_faults(file, shard, look))
    except OSError as error:
        first = min((place[0] for place in shard.expected.values()), default=0)
        return [shard.fault(first, error.strerror or str(error))]


def _tar_faults(file: BinaryIO, shard: _Shard, look: _Look) -> Iterator[Fault]:
    size = file.seek(0, 2)
    file.seek(0)
    if size != shard.bytes:
        what = f"the shard has {size} bytes, {INDEX} says {shard.bytes}"
        yield shard.fault(min(size, shard.bytes), what)
    tar, members = Passing(file), list[TarMember]()
    found = []
    try:
        members += walk(tar)
    except TarFault as fault:
        found.append(shard.fault(fault.offset, fault.what))
    found += _member_faults(file, members, shard, look)
    yield from found
    if not found and size == shard.bytes and tar.sha256.hexdigest() != shard.sha256:
        # Not in the data, the padding or the end: those were compared.
        what = f"sha256 differs from {INDEX}, in the header of a member"
        yield shard.fault(_odd_header(file, members), what)


def _member_faults(
    file: BinaryIO, members: list[TarMember], shard: _Shard, look: _Look
) -> Iterator[Fault]:
    found: set[Name] = set()
    closed: set[str] = set()
    current: str | None = None
    for member in members:
        name = split_file(member.name)
        if name is None:
            if not shard.foreign:
                yield shard.fault(member.header, f"{member.name!r} is part of no sample")
            continue
        key, kind = name
        if key != current:
            closed |= {current} if current is not None else set()
            current = key
            if key in closed:
                yield shard.fault(member.header, f"{kind} follows after another sample began", key)
        if name in found:
            yield shard.fault(member.header, f"a second {kind}", key)
        found.add(name)
        yield from _content_faults(file, member, shard, name, look)
    for (key, kind), (offset, _, _) in shard.expected.items():
        if (key, kind) not in found:
            yield shard.fault(offset, f"{kind} is missing", key)


def _content_faults(
    file: BinaryIO, member: TarMember, shard: _Shard, name: Name, look: _Look
) -> Iterator[Fault]:
    (key, kind), expected = name, shard.expected.get(name)
    if expected is None:
        why = " (a key with dots?)" if dotted(kind) else ""
        yield shard.fault(member.header, f"{kind} is not in {INDEX}{why}", key)
    elif (member.offset, member.size) != expected[:2]:
        place = f"{expected[1]} at byte {expected[0]}"
        yield shard.fault(
            member.offset, f"{kind} of {member.size} bytes, {INDEX} says {place}", key
        )
    elif member.crc32 != expected[2]:
        yield shard.fault(member.offset, f"{kind} does not match its checksum", key)
    elif what := _fault_within(Pieces(file.fileno(), member.offset, member.size), kind, look):
        yield shard.fault(member.offset, f"{kind} {what}", key)


def _fault_within(pieces: Pieces, member: str, look: _Look) -> str | None:
    """Why a member cannot be used; where it is trained on, by the rule of training itself."""
    if not (look.deep and look.kind in TENSORS and member in ("safetensors", "json")):
        return content_fault(member, pieces.at, pieces.size, deep=look.deep)
    try:
        if member == "json":
            take_about(pieces)
        else:
            from echolab.data.tensors import take_sample  # and torch, only for a deep look

            take_sample(pieces, look.kind, look.form, geometry=look.geometry)
    except Undecodable as error:
        return f"cannot be trained on ({error})"
    return None


def _odd_header(file: BinaryIO, members: list[TarMember]) -> int:
    """The byte at which one header differs from most others in what is not a member's own."""
    seen = []
    for member in members:
        header = bytearray(os.pread(file.fileno(), BLOCK, member.offset - BLOCK))
        for start, stop in OWN_FIELDS:
            header[start:stop] = bytes(stop - start)
        seen.append(bytes(header))
    usual = Counter(seen).most_common(1)[0][0] if seen else b""
    for member, found in zip(members, seen, strict=True):
        if found != usual:
            at = next(i for i in range(BLOCK) if found[i] != usual[i])
            return member.offset - BLOCK + at
    return 0
