"""Check that a dataset is complete and undamaged.

Each fault is one line that names shard, sample and byte offset.  The checks of each shard are its
size and sha256, the structure of the tar up to its last block, the location, size and crc32 of each
member against dataset.json, and that the content can be decoded.
"""

import io
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from echolab.data.index import (
    INDEX,
    PARTIAL_INDEX,
    SampleIndex,
    Shard,
    geometry_in,
    has_foreign_dot,
    missing_members,
    parse_index,
    split_path,
)
from echolab.data.samples import (
    COMPARED,
    MAX_PIXELS,
    TENSORS,
    TRIED,
    MemberError,
    MemberReader,
    Read,
    Shapes,
    first_line,
    most_common_shapes,
    parse_header,
    parse_json,
    read_array,
    read_arrays,
    read_flac,
    read_metadata,
    shapes_of,
)
from echolab.data.tars import (
    BLOCK,
    HashingReader,
    TarError,
    TarMember,
    count_processes,
    map_parallel,
    walk,
)
from echolab.errors import DataError, escape_unprintable
from echolab.geometry import WAN, LatentGeometry
from echolab.progress import Advance

Location = tuple[int, int, int]  # offset, size, crc32
Name = tuple[str, str]  # key, member

# Byte ranges of a tar header: name, size, digits of the checksum, first part of a long name.
VARYING_FIELDS = ((0, 100), (124, 136), (148, 154), (345, 500))
FLOATS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


class Fault(NamedTuple):
    """One difference from dataset.json or violation of the format."""

    file: str  # a shard, or dataset.json
    what: str
    byte: int | None = None
    sample: str | None = None

    def line(self, folder: Path) -> str:
        """Return the fault as one line of text."""
        byte = "" if self.byte is None else f"byte {self.byte}: "
        sample = "" if self.sample is None else f"sample {self.sample}: "
        line = escape_unprintable(f"{folder / self.file}: {byte}{sample}{self.what}")
        return line.replace("\n", "\\n")


class _Options(NamedTuple):
    """The settings of the checks, the same for all shards."""

    deep: bool  # also decode the content
    kind: str  # kind of the dataset
    common: Shapes  # required shapes of all samples
    geometry: LatentGeometry = WAN  # geometry of the latents


class _Expected:
    """The expected content of one shard according to dataset.json."""

    def __init__(self, shard: Shard, members: dict[Name, Location], foreign: bool) -> None:
        self.name, self.bytes, self.sha256 = shard.name, shard.bytes, shard.sha256
        self.members, self.foreign = members, foreign
        # Sort the members by offset, to locate the owner of a byte by bisection.
        located = sorted((at[0], at[1], key) for (key, _), at in members.items())
        self._keys = [key for _, _, key in located]
        # A member owns the bytes from the end of the previous member to the end of its last block.
        self._ends = [offset + size + -size % BLOCK for offset, size, _ in located]

    def owner(self, byte: int) -> str | None:
        """Return the sample that owns a byte; the last sample owns the end of the archive."""
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
    """Return all faults of a dataset, one line each; an empty list if the dataset is intact."""
    folder = Path(folder)
    faults = find_faults(folder, workers=workers, deep=deep, advance=advance)
    return [fault.line(folder) for fault in faults]


def find_faults(
    folder: Path,
    *,
    workers: int | None = 1,
    deep: bool = False,
    advance: Advance | None = None,
) -> list[Fault]:
    """Return all faults of a dataset, shard by shard.

    `workers` processes share the shards; None means one per core.  `deep` also decodes videos,
    audio and images, and checks that tensors have consistent shapes and finite values.
    """
    # Parse dataset.json, on which all other checks depend.
    path = folder / INDEX
    try:
        index, samples = parse_index(path.read_bytes(), path)
    except DataError as error:
        return [Fault(INDEX, str(error).removeprefix(f"{path}: "))]
    except OSError as error:
        reason = "not there" if isinstance(error, FileNotFoundError) else error.strerror
        return [Fault(INDEX, f"{reason}; the folder is no complete dataset")]
    # Faults of dataset.json and of the folder's listing.
    kind, geometry = index["kind"], geometry_in(index)
    faults = _duplicate_keys(samples.keys) + _missing_members(kind, samples)
    faults += _unlisted_files(folder, {shard.name for shard in samples.shards})
    # Faults of each shard, in parallel.
    deep_tensors = deep and kind in TENSORS
    common = _common_shapes(folder, samples, kind, geometry) if deep_tensors else {}
    work = partial(_shard_faults, folder, _Options(deep, kind, common, geometry))
    count = count_processes(workers, [shard.bytes for shard in samples.shards])
    results: dict[int, list[Fault]] = {}
    for i, result in map_parallel(work, _expected_shards(samples, kind == "foreign"), count):
        results[i] = result
        if advance is not None:
            advance(len(results), "")
    return faults + [fault for i in sorted(results) for fault in results[i]]


