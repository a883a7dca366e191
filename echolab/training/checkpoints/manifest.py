"""A checkpoint's manifest: what must be there, and whether it is, byte by byte.

    {"format": 2, "step": 123,
     "parameters": {"blocks.0.norm.weight": [48], ...}, "tied": {"other name": "name"},
     "files": {"master-00001-of-00001.safetensors": {"bytes": ..., "sha256": ...}, ...},
     "sha256": of the text without this entry}

It is written last.  Its own text is fixed by its content, so a change of any byte shows.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from echolab.atomic_io import ABSENT, read_error, read_whole, retried
from echolab.errors import CheckpointError
from echolab.training.checkpoints import schema

FORMAT = 2
MANIFEST, STATE = "manifest.json", "state.json"
FILE = re.compile(r"state\.json|(?P<part>[a-z_]+(?:-[\w.]+)?)-\d{5}-of-\d{5}\.safetensors")
REMEDY = "take another checkpoint"
Manifest = dict[str, Any]


def serialise(content: Mapping[str, Any]) -> bytes:
    """The one text of a manifest that has no "sha256" yet."""
    digest = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1).encode()


def read_manifest(path: Path) -> Manifest:
    """Of the checkpoint at `path`; CheckpointError where it is missing, damaged or of old.

    Raise StorageError where the file system fails: that says nothing of the checkpoint.
    """
    file = path / MANIFEST
    try:
        data = read_whole(file)
        content = json.loads(data)
    except ABSENT as error:
        raise CheckpointError(f"{path}: no whole checkpoint, no {file}; {REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); {REMEDY}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: is no manifest; {REMEDY}")
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {content.get('format')}, this program reads {FORMAT}; {REMEDY}, or "
            "go on with the version of echolab that wrote it"
        )
    if serialise({k: v for k, v in content.items() if k != "sha256"}) != data:
        raise CheckpointError(f"{file}: its sha256 is not that of its text; {REMEDY}")
    if found := list(schema.MANIFEST(content, "")):
        raise CheckpointError(f"{file}: {found[0]}; {REMEDY}")
    files = content["files"]
    if STATE not in files or not all(map(FILE.fullmatch, files)):
        raise CheckpointError(f"{file}: lists files that are of no checkpoint; {REMEDY}")
    return content


def files_of(manifest: Manifest) -> dict[str, list[str]]:
    """Names of the files with tensors, by part."""
    found: dict[str, list[str]] = {}
    for name in sorted(manifest["files"]):
        match = FILE.fullmatch(name)
        if match and match["part"]:
            found.setdefault(match["part"], []).append(name)
    return dict(sorted(found.items()))


def _size_fault(path: Path, name: str, told: Mapping[str, Any]) -> str:
    file = path / name
    try:
        status = file.stat()
    except ABSENT:
        size = None
    else:
        size = status.st_size if stat.S_ISREG(status.st_mode) else None
    if size == told["bytes"]:
        return ""
    found = "missing" if size is None else f"{size} bytes"
    return f"{file}: {found}, the manifest says {told['bytes']} bytes; {REMEDY}"


def _content_fault(path: Path, name: str, told: Mapping[str, Any]) -> str:
    with (path / name).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found == told["sha256"]:
        return ""
    return f"{path / name}: its sha256 is {found[:12]}..., the manifest says another; {REMEDY}"


def _fault(path: Path, name: str, told: Mapping[str, Any], deep: bool) -> str:
    def fault() -> str:
        return _size_fault(path, name, told) or (deep and _content_fault(path, name, told)) or ""

    try:
        return retried(fault)
    except ABSENT:
        return f"{path / name}: missing; {REMEDY}"
    except OSError as error:
        raise read_error(path / name, error) from error


def shallow_faults(path: Path, manifest: Manifest) -> list[str]:
    """One line for each file that is missing or of another size, or for another state.json."""
    files: dict[str, Any] = manifest["files"]
    found = [_fault(path, name, told, name == STATE) for name, told in files.items()]
    return [fault for fault in found if fault]


def faults(path: Path, manifest: Manifest) -> list[str]:
    """One line for each file that is not what the manifest says; reads all of them."""
    files: dict[str, Any] = manifest["files"]
    readers = min(len(files), os.cpu_count() or 1, 8)
    with ThreadPoolExecutor(readers, thread_name_prefix="verify") as pool:
        found = pool.map(lambda name: _fault(path, name, files[name], True), files)
        return [fault for fault in found if fault]
