"""dataset.json: what it holds, its names, its fingerprint."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from echolab.errors import DataError

FORMAT = 1
INDEX = "dataset.json"
MEMBERS = ("mp4", "flac", "tracks.npz", "json", "safetensors")
KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")  # fits a plain tar header with any member name
SHARD = re.compile(r"[a-z]+-\d{6}\.tar")

Members = dict[str, tuple[int, int, int]]  # member -> offset, size, crc32


class Shard(NamedTuple):
    """What dataset.json says of one tar."""

    name: str
    sha256: str
    bytes: int
    samples: int


class Sample(NamedTuple):
    """Where one sample lies."""

    key: str
    shard: str
    members: Members


def fingerprint(kind: str, encoders: dict[str, str], shards: list[Any], samples: list[Any]) -> str:
    """Identity of a dataset: a hash of everything in dataset.json that decides what is read."""
    content = [FORMAT, kind, encoders, shards, samples]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def split_name(name: str) -> tuple[str, str]:
    """`clip_0001.tracks.npz` -> (`clip_0001`, `tracks.npz`), as webdataset splits; may raise."""
    key, _, member = name.partition(".")
    if not KEY.fullmatch(key):
        raise DataError(f"key {key!r}: use 1 to 80 letters, digits, _ or -, without dots")
    if member not in MEMBERS:
        raise DataError(f"key {key}: member {member!r} is not one of {', '.join(MEMBERS)}")
    return key, member


def read_index(folder: Path) -> dict[str, Any]:
    """dataset.json, whole and unchanged since it was written; raises DataError."""
    path = folder / INDEX
    try:
        index: dict[str, Any] = json.loads(path.read_bytes())
        if index["format"] != FORMAT:
            raise DataError(f"{path}: format {index['format']}, this program reads {FORMAT}")
        expected = fingerprint(index["kind"], index["encoders"], index["shards"], index["samples"])
        if expected != index["fingerprint"]:
            raise DataError(f"{path}: was changed after it was written; make the dataset again")
    except FileNotFoundError as error:
        raise DataError(f"{path}: not there; the folder is no whole dataset") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); make the dataset again") from error
    return index
