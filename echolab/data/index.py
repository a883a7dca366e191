"""dataset.json: its format, the names of samples and members, the fingerprint, and the parser.

A sample as Python objects would need about 1 kB.  So dataset.json is parsed sample by sample into
arrays, and the fingerprint is computed in the same pass.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from echolab.errors import DataError
from echolab.geometry import WAN, LatentGeometry

FORMAT = 2
FORMATS = (1, FORMAT)  # readable formats; format 1 has no geometry entry: latents are Wan's
INDEX = "dataset.json"
PARTIAL_INDEX = "index.partial"  # progress of an interrupted or refused indexing run
MEMBERS = ("mp4", "flac", "tracks.npz", "json", "safetensors")
# Required members of each kind; other kinds require none.
REQUIRED = {
    "raw": ("mp4", "flac", "tracks.npz", "json"),
    "encoded": ("safetensors",),
    "preference": ("safetensors",),
}
LATENT_KINDS = ("encoded", "preference")  # kinds whose dataset.json contains a geometry
KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")  # fits a plain tar header with any member name
KEY_RULE = "use 1 to 80 letters, digits, _ or -, without dots"
SHARD = re.compile(r"[a-z]+-\d{6}\.tar")
SHARD_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.,+=-]*\.tar")  # by any program; not hidden
RESERVED = re.compile(r"__[^/]*__($|/)")  # file names that webdataset reserves
SHA256 = re.compile(r"[0-9a-f]{64}")

BATCH = 1000  # samples parsed and hashed at once
UNREADABLE = (
    ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
)  # fmt: skip
HEAD = {"format", "kind", "encoders", "description", "fingerprint", "shards"}
SAMPLES = '"samples":['
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"))

Members = dict[str, tuple[int, int, int]]  # member -> offset, size, crc32
# Columns of a batch of samples: joined keys, key lengths, member counts, member names, locations.
Columns = tuple[bytes, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Shard(NamedTuple):
    """The entry of one tar in dataset.json."""

    name: str
    sha256: str
    bytes: int
    samples: int


class Sample(NamedTuple):
    """The location of one sample."""

    key: str
    shard: str
    members: Members


# Names


def missing_members(kind: str, members: Collection[str]) -> list[str]:
    """Return the required members that a sample of this kind lacks."""
    return [name for name in REQUIRED.get(kind, ()) if name not in members]


def split_name(name: str) -> tuple[str, str]:
    """Split `clip_0001.tracks.npz` into (`clip_0001`, `tracks.npz`); raise DataError."""
    # Split at the first dot, as webdataset does.
    key, _, member = name.partition(".")
    if not KEY.fullmatch(key):
        raise DataError(f"key {key!r}: {KEY_RULE}")
    if member not in MEMBERS:
        raise DataError(f"key {key}: member {member!r} is not one of {', '.join(MEMBERS)}")
    return key, member


def split_path(name: str) -> tuple[str, str] | None:
    """Split `train/clip_1.seg.PNG` into (`train/clip_1`, `seg.png`), as webdataset does.

    Return None for a file that belongs to no sample: a folder, a name without a dot or with a
    leading dot, and names that webdataset reserves.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, member = base.partition(".")
    if RESERVED.match(name) or not (stem and dot and member):
        return None
    return f"{folder}{slash}{stem}", member.lower()


def key_fault(kind: str, key: str) -> str | None:
    """Return why a dataset of this kind cannot hold the key, or None."""
    if kind != "foreign":
        return None if KEY.fullmatch(key) else KEY_RULE
    # A foreign key may be a relative path, since webdataset keeps folders in keys.
    base = key.rpartition("/")[2]
    if not base or "." in base or not key.isprintable():
        return "a key has no dots, and nothing that cannot be printed"
    if key.startswith("/") or ".." in key.split("/"):
        return "a key is a relative path without .."
    return None


def has_foreign_dot(member: str, known: frozenset[str] = frozenset(MEMBERS)) -> bool:
    """Return whether a member may be the tail of a key with dots: `v1.mp4` of `clip.v1.mp4`."""
    return "." in member and member not in known


# Fingerprint and encoding


