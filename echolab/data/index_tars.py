"""Write dataset.json for plain WebDataset tars that another program wrote.

The tars are read once from front to back, each by one process, and never changed.  A folder whose
samples keep the contract of a kind becomes a dataset of that kind; any other one becomes `foreign`,
which can be verified, ordered and read member by member, but not trained on.
"""

import json
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from echolab.atomic_io import append_text, lock_folder, remove_quietly, write_atomic
from echolab.data.index import (
    INDEX,
    MEMBERS,
    PARTIAL_INDEX,
    SHARD_FILE,
    Members,
    Sample,
    Shard,
    encoded_index,
    has_foreign_dot,
    key_fault,
    missing_members,
    split_path,
)
from echolab.data.samples import TENSORS, MemberError, parse_header
from echolab.data.tars import (
    HashingReader,
    TarError,
    TarMember,
    count_processes,
    map_parallel,
    walk,
)
from echolab.errors import DataError
from echolab.geometry import WAN, LatentGeometry
from echolab.progress import Advance

KINDS = ("raw", "encoded", "preference", "foreign")


class Scan(NamedTuple):
    """The content of one tar."""

    shard: dict[str, Any]
    samples: list[dict[str, Any]]
    misfits: dict[str, str]  # kind -> why the first sample that cannot be of it cannot
    left_out: list[str]  # files that are part of no sample


class Indexed(NamedTuple):
    """The dataset.json of a folder after indexing."""

    content: dict[str, Any]
    misfits: dict[str, str]
    left_out: list[str]
    written: bool  # False: it was there already, and equal


def scan(compounds: frozenset[str], path: Path) -> Scan:
    """Read a tar from front to back; `compounds` are member names with a dot, like `seg.png`.

    Raises DataError that names shard, sample and byte for a tar that is damaged, for keys with
    dots, and for members that are doubled or do not follow each other.
    """
    samples: dict[str, Members] = {}
    misfits: dict[str, str] = {}
    left_out: list[str] = []
    try:
        with path.open("rb") as file:
            tar = HashingReader(file)
            for member in walk(tar):
                name = _name(member, samples, compounds | set(MEMBERS), path)
                if name is None:
                    left_out += [] if member.name.endswith("/") else [member.name]
                    continue
                location = (member.offset, member.size, member.crc32)
                samples.setdefault(name[0], {})[name[1]] = location
            for key, members in samples.items():
                for kind, why in _misfits_of(key, members, file, path):
                    misfits.setdefault(kind, f"{path.name}: sample {key} {why}")
    except TarError as fault:
        last = next(reversed(samples), None)
        after = f" (after sample {last})" if last else ""
        raise DataError(f"{path}: byte {fault.offset}: {fault.what}{after}") from fault
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    shard = Shard(path.name, tar.sha256.hexdigest(), tar.position, len(samples))
    listed = [Sample(key, path.name, members)._asdict() for key, members in samples.items()]
    return Scan(shard._asdict(), listed, misfits, left_out)


def _name(
    member: TarMember, samples: dict[str, Members], compounds: frozenset[str], path: Path
) -> tuple[str, str] | None:
    """Return key and member, or None if it is part of no sample; raise DataError."""
    name = split_path(member.name)
    if name is None:
        return None
    key, kind = name
    at = f"{path}: byte {member.header}: sample {key!r}:"
    why = key_fault("foreign", key)
    if why or not kind.isprintable():
        raise DataError(f"{at} {why or 'a member that cannot be printed'}; pack the tar again")
    if has_foreign_dot(kind, compounds):
        raise DataError(
            f"{at} {kind!r} has a dot: is it the tail of the key?  Then pack the tar again with "
            f"keys without dots; if it is a member of its own, give members={kind}"
        )
    if kind in samples.get(key, ()):
        raise DataError(f"{at} a second {kind}; pack the tar again")
    if key in samples and key != next(reversed(samples)):
        raise DataError(f"{at} {kind} follows after another sample began; sort and pack it again")
    return name


def _misfits_of(
    key: str, members: Members, file: BinaryIO, path: Path
) -> Iterator[tuple[str, str]]:
    """Yield (kind, reason) for each kind that the sample does not fit."""
    tensors: set[str] = set()
    if "safetensors" in members:
        offset, size, _ = members["safetensors"]

        def read(start: int, count: int) -> bytes:
            return os.pread(file.fileno(), count, offset + start)

        try:
            tensors = set(parse_header(read, size))
        except MemberError as error:
            raise DataError(
                f"{path}: byte {offset}: sample {key}: safetensors cannot be decoded ({error})"
            ) from error
    for kind in KINDS:
        missing = missing_members(kind, members)
        unknown = [name for name in TENSORS.get(kind, ()) if name not in tensors]
        if missing:
            yield kind, f"has no {missing[0]}"
        elif unknown:
            yield kind, f"has no tensor {unknown[0]}"
        elif why := key_fault(kind, key):
            yield kind, f"has a key of another form ({why})"


