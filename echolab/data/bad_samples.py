"""Replace bad samples within a budget; without a budget, the default, a bad sample stops the run.

The bytes or content of a bad sample violate the format; a failing file system, server or network
does not make a sample bad.  A bad sample is replaced by the next good sample of its dataset, a pure
function of the data, so that all ranks run the same number of steps and batches are reproducible.
Each bad sample is listed once in a file that all ranks and workers of the run share; the budget
limits the number of listed samples.
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
    """Return how many of `samples` samples may be bad: at least 1 if the fraction is above 0."""
    return math.ceil(samples * max_bad_fraction - 1e-9)  # in floating point 700 * 0.01 exceeds 7


def read_quarantine(path: Path) -> list[Entry]:
    """Return the bad samples of a run: dataset (fingerprint), shard, key, offset, reason."""
    try:
        lines = read_file(path).splitlines()
    except ABSENT:
        return []
    return _parse_entries(lines)


def _parse_entries(lines: Iterable[bytes]) -> list[Entry]:
    # Keep the first line of a sample listed twice: two ranks may read it at the same time.
    entries: dict[tuple[str, str], Entry] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            entries.setdefault((entry["dataset"], entry["key"]), entry)
        except (ValueError, TypeError, KeyError):
            continue  # incomplete line of a killed process
    return list(entries.values())


def next_samples(samples: int) -> Callable[[int], Iterator[int]]:
    """Return a function that yields the samples after a sample, cyclically, as its substitutes.

    Nearby samples come first, since they are fast to read.
    """
    return lambda i: ((i + step) % samples for step in range(1, samples))


class TolerantReader:
    """Reads samples of one dataset and replaces bad ones within a budget.

    `max_bad_fraction` limits the fraction of bad samples in each shard and in the dataset.
    `substitutes(i)` yields the samples that may replace sample i, in order of preference.
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
        # Without a shared file each process would count separately.
        if max_bad_fraction and quarantine is None:
            raise ConfigError(
                f"max_bad_fraction={max_bad_fraction}: needs a file for them; give quarantine="
            )
        self.dataset, self.quarantine = dataset, quarantine
        self.max_bad_fraction, self.substitutes = max_bad_fraction, substitutes

    def read(self, i: int, read: Callable[[int], Sample]) -> Sample:
        """Return `read(i)`, or `read(j)` of the first good substitute j.

        `read` raises DataError for a bad sample.  Without a budget, raise that error; with a
        budget, raise DataError only if the budget of the shard or of the dataset is exceeded.
        """
        # Without a budget the first bad sample is an error.
        if not self.max_bad_fraction or self.quarantine is None:
            return self._read_strictly(i, read)
        substitutes = self.substitutes or next_samples(len(self.dataset))
        # Try the sample, then its substitutes, and list each bad one.
        for j in chain([i], substitutes(i)):
            try:
                return read(j)
            except FetchError:
                raise  # a server failure would mark all samples of a shard as bad
            except DataError as error:
                self._quarantine(j, error, self.quarantine)
        raise DataError(
            f"{self.dataset.folder}: sample {self.dataset.keys[i]} has no good substitute; encode "
            "the dataset again"
        )

    def _read_strictly(self, i: int, read: Callable[[int], Sample]) -> Sample:
        """Return `read(i)`; for a bad sample raise an error that recommends a budget."""
        try:
            return read(i)
        except FetchError:
            raise
        except DataError as error:
            raise DataError(f"{error}, or train without it by {REMEDY}") from error

    def _quarantine(self, i: int, error: DataError, path: Path) -> None:
        """Record a bad sample; raise DataError if there are too many."""
        # Store the fingerprint, since datasets may share keys; mask secrets in addresses.
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
        # Check each shard too: one damaged shard must not use up the budget of the dataset.
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
    """Append an entry to a file under a lock unless it is already listed; return all entries."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        return _append_locked(file, entry)


def _append_locked(file: BinaryIO, entry: Entry) -> list[Entry]:
    # Read under the lock, since another rank may have listed this sample.
    file.seek(0)
    text = file.read()
    entries = _parse_entries(text.splitlines())
    listed = {(e["dataset"], e["key"]) for e in entries}
    if (entry["dataset"], entry["key"]) not in listed:
        # A killed process may have left an incomplete line: start a new one.
        begin = b"" if text[-1:] in (b"", b"\n") else b"\n"
        file.write(begin + json.dumps(entry).encode() + b"\n")
        file.flush()
        entries.append(entry)
    return entries