def geometry_in(index: dict[str, Any]) -> LatentGeometry:
    """Return the latent geometry of a dataset.json, Wan's if the format or kind has no geometry.

    Raise LookupError, TypeError or ValueError if a required geometry is missing or invalid.
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
    """Return the identity of a dataset: a hash of everything in dataset.json that affects reading.

    The fingerprint is the sha256 of [1, kind, encoders, shards, samples] as JSON with sorted keys
    and no spaces; samples are processed in batches, since there may be millions.  A geometry other
    than Wan's is inserted before the kind; without it datasets of format 1 keep their fingerprint.
    """
    head = [1, kind, encoders, shards, []]
    if geometry != WAN:
        head.insert(1, geometry._asdict())
    digest = hashlib.sha256(_CANONICAL.encode(head)[:-2].encode())
    separator, rest = b"", iter(samples)
    while batch := list(islice(rest, BATCH)):
        digest.update(separator + _CANONICAL.encode(batch)[1:-1].encode())
        separator = b","
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
    # Write the samples last, so that a reader can parse them one by one.
    has_latents = kind in LATENT_KINDS
    geometry = geometry if has_latents else WAN
    index = {
        "format": FORMAT,
        "kind": kind,
        "encoders": encoders,
        **({"geometry": geometry._asdict()} if has_latents else {}),
        "description": description,
        "fingerprint": fingerprint(kind, encoders, shards, samples, geometry),
        "shards": shards,
        "samples": samples,
    }
    return json.dumps(index, separators=(",", ":")).encode()


# Reading


class Keys(Sequence[str]):
    """The keys of all samples, in one contiguous byte string."""

    def __init__(self, text: bytes, ends: np.ndarray) -> None:
        self._text, self._ends = text, ends  # ends [N]: end offset of each key

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        return self._text[int(self._ends[i - 1]) if i else 0 : int(self._ends[i])].decode()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))


class SampleIndex:
    """The samples of a dataset as arrays, numbered shard after shard."""

    def __init__(self, shards: list[Shard]) -> None:
        """Start without samples; add all samples before reading any."""
        self.shards = shards
        # [S + 1] index of the first sample of each shard
        self.shard_starts = np.cumsum([0, *(shard.samples for shard in shards)])
        self.names: list[str] = []  # distinct member names
        # Columns of each batch, joined into arrays after the last batch.
        self._parts: list[Columns] = []
        self._join()

    def __len__(self) -> int:
        return len(self.keys)

    def shard_of(self, i: int) -> int:
        """Return the index of the shard that holds sample `i`."""
        return int(np.searchsorted(self.shard_starts, i, side="right")) - 1

    def members(self, i: int) -> Members:
        """Return member -> (offset, size, crc32) of sample `i`."""
        part = slice(int(self._ends[i - 1]) if i else 0, int(self._ends[i]))
        names, locations = self._member_names[part].tolist(), self._locations[part].tolist()
        return {
            self.names[n]: tuple(location) for n, location in zip(names, locations, strict=True)
        }

    def add(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Add sample entries of dataset.json, and yield each of them.

        Raise KeyError, TypeError, ValueError or AttributeError for an invalid entry.
        """
        # Process samples in batches, so that their dictionaries do not fill memory.
        rest, count = iter(samples), 0
        while batch := list(islice(rest, BATCH)):
            self._check_shards(batch, count)
            self._parts.append(self._columns(batch))
            self._check_locations(*self._parts[-1][2::2], count)
            count += len(batch)
            yield from batch
        if count != self.shard_starts[-1]:
            raise ValueError(f"{count} samples in shards that count {self.shard_starts[-1]}")
        self._join()

    def _join(self) -> None:
        columns = zip(*self._parts, strict=True) if self._parts else ([], [], [], [], [])
        texts, lengths, counts, names, locations = columns
        self.keys = Keys(b"".join(texts), _cumulative(lengths))
        self._ends = _cumulative(counts)  # [N] end index of each sample's members
        self._member_names = np.concatenate([np.zeros(0, np.uint8), *names])  # [M]
        self._locations = np.concatenate([np.zeros((0, 3), np.int64), *locations])  # [M, 3]
        self._parts = []

    def _shards_from(self, first: int, count: int) -> np.ndarray:
        samples = np.arange(first, first + count)
        return np.searchsorted(self.shard_starts, samples, side="right") - 1

    def _check_shards(self, batch: list[dict[str, Any]], first: int) -> None:
        """Raise ValueError unless samples match the order and the sample counts of the shards."""
        shards = self._shards_from(first, len(batch)).tolist()
        for sample, shard in zip(batch, shards, strict=True):
            if shard >= len(self.shards) or sample["shard"] != self.shards[shard].name:
                raise ValueError(f"sample {sample['key']!r} is not in the shard that counts it")

    def _check_locations(self, counts: np.ndarray, locations: np.ndarray, first: int) -> None:
        """Raise ValueError unless members lie within their shards."""
        shards = self._shards_from(first, len(counts))
        ends = np.repeat(np.array([shard.bytes for shard in self.shards])[shards], counts)
        if (locations < 0).any() or (locations[:, 0] > ends - locations[:, 1]).any():
            raise ValueError("a member lies outside its shard")

    def _columns(self, batch: list[dict[str, Any]]) -> Columns:
        keys = [sample["key"].encode() for sample in batch]
        members = [sample["members"] for sample in batch]
        # Member names repeat: store each name once, and its index for each sample.
        new = dict.fromkeys(name for each in members for name in each)
        self.names += [name for name in new if name not in self.names]
        index_of = {name: i for i, name in enumerate(self.names)}
        locations = [location for each in members for location in each.values()]
        return (
            b"".join(keys),
            np.array([len(key) for key in keys]),
            np.array([len(each) for each in members]),
            np.array([index_of[name] for each in members for name in each], np.uint8),
            np.array(locations, np.int64).reshape(len(locations), 3),
        )