def _duplicate_keys(keys: Sequence[str]) -> list[Fault]:
    counts = Counter(keys)
    return [Fault(INDEX, "is listed twice", None, key) for key, n in counts.items() if n > 1]


def _missing_members(kind: str, samples: SampleIndex) -> list[Fault]:
    """Return a fault for each sample without a member that its kind requires."""
    return [
        Fault(
            samples.shards[samples.shard_of(i)].name,
            f"has no {name}, which {kind} samples have",
            None,
            samples.keys[i],
        )
        for i in range(len(samples))
        for name in missing_members(kind, samples.members(i))
    ]


def _expected_shards(samples: SampleIndex, foreign: bool) -> Iterator[_Expected]:
    starts = samples.shard_starts.tolist()
    for shard, first, stop in zip(samples.shards, starts, starts[1:], strict=False):
        members = {
            (samples.keys[i], name): location
            for i in range(first, stop)
            for name, location in samples.members(i).items()
        }
        yield _Expected(shard, members, foreign)


def _unlisted_files(folder: Path, listed: set[str]) -> list[Fault]:
    """Return a fault for each tar or leftover of a killed writer that is not in dataset.json."""
    names = sorted(path.name for path in folder.iterdir())
    tars = [name for name in names if re.search(r"\.(tar|tgz|partial)(\.|$)", name)]
    extra = [name for name in tars if name not in listed and name != PARTIAL_INDEX]
    return [Fault(name, f"not listed in {INDEX}", 0) for name in extra]


def _common_shapes(
    folder: Path, samples: SampleIndex, kind: str, geometry: LatentGeometry
) -> Shapes:
    """Return the shapes that all samples must have, by the same rule as in training."""
    shapes: list[Shapes] = []
    for i in range(min(len(samples), TRIED)):
        # Skip unreadable samples, which other checks report.
        location = samples.members(i).get("safetensors")
        try:
            with (folder / samples.shards[samples.shard_of(i)].name).open("rb") as file:
                if location:
                    member = MemberReader(file.fileno(), *location[:2])
                    shapes.append(shapes_of(member, kind, geometry))
        except (OSError, MemberError):
            continue
        if len(shapes) == COMPARED:
            break
    return most_common_shapes(shapes)


def _shard_faults(folder: Path, options: _Options, shard: _Expected) -> list[Fault]:
    try:
        with (folder / shard.name).open("rb") as file:
            return list(_tar_faults(file, shard, options))
    except OSError as error:
        first = min((location[0] for location in shard.members.values()), default=0)
        return [shard.fault(first, error.strerror or str(error))]


def _tar_faults(file: BinaryIO, shard: _Expected, options: _Options) -> Iterator[Fault]:
    # Check the members even if the size is wrong: they show where bytes are missing.
    size = file.seek(0, 2)
    file.seek(0)
    if size != shard.bytes:
        what = f"the shard has {size} bytes, {INDEX} says {shard.bytes}"
        yield shard.fault(min(size, shard.bytes), what)
    # Check the structure of the tar, then its members.
    tar, members, faults = HashingReader(file), list[TarMember](), list[Fault]()
    try:
        members += walk(tar)
    except TarError as fault:
        faults.append(shard.fault(fault.offset, fault.what))
    faults += _member_faults(file, members, shard, options)
    yield from faults
    # Data, padding and end are intact here, so only a header can differ.
    if not faults and size == shard.bytes and tar.sha256.hexdigest() != shard.sha256:
        what = f"sha256 differs from {INDEX}, in the header of a member"
        yield shard.fault(_unusual_header(file, members), what)


def _member_faults(
    file: BinaryIO, members: list[TarMember], shard: _Expected, options: _Options
) -> Iterator[Fault]:
    present: set[Name] = set()
    closed: set[str] = set()
    current: str | None = None
    for member in members:
        name = split_path(member.name)
        if name is None:
            if not shard.foreign:
                yield shard.fault(member.header, f"{member.name!r} is part of no sample")
            continue
        # The members of a sample must be contiguous and unique.
        key, kind = name
        if key != current:
            closed |= {current} if current is not None else set()
            current = key
            if key in closed:
                yield shard.fault(member.header, f"{kind} follows after another sample began", key)
        if name in present:
            yield shard.fault(member.header, f"a second {kind}", key)
        present.add(name)
        yield from _content_faults(file, member, shard, name, options)
    # Report members in dataset.json that are not in the tar.
    for (key, kind), (offset, _, _) in shard.members.items():
        if (key, kind) not in present:
            yield shard.fault(offset, f"{kind} is missing", key)


