"""The manifest of a checkpoint: its files and parameters, and verification against the manifest.

    {"format": 2, "step": 123,
     "parameters": {"blocks.0.norm.weight": [48], ...}, "tied": {"other name": "name"},
     "files": {"master-00001-of-00001.safetensors": {"bytes": ..., "sha256": ...}, ...},
     "sha256": hash of the text without this entry}

The manifest is written last.  Its text is determined by its content, so a change of any byte is
detected.
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

from echolab.atomic_io import ABSENT, read_error, read_file, retry
from echolab.errors import CheckpointError
from echolab.training.checkpoints import schema

FORMAT = 2
MANIFEST, STATE = "manifest.json", "state.json"
FILE = re.compile(r"state\.json|(?P<part>[a-z_]+(?:-[\w.]+)?)-\d{5}-of-\d{5}\.safetensors")
REMEDY = "use another checkpoint"
Manifest = dict[str, Any]


def serialize(content: Mapping[str, Any]) -> bytes:
    """Return the text of a manifest, with the "sha256" entry added to `content`."""
    digest = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1).encode()


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of the checkpoint at `path`.

    Raise CheckpointError if the manifest is missing, damaged or of another format.  Raise
    StorageError if the file system fails, since the checkpoint may then be valid.
    """
    file = path / MANIFEST
    try:
        # Without a manifest the checkpoint is incomplete; after a disk error it may be complete.
        data = read_file(file)
        content = json.loads(data)
    except ABSENT as error:
        raise CheckpointError(
            f"{path}: no complete checkpoint: {file} is missing; {REMEDY}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); {REMEDY}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: is no manifest; {REMEDY}")
    # Check the format before interpreting other entries.
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {content.get('format')}, this program reads {FORMAT}; {REMEDY}, or "
            "use the version of echolab that wrote it"
        )
    # The text is determined by the content, so any changed byte is detected.
    if serialize({k: v for k, v in content.items() if k != "sha256"}) != data:
        raise CheckpointError(f"{file}: its sha256 is not that of its text; {REMEDY}")
    if wrong := list(schema.MANIFEST(content, "")):
        raise CheckpointError(f"{file}: {wrong[0]}; {REMEDY}")
    files = content["files"]
    # Refuse unknown names, which could point outside the folder.
    if STATE not in files or not all(map(FILE.fullmatch, files)):
        raise CheckpointError(f"{file}: lists files that are of no checkpoint; {REMEDY}")
    return content


def files_of(manifest: Manifest) -> dict[str, list[str]]:
    """Return the names of the tensor files, by part."""
    files: dict[str, list[str]] = {}
    for name in sorted(manifest["files"]):
        match = FILE.fullmatch(name)
        if match and match["part"]:
            files.setdefault(match["part"], []).append(name)
    return dict(sorted(files.items()))


def _size_fault(path: Path, name: str, expected: Mapping[str, Any]) -> str:
    file = path / name
    try:
        status = file.stat()
    except ABSENT:
        size = None
    else:
        size = status.st_size if stat.S_ISREG(status.st_mode) else None
    if size == expected["bytes"]:
        return ""
    actual = "missing" if size is None else f"{size} bytes"
    return f"{file}: {actual}, the manifest says {expected['bytes']} bytes; {REMEDY}"


def _content_fault(path: Path, name: str, expected: Mapping[str, Any]) -> str:
    with (path / name).open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual == expected["sha256"]:
        return ""
    return f"{path / name}: its sha256 is {actual[:12]}..., the manifest says another; {REMEDY}"


def _file_fault(path: Path, name: str, expected: Mapping[str, Any], deep: bool) -> str:
    def fault() -> str:
        return (
            _size_fault(path, name, expected)
            or (deep and _content_fault(path, name, expected))
            or ""
        )

    try:
        return retry(fault)
    except ABSENT:
        return f"{path / name}: missing; {REMEDY}"
    except OSError as error:
        raise read_error(path / name, error) from error


def shallow_faults(path: Path, manifest: Manifest) -> list[str]:
    """Return one line for each file that is missing or of wrong size; hash only state.json."""
    files: dict[str, Any] = manifest["files"]
    wrong = [_file_fault(path, name, expected, name == STATE) for name, expected in files.items()]
    return [fault for fault in wrong if fault]


def faults(path: Path, manifest: Manifest) -> list[str]:
    """Read and hash all files; return one line for each file that differs from the manifest."""
    files: dict[str, Any] = manifest["files"]
    # Hash several files in parallel: hashing releases the GIL.
    readers = min(len(files), os.cpu_count() or 1, 8)
    with ThreadPoolExecutor(readers, thread_name_prefix="verify") as pool:
        wrong = pool.map(lambda name: _file_fault(path, name, files[name], True), files)
        return [fault for fault in wrong if fault]