def _cumulative(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.cumsum(np.concatenate([np.zeros(0, np.int64), *parts]))


def parse_index(data: bytes, path: Path | str) -> tuple[dict[str, Any], SampleIndex]:
    """Return (dataset.json without samples, its samples); raise a DataError that names `path`."""
    try:
        text = data.decode()
        del data  # free memory: the file may be large
        index, entries = _split_samples(text)
        if index["format"] not in FORMATS:
            raise DataError(
                f"{path}: format {index['format']}, this program reads "
                f"{' and '.join(map(str, FORMATS))}; make the dataset again"
            )
        # Check the shards first, since sample locations are checked against them.
        samples = SampleIndex([_parse_shard(**shard) for shard in index["shards"]])
        head = index["kind"], index["encoders"], index["shards"]
        if not isinstance(index["kind"], str):
            raise ValueError(f"kind {index['kind']!r} is not a string")
        for name in ("encoders", "description"):
            if not isinstance(index[name], dict):
                raise ValueError(f"{name} is not a JSON object")
        # Check, add and hash the entries in one pass.
        checked = samples.add(_check_keys(index["kind"], entries))
        if fingerprint(*head, checked, geometry_in(index)) != index["fingerprint"]:
            raise DataError(f"{path}: was changed after it was written; make the dataset again")
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read ({error}); make the dataset again") from error
    return index, samples


def _check_keys(kind: str, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the samples; raise ValueError for an invalid key, which could escape from a folder."""
    for sample in samples:
        if fault := key_fault(kind, sample["key"]):
            raise ValueError(f"key {sample['key']!r}: {fault}")
        yield sample


def _parse_shard(name: str, sha256: str, bytes: int, samples: int) -> Shard:
    if not SHARD_FILE.fullmatch(name) or not SHA256.fullmatch(sha256):
        raise ValueError(f"shard {name!r} with sha256 {sha256!r}: not a tar's name and checksum")
    if bytes < 0 or samples < 0:
        raise ValueError(f"shard {name}: {bytes} bytes and {samples} samples")
    return Shard(name, sha256, int(bytes), int(samples))


def _split_samples(text: str) -> tuple[dict[str, Any], Iterable[dict[str, Any]]]:
    start = text.find(SAMPLES)
    try:
        # echolab writes no spaces and the samples last; parse other JSON in one go.
        index = json.loads(text[:start].rstrip(",") + "}") if start > 0 else {}
    except ValueError:
        index = {}
    if index.keys() >= HEAD:
        return index, _parse_one_by_one(text, start + len(SAMPLES))
    index = json.loads(text)
    return index, index.pop("samples")


def _parse_one_by_one(text: str, position: int) -> Iterator[dict[str, Any]]:
    """Yield the objects of a list, from the position after its opening bracket on.

    The list must be the last value of `text`.
    """
    decoder = json.JSONDecoder()
    while text[position] != "]":
        sample, position = decoder.raw_decode(text, position)
        yield sample
        position += text[position] == ","
    if text[position:].strip() != "]}":
        raise ValueError(f"text after the samples: {text[position : position + 20]!r}")
