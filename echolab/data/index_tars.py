"""Write dataset.json for plain WebDataset tars of another program.

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
    misfits: dict[str, str]  # kind -> why the first sample that does not fit it does not
    ignored: list[str]  # files that belong to no sample


class Indexed(NamedTuple):
    """The dataset.json of a folder after indexing."""

    content: dict[str, Any]
    misfits: dict[str, str]
    ignored: list[str]
    written: bool  # False: an equal one existed already


def scan(compounds: frozenset[str], path: Path) -> Scan:
    """Read a tar from front to back; `compounds` are member names with a dot, like `seg.png`.

    Raises DataError that names shard, sample and byte for a tar that is damaged, for keys with
    dots, and for members that are doubled or do not follow each other.
    """
    samples: dict[str, Members] = {}
    misfits: dict[str, str] = {}
    ignored: list[str] = []
    try:
        with path.open("rb") as file:
            # One pass over the bytes: locations, checksums and the hash of the tar.
            tar = HashingReader(file)
            for member in walk(tar):
                name = _name(member, samples, compounds | set(MEMBERS), path)
                if name is None:
                    ignored += [] if member.name.endswith("/") else [member.name]
                    continue
                location = (member.offset, member.size, member.crc32)
                samples.setdefault(name[0], {})[name[1]] = location
            # The headers of safetensors, by which kinds are recognized, need all locations.
            for key, members in samples.items():
                for kind, why in _misfits_of(key, members, file, path):
                    misfits.setdefault(kind, f"{path.name}: sample {key} {why}")
    except TarError as fault:
        last = next(reversed(samples), None)
        after = f" (after sample {last})" if last else ""
        raise DataError(f"{path}: byte {fault.offset}: {fault.what}{after}") from fault
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the disk") from error
    shard = Shard(path.name, tar.sha256.hexdigest(), tar.position, len(samples))
    listed = [Sample(key, path.name, members)._asdict() for key, members in samples.items()]
    return Scan(shard._asdict(), listed, misfits, ignored)


def _name(
    member: TarMember, samples: dict[str, Members], compounds: frozenset[str], path: Path
) -> tuple[str, str] | None:
    """Return key and member, or None for a file of no sample; raise DataError."""
    name = split_path(member.name)
    if name is None:
        return None
    key, kind = name
    where = f"{path}: byte {member.header}: sample {key!r}:"
    # Names must be printable, and unambiguous to a reader that splits at the first dot.
    fault = key_fault("foreign", key)
    if fault or not kind.isprintable():
        raise DataError(f"{where} {fault or 'a member that cannot be printed'}; pack the tar again")
    if has_foreign_dot(kind, compounds):
        raise DataError(
            f"{where} {kind!r} has a dot: is it the tail of the key?  Then pack the tar again with "
            f"keys without dots; if it is a member of its own, give members={kind}"
        )
    # Readers stream a tar, so the members of a sample must follow each other, each once.
    if kind in samples.get(key, ()):
        raise DataError(f"{where} a second {kind}; pack the tar again")
    if key in samples and key != next(reversed(samples)):
        raise DataError(
            f"{where} {kind} follows after another sample began; sort and pack it again"
        )
    return name


def _misfits_of(
    key: str, members: Members, file: BinaryIO, path: Path
) -> Iterator[tuple[str, str]]:
    """Yield (kind, reason) for each kind that the sample does not fit."""
    # The names of the tensors decide between encoded and preference samples.
    tensors: set[str] = set()
    if "safetensors" in members:
        offset, size, _ = members["safetensors"]

        def read(start: int, count: int) -> bytes:
            return os.pread(file.fileno(), count, offset + start)

        try:
            tensors = set(parse_header(read, size))
        except MemberError as error:
            raise DataError(
                f"{path}: byte {offset}: sample {key}: safetensors cannot be decoded ({error}); "
                "pack the tar again"
            ) from error
    for kind in KINDS:
        missing = missing_members(kind, members)
        unknown = [name for name in TENSORS.get(kind, ()) if name not in tensors]
        if missing:
            yield kind, f"has no {missing[0]}"
        elif unknown:
            yield kind, f"has no tensor {unknown[0]}"
        elif fault := key_fault(kind, key):
            yield kind, f"has a key that this kind does not allow ({fault})"


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
        progress = folder / PARTIAL_INDEX
        if progress.is_symlink():  # it came with the tars, and may point anywhere
            remove_quietly(progress)
        scans = _scans(folder, paths, compounds, workers, advance)
        # Checks over all tars: the kind, and keys that are unique.
        misfits = _first_misfits(scans)
        if kind in misfits:
            raise DataError(f"{folder}: not of kind {kind}: {misfits[kind]}; give kind=foreign")
        _refuse_doubles(folder, scans)
        # The strictest kind that all samples fit; an empty folder has no kind of its own.
        shards = [each.shard for each in scans]
        samples = [sample for each in scans for sample in each.samples]
        kind = kind or next(k for k in (KINDS if samples else KINDS[-1:]) if k not in misfits)
        provenance = dict(encoders or {}), dict(description or {})
        data = encoded_index(kind, *provenance, shards, samples, geometry)
        content = json.loads(data)
        written = _written(folder / INDEX, data, content, replace)
        remove_quietly(progress)
    return Indexed(content, misfits, [name for each in scans for name in each.ignored], written)


def _tars(folder: Path) -> list[Path]:
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; give the folder that holds tars") from error
    # Refuse what cannot be read from the middle, rather than leave it out silently.
    for name in names:
        if re.search(r"\.(tgz|tar\.\w+)$", name):
            remedy = "unpack it to a plain .tar: samples are read from the middle"
            raise DataError(f"{folder / name}: compressed or half-written; {remedy}")
        if name.endswith(".tar") and not SHARD_FILE.fullmatch(name):
            raise DataError(
                f"{folder / name}: a shard's name may hold letters, digits and . _ - + = , alone; "
                "rename it"
            )
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
    # A tar that was scanned before, and has not changed since, is not read again.
    stamps = [_stamp(path, compounds) for path in paths]
    recorded = _recorded_scans(folder / PARTIAL_INDEX)
    scans = {i: recorded[stamp] for i, stamp in enumerate(stamps) if stamp in recorded}
    remaining = [i for i in range(len(paths)) if i not in scans]
    # Each result is recorded at once, so that a kill loses the tars in work alone.
    work = partial(scan, compounds)
    count = count_processes(workers, [paths[i].stat().st_size for i in remaining])
    for j, result in map_parallel(work, [paths[i] for i in remaining], count):
        i = remaining[j]
        scans[i] = result
        append_text(folder / PARTIAL_INDEX, json.dumps([stamps[i], result]) + "\n")
        if advance is not None:
            advance(len(scans), paths[i].name)
    return [scans[i] for i in range(len(paths))]


def _stamp(path: Path, compounds: frozenset[str]) -> str:
    status = path.stat()
    return f"{path.name} {status.st_size} {status.st_mtime_ns} {sorted(compounds)}"


def _recorded_scans(path: Path) -> dict[str, Scan]:
    scans: dict[str, Scan] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            stamp, fields = json.loads(line)
            scans[stamp] = Scan(*fields)
        except (ValueError, TypeError):
            continue  # cut when the process was killed: that tar is read again
    return scans


def _first_misfits(scans: list[Scan]) -> dict[str, str]:
    # Of each kind the first reason stays.
    misfits: dict[str, str] = {}
    for each in scans:
        misfits = {**each.misfits, **misfits}
    return misfits


def _refuse_doubles(folder: Path, scans: list[Scan]) -> None:
    shard_of: dict[str, str] = {}
    for sample in (sample for each in scans for sample in each.samples):
        key, shard = sample["key"], sample["shard"]
        if key in shard_of:
            byte = min(location[0] for location in sample["members"].values())
            raise DataError(
                f"{folder / shard}: byte {byte}: sample {key}: is in {shard_of[key]} too; "
                "give each sample of a dataset a key of its own, and pack the tar again"
            )
        shard_of[key] = shard


def _written(path: Path, data: bytes, content: dict[str, Any], replace: bool) -> bool:
    """Write dataset.json unless an equal one is there; raise DataError if it differs."""
    # An equal index stays as it is, so that a second run changes no file.
    if path.exists():
        try:
            if json.loads(path.read_bytes()) == content:
                return False
        except ValueError:
            pass  # damaged: differs
        if not replace:
            raise DataError(f"{path}: exists and differs; give replace=true to write it again")
    write_atomic(path, data)
    return True
