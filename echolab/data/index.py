"""dataset.json: what it holds, its names, its fingerprint."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable
from itertools import islice
from typing import Any, NamedTuple

from echolab.errors import DataError
from echolab.geometry import WAN, LatentGeometry

FORMAT = 2
FORMATS = (1, FORMAT)  # that are read; in 1 all latents are Wan's, and no geometry is named
INDEX = "dataset.json"
MEMBERS = ("mp4", "flac", "tracks.npz", "json", "safetensors")
# Members that every sample of a kind has; other kinds ask for none.
REQUIRED = {
    "raw": ("mp4", "flac", "tracks.npz", "json"),
    "encoded": ("safetensors",),
    "preference": ("safetensors",),
}
LATENT_KINDS = ("encoded", "preference")  # whose dataset.json names a geometry
KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")  # fits a plain tar header with any member name
SHARD = re.compile(r"[a-z]+-\d{6}\.tar")

BATCH = 1000  # samples hashed together
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"))

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


def geometry_in(index: dict[str, Any]) -> LatentGeometry:
    """Return the latents' geometry of a dataset.json, Wan's if it need not name one.

    Raises LookupError, TypeError or ValueError if it is missing or is no geometry.
    """
    if index["format"] == 1 or index["kind"] not in LATENT_KINDS:
        return WAN
    geometry = LatentGeometry(**index["geometry"])
    if not all(type(size) is int and size >= 1 for size in geometry):
        raise ValueError(f"geometry {index['geometry']}: sizes must be whole numbers above 0")
    return geometry


def fingerprint(
    kind: str,
    encoders: dict[str, str],
    shards: list[Any],
    samples: Iterable[Any],
    geometry: LatentGeometry = WAN,
) -> str:
    """Return the identity of a dataset: a hash of all in dataset.json that decides what is read.

    It is the sha256 of [1, kind, encoders, shards, samples] as JSON with sorted keys and no
    spaces; samples are taken a few at a time, because there may be millions.  A geometry other than
    Wan's stands before the kind, so that datasets of format 1 keep their identity and their order.
    """
    head = [1, kind, encoders, shards, []]
    if geometry != WAN:
        head.insert(1, geometry._asdict())
    digest = hashlib.sha256(_CANONICAL.encode(head)[:-2].encode())
    between, rest = b"", iter(samples)
    while batch := list(islice(rest, BATCH)):
        digest.update(between + _CANONICAL.encode(batch)[1:-1].encode())
        between = b","
    digest.update(b"]]")
    return digest.hexdigest()


def encoded_index(
    kind: str,
    encoders: dict[str, str],
    description: dict[str, Any],
    shards: list[Any],
    samples: list[Any],
    geometry: LatentGeometry = WAN,
) -> bytes:
    """Return the bytes of dataset.json; shards and samples are dictionaries."""
    has_latents = kind in LATENT_KINDS
    index = {
        "format": FORMAT,
        "kind": kind,
        "encoders": encoders,
        **({"geometry": geometry._asdict()} if has_latents else {}),
        "description": description,
        "fingerprint": fingerprint(
            kind, encoders, shards, samples, geometry if has_latents else WAN
        ),
        "shards": shards,
        "samples": samples,
    }
    return json.dumps(index, separators=(",", ":")).encode()


def missing_members(kind: str, members: Collection[str]) -> list[str]:
    """Return the required members that a sample of this kind lacks."""
    return [name for name in REQUIRED.get(kind, ()) if name not in members]


def split_name(name: str) -> tuple[str, str]:
    """`clip_0001.tracks.npz` -> (`clip_0001`, `tracks.npz`), as webdataset splits; may raise."""
    key, _, member = name.partition(".")
    if not KEY.fullmatch(key):
        raise DataError(f"key {key!r}: use 1 to 80 letters, digits, _ or -, without dots")
    if member not in MEMBERS:
        raise DataError(f"key {key}: member {member!r} is not one of {', '.join(MEMBERS)}")
    return key, member
