"""dataset.json for plain WebDataset tars that another program wrote.

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

from echolab.data.contents import Undecodable, tensor_header
from echolab.data.files import append_text, exclusive, remove_quietly, write_whole
from echolab.data.index import (
    INDEX,
    MEMBERS,
    Members,
    Sample,
    Shard,
    encoded_index,
    missing_members,
)
from echolab.data.names import PARTIAL, SHARD_FILE, dotted, key_fault, split_file
from echolab.data.progress import Advance
from echolab.data.samples import TENSORS
from echolab.data.spread import processes, spread
from echolab.data.tars import Passing, TarFault, TarMember, walk
from echolab.errors import DataError

KINDS = ("raw", "encoded", "preference", "foreign")


class Scan(NamedTuple):
    """Contents of one tar."""

    shard: dict[str, Any]
    samples: list[dict[str, Any]]
    misfits: dict[str, str]  # kind -> why the first sample that cannot be of it cannot
    left_out: list[str]  # files that are part of no sample


class Indexed(NamedTuple):
    """A folder's dataset.json as it now is."""

    content: dict[str, Any]
    misfits: dict[str, str]
    left_out: list[str]
    written: bool  # False: it was there already, and equal


def scan(compounds: frozenset[str], path: Path) -> Scan:
    """Read a tar whole.  `compounds` are member names with a dot, such as `seg.png`.

    Raises DataError that names shard, sample and byte for a tar that is damaged, for keys with
    dots, and for members that are doubled or do not follow each other.
    """
    samples: dict[str, Members] = {}
    misfits: dict[str, str] = {}
    left_out: list[str] = []
    try:
        with path.open("rb") as file:
            tar = Passing(file)
            for member in walk(tar):
                name = _name(member, samples, compounds | set(MEMBERS), path)
                if name is None:
                    left_out += [] if member.name.endswith("/") else [member.name]
                    continue
                place = (member.offset, member.size, member.crc32)
                samples.setdefault(name[0], {})[name[1]] = place
            for key, members in samples.items():
                for kind, why in _misfits(key, members, file, path):
                    misfits.setdefault(kind, f"{path.name}: sample {key} {why}")
    except TarFault as fault:
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
    """Key and member; None where it is part of no sample.  Raises DataError."""
    name = split_file(member.name)
    if name is None:
        return None
    key, kind = name
    at = f"{path}: byte {member.header}: sample {key!r}:"
    why = key_fault("foreign", key)
    if why or not kind.isprintable():
        raise DataError(f"{at} {why or 'a member that cannot be printed'}; pack the tar again")
    if dotted(kind, compounds):
        raise DataError(
            f"{at} {kind!r} has a dot: is it the tail of the key?  Then pack the tar again with "
            f"keys without dots; if it is a member of its own, give members={kind}"
        )
    if kind in samples.get(key, ()):
        raise DataError(f"{at} a second {kind}; pack the tar again")
    if key in samples and key != next(reversed(samples)):
        raise DataError(f"{at} {kind} follows after another sample began; sort and pack it again")
    return name


def _misfits(key: str, members: Members, file: BinaryIO, path: Path) -> Iterator[tuple[str, str]]:
    """(kind, why not) of each kind that a sample cannot be of."""
    tensors: set[str] = set()
    if "safetensors" in members:
        offset, size, _ = members["safetensors"]

        def read(start: int, count: int) -> bytes:
            return os.pread(file.fileno(), count, offset + start)

        try:
            tensors = set(tensor_header(read, size))
        except Undecodable as error:
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
    with exclusive(folder):
        paths = _tars(folder)
        if (folder / PARTIAL).is_symlink():  # it came with the tars: what it points to is not ours
            remove_quietly(folder / PARTIAL)
        scans = _scans(folder, paths, compounds, workers, advance)
        misfits = _first_misfits(scans)
        if kind in misfits:
            raise DataError(f"{folder}: not of kind {kind}: {misfits[kind]}; give kind=foreign")
        _refuse_doubles(folder, scans)
        shards = [one.shard for one in scans]
        samples = [sample for one in scans for sample in one.samples]
        fitting = [one for one in KINDS if one not in misfits] if samples else ["foreign"]
        data = encoded_index(
            kind or fitting[0], dict(encoders or {}), dict(description or {}), shards, samples
        )
        content = json.loads(data)
        written = _written(folder / INDEX, data, content, replace)
        remove_quietly(folder / PARTIAL)
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
    found = [folder / name for name in names if name.endswith(".tar")]
    if not found:
        raise DataError(f"{folder}: holds no .tar; give the folder that holds the shards")
    return found


def _scans(
    folder: Path,
    paths: list[Path],
    compounds: frozenset[str],
    workers: int | None,
    advance: Advance | None,
) -> list[Scan]:
    """Return the scan of each tar; take those of a stopped run from its notes."""
    stamps = [_stamp(path, compounds) for path in paths]
    known = _known(folder / PARTIAL)
    scans = {i: known[stamp] for i, stamp in enumerate(stamps) if stamp in known}
    left = [i for i in range(len(paths)) if i not in scans]
    work = partial(scan, compounds)
    count = processes(workers, [paths[i].stat().st_size for i in left])
    for number, found in spread(work, [paths[i] for i in left], count):
        i = left[number]
        scans[i] = found
        append_text(folder / PARTIAL, json.dumps([stamps[i], found]) + "\n")
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
            stamp, found = json.loads(line)
            known[stamp] = Scan(*found)
        except (ValueError, TypeError):
            continue  # cut when the process was killed: that tar is read again
    return known


def _first_misfits(scans: list[Scan]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in scans:
        found = {**one.misfits, **found}
    return found


def _refuse_doubles(folder: Path, scans: list[Scan]) -> None:
    shard_of: dict[str, str] = {}
    for sample in (sample for one in scans for sample in one.samples):
        key, shard = sample["key"], sample["shard"]
        if key in shard_of:
            byte = min(place[0] for place in sample["members"].values())
            raise DataError(
                f"{folder / shard}: byte {byte}: sample {key}: is in {shard_of[key]} too; "
                "a key names one sample of a dataset"
            )
        shard_of[key] = shard


def _written(path: Path, data: bytes, content: dict[str, Any], replace: bool) -> bool:
    """Write dataset.json unless it is there and equal; DataError where it is there and differs."""
    if path.exists():
        try:
            if json.loads(path.read_bytes()) == content:
                return False
        except ValueError:
            pass  # damaged: differs
        if not replace:
            raise DataError(f"{path}: is there and differs; give replace=true to write it anew")
    write_whole(path, data)
    return True
