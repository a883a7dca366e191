"""Going on past a bad sample, within a budget by rate; by default there is none, and one stops all.

A bad sample is one whose bytes or content break the contract; a file system, server or network
that fails is none.  It is replaced by the next good one of its kind, a pure function of the data,
so that every rank keeps its number of steps and every run its batches.  Each is written down once,
in a file that all ranks and workers of the run share: the budget is over the samples of the file.
"""

import fcntl
import json
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from echolab.atomic_io import ABSENT, read_whole, retried, write_error
from echolab.data.remote.download import FetchError
from echolab.data.shard_reader import ShardDataset
from echolab.errors import ConfigError, DataError
from echolab.redaction import masked

QUARANTINE = "quarantine.jsonl"
ALLOWED = "data.max_bad_fraction=0.01"  # the budget that an error recommends

Read = TypeVar("Read")


def allowed(samples: int, skip_budget: float) -> int:
    """How many of so many samples may be bad; any budget allows one, however few they are."""
    return math.ceil(samples * skip_budget - 1e-9)  # 700 x 0.01 is a little more than 7


def read_quarantine(path: Path) -> list[dict[str, Any]]:
    """The bad samples of a run: dataset (fingerprint), shard, key, offset, reason; each once."""
    try:
        lines = read_whole(path).splitlines()
    except ABSENT:
        return []
    return _entries(lines)


def _entries(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            found.setdefault((entry["dataset"], entry["key"]), entry)
        except (ValueError, TypeError, KeyError):
            continue  # a process was killed while it wrote this line
    return list(found.values())


def following(samples: int) -> Callable[[int], Iterator[int]]:
    """Stand-ins of a sample: those behind it, round to itself; near, so quick to read."""
    return lambda i: ((i + step) % samples for step in range(1, samples))


class Tolerant:
    """Reads samples of one dataset, passing over bad ones within a budget.

    `skip_budget` is the share of samples, of each shard and of all, that may be bad.
    `stand_ins(i)` are the samples that may stand for sample i, in order of preference.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        *,
        skip_budget: float = 0.0,
        quarantine: Path | None = None,
        stand_ins: Callable[[int], Iterable[int]] | None = None,
    ) -> None:
        if not 0 <= skip_budget < 1:
            raise ConfigError(f"skip_budget={skip_budget}: must be a share from 0 to under 1")
        if skip_budget and quarantine is None:
            raise ConfigError(f"skip_budget={skip_budget}: needs a file to write bad samples to")
        self.dataset, self.skip_budget, self.quarantine = dataset, skip_budget, quarantine
        self.stand_ins = stand_ins

    def read(self, i: int, read: Callable[[int], Read]) -> Read:
        """`read(i)`, or `read(j)` of the first good stand-in j.

        `read` raises DataError for a bad sample.  Without a budget that ends it; with one, the
        DataError comes when the budget of the shard or of the dataset is exceeded.
        """
        if not self.skip_budget or self.quarantine is None:
            return self._read_all(i, read)
        stand_ins = self.stand_ins or following(len(self.dataset))
        for j in chain([i], stand_ins(i)):
            try:
                return read(j)
            except FetchError:
                raise  # whole shards would be lost to a server that is down
            except DataError as error:
                self._put_down(j, error, self.quarantine)
        raise DataError(
            f"{self.dataset.folder}: sample {self.dataset.keys[i]} has no good stand-in"
        )

    def _read_all(self, i: int, read: Callable[[int], Read]) -> Read:
        """`read(i)`; a bad sample ends it, with a word on the budget."""
        try:
            return read(i)
        except FetchError:
            raise
        except DataError as error:
            raise DataError(f"{error}, or go on without it by {ALLOWED}") from error

    def _put_down(self, i: int, error: DataError, path: Path) -> None:
        """Write a bad sample down, and stop where there are too many of them."""
        sample = self.dataset.sample(i)
        entry = {
            "dataset": self.dataset.fingerprint,
            "shard": sample.shard,
            "key": sample.key,
            "offset": min((place[0] for place in sample.members.values()), default=0),
            "reason": masked(str(error)),
        }
        try:
            entries = retried(lambda: _listed(path, entry))
        except OSError as fault:
            raise write_error(path, fault) from fault
        self._count([e for e in entries if e["dataset"] == entry["dataset"]], entry, path)

    def _count(self, entries: list[dict[str, Any]], entry: dict[str, Any], path: Path) -> None:
        dataset, shard = self.dataset, entry["shard"]
        sizes = {one.name: one.samples for one in dataset.shards}
        own = sum(e["shard"] == shard for e in entries)
        for place, bad, samples in (
            (f"{dataset.folder}/{shard}", own, sizes[shard]),
            (str(dataset.folder), len(entries), len(dataset)),
        ):
            if bad > allowed(samples, self.skip_budget):
                raise DataError(
                    f"{place}: {bad} of {samples} samples are bad, skip_budget={self.skip_budget} "
                    f"allows {allowed(samples, self.skip_budget)}; see {path}, then raise "
                    "data.max_bad_fraction, or encode those again and go on with "
                    "data.changed=accept; "
                    f"last: {entry['reason']}"
                )


def _listed(path: Path, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all entries of a file, once this one is among them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # goes with the file
        return _add(file, entry)


def _add(file: BinaryIO, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """All entries, with this one, which is written unless it is there."""
    file.seek(0)
    text = file.read()
    entries = _entries(text.splitlines())
    known = {(e["dataset"], e["key"]) for e in entries}
    if (entry["dataset"], entry["key"]) not in known:
        begin = b"" if text[-1:] in (b"", b"\n") else b"\n"  # below what a kill left of a line
        file.write(begin + json.dumps(entry).encode() + b"\n")
        file.flush()
        entries.append(entry)
    return entries
