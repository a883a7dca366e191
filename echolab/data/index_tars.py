"""Write dataset.json for plain WebDataset tars made by another program.

Each tar is read once, sequentially, by one process, and is never changed.  If all samples satisfy
the format of a kind, the folder becomes a dataset of that kind, otherwise of kind `foreign`.  A
foreign dataset can be verified, ordered and read member by member, but not trained on.
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
    misfits: dict[str, str]  # kind -> first reason why a sample does not fit the kind
    ignored: list[str]  # files that belong to no sample


class Indexed(NamedTuple):
    """The dataset.json of a folder after indexing."""

    content: dict[str, Any]
    misfits: dict[str, str]
    ignored: list[str]
    written: bool  # False if an equal dataset.json existed already


def scan(compounds: frozenset[str], path: Path) -> Scan:
    """Read a tar sequentially; `compounds` are member names with a dot, such as `seg.png`.

    Raise a DataError that names shard, sample and byte for a damaged tar, for keys with dots, and
    for members of a sample that are duplicated or not contiguous.
    """
    samples: dict[str, Members] = {}
    misfits: dict[str, str] = {}
    ignored: list[str] = []
    try:
        with path.open("rb") as file:
            # One pass over the bytes yields locations, checksums and the hash of the tar.
            tar = HashingReader(file)
            for member in walk(tar):
                name = _parse_name(member, samples, compounds | set(MEMBERS), path)
                if name is None:
                    ignored += [] if member.name.endswith("/") else [member.name]
                    continue
                location = (member.offset, member.size, member.crc32)
                samples.setdefault(name[0], {})[name[1]] = location
            # Determine the kinds by the safetensors headers, once all locations are known.
            for key, members in samples.items():
                for kind, why in _find_misfits(key, members, file, path):
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


def _parse_name(
    member: TarMember, samples: dict[str, Members], compounds: frozenset[str], path: Path
) -> tuple[str, str] | None:
    """Return (key, member), or None for a file that belongs to no sample; raise DataError."""
    name = split_path(member.name)
    if name is None:
        return None
    key, kind = name
    where = f"{path}: byte {member.header}: sample {key!r}:"
    # Names must be printable and unambiguous for readers that split at the first dot.
    fault = key_fault("foreign", key)
    if fault or not kind.isprintable():
        raise DataError(f"{where} {fault or 'a member that cannot be printed'}; pack the tar again")
    if has_foreign_dot(kind, compounds):
        raise DataError(
            f"{where} {kind!r} has a dot: is it the tail of the key?  Then pack the tar again with "
            f"keys without dots; if it is a member of its own, give members={kind}"
        )
    # Readers stream a tar, so the members of a sample must be contiguous and unique.
    if kind in samples.get(key, ()):
        raise DataError(f"{where} a second {kind}; pack the tar again")
    if key in samples and key != next(reversed(samples)):
        raise DataError(
            f"{where} {kind} follows after another sample began; sort and pack it again"
        )
    return name


def _find_misfits(
    key: str, members: Members, file: BinaryIO, path: Path
) -> Iterator[tuple[str, str]]:
    """Yield (kind, reason) for each kind that the sample does not fit."""
    # The names of the tensors distinguish encoded from preference samples.
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
    """Write `folder`/dataset.json; skip tars that an interrupted run has already read.

    If `kind` is None, use the strictest kind that all samples fit.  Replace an existing, different
    dataset.json only if `replace`.  Raise DataError, and BusyError while another process writes.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give one of tars")
    with lock_folder(folder):
        paths = _list_tars(folder)
        progress = folder / PARTIAL_INDEX
        if progress.is_symlink():  # untrusted: it may point anywhere
            remove_quietly(progress)
        scans = _scan_all(folder, paths, compounds, workers, advance)
        # Check all tars together: the kind, and that keys are unique.
        misfits = _first_misfits(scans)
        if kind in misfits:
            raise DataError(f"{folder}: not of kind {kind}: {misfits[kind]}; give kind=foreign")
        _check_unique_keys(folder, scans)
        # Choose the strictest kind that all samples fit; a folder without samples is foreign.
        shards = [each.shard for each in scans]
        samples = [sample for each in scans for sample in each.samples]
        kind = kind or next(k for k in (KINDS if samples else KINDS[-1:]) if k not in misfits)
        provenance = dict(encoders or {}), dict(description or {})
        data = encoded_index(kind, *provenance, shards, samples, geometry)
        content = json.loads(data)
        written = _write_index(folder / INDEX, data, content, replace)
        remove_quietly(progress)
    return Indexed(content, misfits, [name for each in scans for name in each.ignored], written)


def _list_tars(folder: Path) -> list[Path]:
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; give the folder that holds tars") from error
    # Refuse archives without random access instead of skipping them silently.
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


def _scan_all(
    folder: Path,
    paths: list[Path],
    compounds: frozenset[str],
    workers: int | None,
    advance: Advance | None,
) -> list[Scan]:
    """Return the scans of all tars; read only tars that no interrupted run has recorded."""
    # Reuse the scans of unchanged tars.
    stamps = [_stamp(path, compounds) for path in paths]
    recorded = _recorded_scans(folder / PARTIAL_INDEX)
    scans = {i: recorded[stamp] for i, stamp in enumerate(stamps) if stamp in recorded}
    remaining = [i for i in range(len(paths)) if i not in scans]
    # Record each result immediately, so that an interruption loses only tars in progress.
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
            continue  # incomplete line of a killed process: that tar is read again
    return scans


def _first_misfits(scans: list[Scan]) -> dict[str, str]:
    # Keep the first reason for each kind.
    misfits: dict[str, str] = {}
    for each in scans:
        misfits = {**each.misfits, **misfits}
    return misfits


def _check_unique_keys(folder: Path, scans: list[Scan]) -> None:
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


def _write_index(path: Path, data: bytes, content: dict[str, Any], replace: bool) -> bool:
    """Write dataset.json unless it exists with equal content; raise DataError if it differs.

    Return whether the file was written.
    """
    # Do not rewrite an equal index, so that a second run changes no file.
    if path.exists():
        try:
            if json.loads(path.read_bytes()) == content:
                return False
        except ValueError:
            pass  # a damaged file counts as different
        if not replace:
            raise DataError(f"{path}: exists and differs; give replace=true to write it again")
    write_atomic(path, data)
    return True
