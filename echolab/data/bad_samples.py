"""Replace bad samples within a budget; without a budget, the default, a bad sample stops the run.

A bad sample is one whose bytes or content break the contract; a file system, server or network
that fails does not make a sample bad.  A bad sample is replaced by the next good one of its
dataset, a pure function of the data, so that every rank keeps its number of steps and every run its
batches.  Each is written once to a file that all ranks and workers of the run share: the budget
counts the samples in that file.
"""

import fcntl
import json
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from echolab.atomic_io import ABSENT, read_file, retry, write_error
from echolab.data.download import FetchError
from echolab.data.shard_reader import ShardDataset
from echolab.errors import ConfigError, DataError
from echolab.redaction import mask_secrets

QUARANTINE = "quarantine.jsonl"
REMEDY = "data.max_bad_fraction=0.01"  # the budget that an error recommends

Sample = TypeVar("Sample")
Entry = dict[str, Any]


def max_bad_samples(samples: int, max_bad_fraction: float) -> int:
    """Return how many of so many samples may be bad: at least one with any budget."""
    return math.ceil(samples * max_bad_fraction - 1e-9)  # 700 x 0.01 is a little more than 7


def read_quarantine(path: Path) -> list[Entry]:
    """Return the bad samples of a run: dataset (fingerprint), shard, key, offset, reason."""
    try:
        lines = read_file(path).splitlines()
    except ABSENT:
        return []
    return _parse_entries(lines)


def _parse_entries(lines: Iterable[bytes]) -> list[Entry]:
    # Of a sample that is listed twice the first line counts: ranks may meet it at the same time.
    entries: dict[tuple[str, str], Entry] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            entries.setdefault((entry["dataset"], entry["key"]), entry)
        except (ValueError, TypeError, KeyError):
            continue  # a process was killed while it wrote this line
    return list(entries.values())


def next_samples(samples: int) -> Callable[[int], Iterator[int]]:
    """Return the substitutes of a sample: those after it, cyclically; near ones read quickly."""
    return lambda i: ((i + step) % samples for step in range(1, samples))


class TolerantReader:
    """Reads samples of one dataset and replaces bad ones within a budget.

    `max_bad_fraction` is the fraction of samples, of each shard and of the dataset, that may be
    bad.  `substitutes(i)` are the samples that may replace sample i, in order of preference.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        *,
        max_bad_fraction: float = 0.0,
        quarantine: Path | None = None,
        substitutes: Callable[[int], Iterable[int]] | None = None,
    ) -> None:
        if not 0 <= max_bad_fraction < 1:
            raise ConfigError(
                f"max_bad_fraction={max_bad_fraction}: must be a fraction from 0 to under 1"
            )
        # A budget without a file would be counted by each process for itself.
        if max_bad_fraction and quarantine is None:
            raise ConfigError(
                f"max_bad_fraction={max_bad_fraction}: needs a file for them; give quarantine="
            )
        self.dataset, self.quarantine = dataset, quarantine
        self.max_bad_fraction, self.substitutes = max_bad_fraction, substitutes

    def read(self, i: int, read: Callable[[int], Sample]) -> Sample:
        """Return `read(i)`, or `read(j)` of the first good substitute j.

        `read` raises DataError for a bad sample.  Without a budget that error is raised; with one,
        DataError is raised if the budget of the shard or of the dataset is exceeded.
        """
        # Without a budget the first bad sample is the error.
        if not self.max_bad_fraction or self.quarantine is None:
            return self._read_strictly(i, read)
        substitutes = self.substitutes or next_samples(len(self.dataset))
        # Try the sample, then its substitutes, and list each bad one.
        for j in chain([i], substitutes(i)):
            try:
                return read(j)
            except FetchError:
                raise  # a server that is down would cost all samples of a shard
            except DataError as error:
                self._quarantine(j, error, self.quarantine)
        raise DataError(
            f"{self.dataset.folder}: sample {self.dataset.keys[i]} has no good substitute; encode "
            "the dataset again"
        )

    def _read_strictly(self, i: int, read: Callable[[int], Sample]) -> Sample:
        """Return `read(i)`; the error of a bad sample also names the budget."""
        try:
            return read(i)
        except FetchError:
            raise
        except DataError as error:
            raise DataError(f"{error}, or train without it by {REMEDY}") from error

    def _quarantine(self, i: int, error: DataError, path: Path) -> None:
        """List a bad sample; raise DataError if there are too many."""
        # The fingerprint, since datasets may share keys; messages may hold an address with secrets.
        sample = self.dataset.sample(i)
        entry = {
            "dataset": self.dataset.fingerprint,
            "shard": sample.shard,
            "key": sample.key,
            "offset": min((member[0] for member in sample.members.values()), default=0),
            "reason": mask_secrets(str(error)),
        }
        try:
            entries = retry(lambda: _append_entry(path, entry))
        except OSError as fault:
            raise write_error(path, fault) from fault
        self._check_budget([e for e in entries if e["dataset"] == entry["dataset"]], entry, path)

    def _check_budget(self, entries: list[Entry], entry: Entry, path: Path) -> None:
        dataset, name_of_shard = self.dataset, entry["shard"]
        samples_of = {shard.name: shard.samples for shard in dataset.shards}
        bad_of_shard = sum(e["shard"] == name_of_shard for e in entries)
        # A budget for each shard too: a damaged shard must not use up that of the dataset.
        for name, bad, samples in (
            (f"{dataset.folder}/{name_of_shard}", bad_of_shard, samples_of[name_of_shard]),
            (str(dataset.folder), len(entries), len(dataset)),
        ):
            limit = max_bad_samples(samples, self.max_bad_fraction)
            if bad > limit:
                raise DataError(
                    f"{name}: {bad} of {samples} samples are bad, "
                    f"max_bad_fraction={self.max_bad_fraction} allows {limit}; see {path}, then "
                    "raise data.max_bad_fraction, or encode those again and resume with "
                    f"data.changed=accept; last: {entry['reason']}"
                )


def _append_entry(path: Path, entry: Entry) -> list[Entry]:
    """Add an entry to a file under a lock unless it is there; return all entries."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        return _append_locked(file, entry)


def _append_locked(file: BinaryIO, entry: Entry) -> list[Entry]:
    # Read under the lock: another rank may have listed this sample.
    file.seek(0)
    text = file.read()
    entries = _parse_entries(text.splitlines())
    listed = {(e["dataset"], e["key"]) for e in entries}
    if (entry["dataset"], entry["key"]) not in listed:
        # A killed process may have left half a line: begin below it.
        begin = b"" if text[-1:] in (b"", b"\n") else b"\n"
        file.write(begin + json.dumps(entry).encode() + b"\n")
        file.flush()
        entries.append(entry)
    return entries
