"""Where the samples of a dataset lie, as arrays: as objects each would take a kilobyte.

dataset.json is parsed sample by sample for the same reason, and its fingerprint taken on the way.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np

from echolab.data.index import BATCH, FORMATS, Members, Shard, fingerprint, geometry_in
from echolab.data.names import SHARD_FILE, key_fault
from echolab.errors import DataError

# Of some samples: keys, lengths of keys, numbers of members; names and places of members.
Columns = tuple[bytes, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
SHA256 = re.compile(r"[0-9a-f]{64}")
UNREADABLE = (
    ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
)  # fmt: skip
HEAD = {"format", "kind", "encoders", "description", "fingerprint", "shards"}
SAMPLES = '"samples":['


class Keys(Sequence[str]):
    """The keys of all samples, in one piece of memory."""

    def __init__(self, text: bytes, ends: np.ndarray) -> None:
        self._text, self._ends = text, ends  # ends [N]: where each key ends

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


class Table:
    """Samples, numbered shard after shard; each has a run of members."""

    def __init__(self, shards: list[Shard]) -> None:
        """Without a sample yet; all must be added before any is looked up."""
        self.shards = shards
        # [S + 1] where the samples of each shard begin
        self.shard_starts = np.cumsum([0, *(shard.samples for shard in shards)])
        self.names: list[str] = []  # of members
        self._parts: list[Columns] = []
        self._join()

    def __len__(self) -> int:
        return len(self.keys)

    def shard_of(self, i: int) -> int:
        """The number of the shard that sample `i` lies in."""
        return int(np.searchsorted(self.shard_starts, i, side="right")) - 1

    def members(self, i: int) -> Members:
        """Member -> offset, size, crc32."""
        run = slice(int(self._ends[i - 1]) if i else 0, int(self._ends[i]))
        names, places = self._member_names[run].tolist(), self._places[run].tolist()
        return {self.names[n]: tuple(place) for n, place in zip(names, places, strict=True)}

    def add(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Take entries of dataset.json, and hand each on.

        Raises KeyError, TypeError, ValueError or AttributeError for what breaks the contract.
        """
        rest, count = iter(samples), 0
        while batch := list(islice(rest, BATCH)):
            self._check_shards(batch, count)
            self._parts.append(self._columns(batch))
            self._check_places(*self._parts[-1][2::2], count)
            count += len(batch)
            yield from batch
        if count != self.shard_starts[-1]:
            raise ValueError(f"{count} samples in shards that count {self.shard_starts[-1]}")
        self._join()

    def _join(self) -> None:
        columns = zip(*self._parts, strict=True) if self._parts else ([], [], [], [], [])
        texts, lengths, counts, names, places = columns
        self.keys = Keys(b"".join(texts), _running(lengths))
        self._ends = _running(counts)  # [N] where the members of each sample end
        self._member_names = np.concatenate([np.zeros(0, np.uint8), *names])  # [M]
        self._places = np.concatenate([np.zeros((0, 3), np.int64), *places])  # [M, 3]
        self._parts = []

    def _check_shards(self, batch: list[dict[str, Any]], first: int) -> None:
        """Samples must stand in the order of the shards, as many as each counts."""
        numbers = np.arange(first, first + len(batch))
        shards = np.searchsorted(self.shard_starts, numbers, side="right") - 1
        for sample, shard in zip(batch, shards.tolist(), strict=True):
            if shard >= len(self.shards) or sample["shard"] != self.shards[shard].name:
                raise ValueError(f"sample {sample['key']!r} is not where its shard counts it")

    def _check_places(self, counts: np.ndarray, places: np.ndarray, first: int) -> None:
        """Members must lie within their shards."""
        numbers = np.arange(first, first + len(counts))
        shards = np.searchsorted(self.shard_starts, numbers, side="right") - 1
        ends = np.repeat(np.array([shard.bytes for shard in self.shards])[shards], counts)
        if (places < 0).any() or (places[:, 0] > ends - places[:, 1]).any():
            raise ValueError("a member lies outside its shard")

    def _columns(self, batch: list[dict[str, Any]]) -> Columns:
        keys = [sample["key"].encode() for sample in batch]
        members = [sample["members"] for sample in batch]
        found = {name: None for each in members for name in each}
        self.names += [name for name in found if name not in self.names]
        number = {name: i for i, name in enumerate(self.names)}
        places = [place for each in members for place in each.values()]
        return (
            b"".join(keys),
            np.array([len(key) for key in keys]),
            np.array([len(each) for each in members]),
            np.array([number[name] for each in members for name in each], np.uint8),
            np.array(places, np.int64).reshape(len(places), 3),
        )


def _running(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.cumsum(np.concatenate([np.zeros(0, np.int64), *parts]))


def parse_index(data: bytes, path: Path | str) -> tuple[dict[str, Any], Table]:
    """(dataset.json without its samples, its samples); raises DataError that names `path`."""
    try:
        text = data.decode()
        del data  # it may be large
        index, samples = _samples_apart(text)
        if index["format"] not in FORMATS:
            raise DataError(
                f"{path}: format {index['format']}, this program reads "
                f"{' and '.join(map(str, FORMATS))}; make the dataset again"
            )
        table = Table([_shard(**shard) for shard in index["shards"]])
        head = index["kind"], index["encoders"], index["shards"]
        if not isinstance(index["kind"], str):
            raise ValueError(f"kind {index['kind']!r} is no word")
        for name in ("encoders", "description"):
            if not isinstance(index[name], dict):
                raise ValueError(f"{name} is no object")
        checked = table.add(_with_good_keys(index["kind"], samples))
        if fingerprint(*head, checked, geometry_in(index)) != index["fingerprint"]:
            raise DataError(f"{path}: was changed after it was written; make the dataset again")
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read ({error}); make the dataset again") from error
    return index, table


def _with_good_keys(kind: str, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Hand samples on; ValueError for a key that must not become part of a file's name."""
    for sample in samples:
        if why := key_fault(kind, sample["key"]):
            raise ValueError(f"key {sample['key']!r}: {why}")
        yield sample


def _shard(name: str, sha256: str, bytes: int, samples: int) -> Shard:
    if not SHARD_FILE.fullmatch(name) or not SHA256.fullmatch(sha256):
        raise ValueError(f"{name!r} with sha256 {sha256!r} is no shard")
    if bytes < 0 or samples < 0:
        raise ValueError(f"{name} of {bytes} bytes and {samples} samples is no shard")
    return Shard(name, sha256, int(bytes), int(samples))


def _samples_apart(text: str) -> tuple[dict[str, Any], Iterable[dict[str, Any]]]:
    start = text.find(SAMPLES)
    try:
        # As it is written here: samples last, no spaces.  Any other JSON is parsed whole.
        index = json.loads(text[:start].rstrip(",") + "}") if start > 0 else {}
    except ValueError:
        index = {}
    if index.keys() >= HEAD:
        return index, _one_by_one(text, start + len(SAMPLES))
    index = json.loads(text)
    return index, index.pop("samples")


def _one_by_one(text: str, position: int) -> Iterator[dict[str, Any]]:
    """The objects of a list from behind its bracket; the object around it ends with it."""
    decoder = json.JSONDecoder()
    while text[position] != "]":
        sample, position = decoder.raw_decode(text, position)
        yield sample
        position += text[position] == ","
    if text[position:].strip() != "]}":
        raise ValueError(f"something after the samples: {text[position : position + 20]!r}")