def _content_faults(
    file: BinaryIO, member: TarMember, shard: _Expected, name: Name, options: _Options
) -> Iterator[Fault]:
    # Check in this order: listed, at the right location, unchanged, decodable.
    (key, kind), expected = name, shard.members.get(name)
    if expected is None:
        hint = " (a key with dots?)" if has_foreign_dot(kind) else ""
        yield shard.fault(member.header, f"{kind} is not in {INDEX}{hint}", key)
    elif (member.offset, member.size) != expected[:2]:
        location = f"{expected[1]} at byte {expected[0]}"
        what = f"{kind} of {member.size} bytes, {INDEX} says {location}"
        yield shard.fault(member.offset, what, key)
    elif member.crc32 != expected[2]:
        yield shard.fault(member.offset, f"{kind} does not match its checksum", key)
    else:
        reader = MemberReader(file.fileno(), member.offset, member.size)
        if fault := _decoding_fault(reader, kind, options):
            yield shard.fault(member.offset, f"{kind} {fault}", key)


def _decoding_fault(reader: MemberReader, member: str, options: _Options) -> str | None:
    """Return why a member is unusable, or None; apply training's checks to training data."""
    if not (options.deep and options.kind in TENSORS and member in ("safetensors", "json")):
        return find_content_fault(member, reader.at, reader.size, deep=options.deep)
    try:
        if member == "json":
            read_metadata(reader)
        else:
            from echolab.data.collate import take_sample

            take_sample(reader, options.kind, options.common, geometry=options.geometry)
    except MemberError as error:
        return f"cannot be trained on ({error})"
    return None


def _unusual_header(file: BinaryIO, members: list[TarMember]) -> int:
    """Return the byte offset at which one header differs from most others.

    Ignore `VARYING_FIELDS`; all other fields are equal in tars made by one program.
    """
    # Mask the varying fields and compare with the most common header.
    headers = []
    for member in members:
        header = bytearray(os.pread(file.fileno(), BLOCK, member.offset - BLOCK))
        for start, stop in VARYING_FIELDS:
            header[start:stop] = bytes(stop - start)
        headers.append(bytes(header))
    usual = Counter(headers).most_common(1)[0][0] if headers else b""
    for member, masked in zip(members, headers, strict=True):
        if masked != usual:
            position = next(i for i in range(BLOCK) if masked[i] != usual[i])
            return member.offset - BLOCK + position
    return 0


# Content checks.  By default check the structure: JSON parses, a safetensors header accounts for
# every byte, arrays load.  Deep checks decode videos, audio and images, and require finite tensors.


def find_content_fault(member: str, read: Read, size: int, *, deep: bool = False) -> str | None:
    """Return why a member of `size` bytes cannot be decoded, or None; unknown kinds pass."""
    suffix = member.rpartition(".")[2]
    try:
        if suffix == "safetensors":
            _check_safetensors(read, size, deep=deep)
        elif suffix in STRUCTURED:
            STRUCTURED[suffix](read(0, size))
        elif deep and suffix in DEEP:
            DEEP[suffix](read(0, size))
    except MemberError as error:
        return f"cannot be decoded ({error})"
    except RecursionError:
        return "cannot be decoded (nested too deeply)"
    return None


def _check_safetensors(read: Read, size: int, *, deep: bool) -> None:
    """Raise MemberError for a bad header; if `deep`, also for a value that is not finite."""
    for name, (dtype, _, begin, end) in parse_header(read, size).items():
        if not deep:
            continue
        data = read(begin, end - begin)
        if dtype == "BF16":  # the upper half of fp32
            values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif dtype in FLOATS:
            values = np.frombuffer(data, FLOATS[dtype])
        else:
            continue
        if not np.isfinite(values).all():
            raise MemberError(f"tensor {name}: {int((~np.isfinite(values)).sum())} not finite")


def _check_video(data: bytes) -> None:
    import av  # decoders are slow to import, and only a deep check needs them

    from echolab.data.decoding import open_media

    # A truncated video decodes to fewer frames than its header states.
    try:
        with open_media(io.BytesIO(data)) as container:
            stated = container.streams.video[0].frames
            count = sum(1 for _ in container.decode(video=0))
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise MemberError(first_line(error)) from error
    if not count or count < stated:
        raise MemberError(f"{count} of {stated} frames")


def _check_image(data: bytes) -> None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise MemberError(f"{image.width} x {image.height} pixels")
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MemberError(str(error).split("\n")[0]) from error


STRUCTURED: dict[str, Callable[[bytes], Any]] = {
    "json": parse_json, "npy": read_array, "npz": read_arrays,
}  # fmt: skip
DEEP: dict[str, Callable[[bytes], Any]] = {
    "mp4": _check_video, "flac": read_flac, "jpg": _check_image, "jpeg": _check_image,
    "png": _check_image, "webp": _check_image,
}  # fmt: skip