def index_folder(
    folder: Path,
    *,
    kind: str | None = None,
    compounds: frozenset[str] = frozenset(),
    encoders: dict[str, str] | None = None,
    geometry: LatentGeometry = WAN,
    description: dict[str, Any] | None = None,
    replace: bool = False,
    workers: int | None = 1,
    advance: Advance | None = None,
) -> Indexed:
    """Write `folder`/dataset.json; tars read before a kill are not read again.

    `kind` none takes the kind whose contract all samples keep.  A dataset.json that is there and
    differs stays unless `replace`.  Raises DataError, and BusyError while another process writes.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give one of tars")
    with lock_folder(folder):
        paths = _tars(folder)
        if (
            folder / PARTIAL_INDEX
        ).is_symlink():  # it came with the tars: what it points to is not ours
            remove_quietly(folder / PARTIAL_INDEX)
        scans = _scans(folder, paths, compounds, workers, advance)
        misfits = _first_misfits(scans)
        if kind in misfits:
            raise DataError(f"{folder}: not of kind {kind}: {misfits[kind]}; give kind=foreign")
        _refuse_doubles(folder, scans)
        shards = [one.shard for one in scans]
        samples = [sample for one in scans for sample in one.samples]
        kind = kind or next(k for k in (KINDS if samples else KINDS[-1:]) if k not in misfits)
        about = dict(encoders or {}), dict(description or {})
        data = encoded_index(kind, *about, shards, samples, geometry)
        content = json.loads(data)
        written = _written(folder / INDEX, data, content, replace)
        remove_quietly(folder / PARTIAL_INDEX)
    return Indexed(content, misfits, [n for one in scans for n in one.left_out], written)


def _tars(folder: Path) -> list[Path]:
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; give the folder that holds tars") from error
    for name in names:
        if re.search(r"\.(tgz|tar\.\w+)$", name):
            remedy = "unpack it to a plain .tar: samples are read from the middle"
            raise DataError(f"{folder / name}: compressed or half-written; {remedy}")
        if name.endswith(".tar") and not SHARD_FILE.fullmatch(name):
            raise DataError(f"{folder / name}: a shard's name has letters, digits, . _ - + = alone")
    paths = [folder / name for name in names if name.endswith(".tar")]
    if not paths:
        raise DataError(f"{folder}: holds no .tar; give the folder that holds the shards")
    return paths


def _scans(
    folder: Path,
    paths: list[Path],
    compounds: frozenset[str],
    workers: int | None,
    advance: Advance | None,
) -> list[Scan]:
    """Scan each tar that an interrupted run has not recorded yet."""
    stamps = [_stamp(path, compounds) for path in paths]
    known = _known(folder / PARTIAL_INDEX)
    scans = {i: known[stamp] for i, stamp in enumerate(stamps) if stamp in known}
    left = [i for i in range(len(paths)) if i not in scans]
    work = partial(scan, compounds)
    count = count_processes(workers, [paths[i].stat().st_size for i in left])
    for j, result in map_parallel(work, [paths[i] for i in left], count):
        i = left[j]
        scans[i] = result
        append_text(folder / PARTIAL_INDEX, json.dumps([stamps[i], result]) + "\n")
        if advance is not None:
            advance(len(scans), paths[i].name)
    return [scans[i] for i in range(len(paths))]


def _stamp(path: Path, compounds: frozenset[str]) -> str:
    status = path.stat()
    return f"{path.name} {status.st_size} {status.st_mtime_ns} {sorted(compounds)}"


def _known(path: Path) -> dict[str, Scan]:
    known: dict[str, Scan] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            stamp, fields = json.loads(line)
            known[stamp] = Scan(*fields)
        except (ValueError, TypeError):
            continue  # cut when the process was killed: that tar is read again
    return known


def _first_misfits(scans: list[Scan]) -> dict[str, str]:
    misfits: dict[str, str] = {}
    for one in scans:
        misfits = {**one.misfits, **misfits}
    return misfits


def _refuse_doubles(folder: Path, scans: list[Scan]) -> None:
    shard_of: dict[str, str] = {}
    for sample in (sample for one in scans for sample in one.samples):
        key, shard = sample["key"], sample["shard"]
        if key in shard_of:
            byte = min(location[0] for location in sample["members"].values())
            raise DataError(
                f"{folder / shard}: byte {byte}: sample {key}: is in {shard_of[key]} too; "
                "a key names one sample of a dataset"
            )
        shard_of[key] = shard


def _written(path: Path, data: bytes, content: dict[str, Any], replace: bool) -> bool:
    """Write dataset.json unless an equal one is there; raise DataError if it differs."""
    if path.exists():
        try:
            if json.loads(path.read_bytes()) == content:
                return False
        except ValueError:
            pass  # damaged: differs
        if not replace:
            raise DataError(f"{path}: is there and differs; give replace=true to write it again")
    write_atomic(path, data)
    return True
