"""Record the samples of each optimizer step, and audit that each sample was used once per epoch.

A run's folder `ledger` holds one file for each rank of each attempt, attempt-0002-rank-00001.jsonl.
The first line names the attempt, the rank, the world, the first step and the datasets; it is
followed by one line per step, written after the optimizer's update:

    {"step": 7, "kind": "sft", "sources": [0, ...], "epochs": [1, ...], "keys": ["clip-3", ...],
     "noise": ["9f86d081884c7d65", ...]}

Samples that were prefetched but not trained on are not listed.  An attempt that resumes from a
checkpoint repeats some steps: `read_ledger` drops the rows of earlier attempts from its first step
on.

skipped.jsonl lists the samples of every global batch that the run skipped on request.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from echolab.atomic_io import LineLog, append_text, retry, write_error
from echolab.data.bad_samples import QUARANTINE, read_quarantine
from echolab.data.shard_reader import open_dataset
from echolab.errors import DataError

LEDGER = "ledger"
SKIPPED = "skipped.jsonl"
FORMAT = 1
FILES = "attempt-????-rank-?????.jsonl"


class Row(NamedTuple):
    """One rank's part of one step; list entries correspond to clips."""

    step: int  # from 0
    kind: str
    sources: list[int]  # index of the dataset
    epochs: list[int]
    keys: list[str]
    noise: list[str]  # hash of each clip's noise and noise level


class SkippedBatch(NamedTuple):
    """One global batch that the run skipped; list entries correspond to clips."""

    kind: str  # sft or preference
    batch: int
    sources: list[int]
    epochs: list[int]
    keys: list[str]


class Attempt(NamedTuple):
    """The start of an attempt."""

    attempt: int
    world: int  # number of ranks that write; ranks with the same clips count once
    first_step: int
    clips: list[dict[str, Any]]  # descriptions by `BatchSampler.datasets`
    pairs: list[dict[str, Any]]


class Ledger(NamedTuple):
    """The attempts of a run, and the steps that produced its current weights."""

    attempts: list[Attempt]
    steps: dict[int, list[Row]]  # step -> rows of the ranks in order
    faults: list[str]  # gaps in the ledger itself


# Writing


class LedgerWriter:
    """Appends to one rank's file of one attempt."""

    def __init__(self, folder: Path, attempt: Attempt, rank: int) -> None:
        """Write the first line; raise StorageError, or DataError if the attempt exists already."""
        try:
            retry(lambda: folder.mkdir(parents=True, exist_ok=True))
        except OSError as error:
            raise write_error(folder, error) from error
        self.path = folder / f"attempt-{attempt.attempt:04d}-rank-{rank:05d}.jsonl"
        if self.path.exists():
            raise DataError(
                f"{self.path}: exists already; stop the other process that trains in this run"
            )
        head = _line({"format": FORMAT, "rank": rank, **attempt._asdict()})
        append_text(self.path, head, patient=True)
        self._lines = LineLog(self.path)

    def write(self, row: Row) -> None:
        """Write the samples of one step; if writing fails, retry later."""
        self._lines.add(_line(row._asdict()))

    def close(self) -> None:
        """Write the pending lines."""
        self._lines.close()


def write_skipped(folder: Path, batches: Iterable[SkippedBatch]) -> None:
    """Append skipped batches to the ledger in `folder`; raise StorageError."""
    # Append all batches at once, so that a killed process leaves complete lines.
    text = "".join(_line(batch._asdict()) for batch in batches)
    if text:
        append_text(folder / SKIPPED, text, patient=True)


def next_attempt(folder: Path) -> int:
    """Return the index of the next attempt, from 1."""
    return max((int(path.name[8:12]) for path in folder.glob(FILES)), default=0) + 1


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":")) + "\n"


# Reading


def read_skipped(folder: Path) -> list[SkippedBatch]:
    """Return the skipped batches in the ledger `folder`; ignore incomplete lines."""
    path = folder / SKIPPED
    return [
        SkippedBatch(*(row[name] for name in SkippedBatch._fields))
        for row in (_read_rows(path) if path.exists() else [])
    ]


def read_ledger(run: Path) -> Ledger:
    """Return the rows that produced a run's state; raise DataError without a readable ledger."""
    folder = run / LEDGER
    # Group the files by attempt and rank.
    files: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for path in sorted(folder.glob(FILES)):
        lines = _read_rows(path)
        if not lines or lines[0].get("format") != FORMAT:
            continue  # killed before the first line was complete, so before any step
        files.setdefault(lines[0]["attempt"], {})[lines[0]["rank"]] = lines
    if not files:
        raise DataError(f"{folder}: holds no ledger; a run with data.log_samples=true writes one")
    # Replay the attempts in order; for each step the last attempt counts.
    attempts: list[Attempt] = []
    steps: dict[int, list[Row]] = {}
    faults: list[str] = []
    try:
        for index in sorted(files):
            head = next(iter(files[index].values()))[0]
            attempt = Attempt(*(head[name] for name in Attempt._fields))
            attempts.append(attempt)
            # This attempt repeats the later steps of earlier attempts.
            steps = {step: rows for step, rows in steps.items() if step < attempt.first_step}
            steps |= _attempt_steps(attempt, files[index], faults)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: attempt {index} has a row of another format ({error!r}); audit it with the "
            "program that wrote it"
        ) from error
    # Find gaps: every step up to the last one must be in some attempt.
    if not steps:
        faults.append("the ledger lists no step")
    first, last = min(steps, default=0), max(steps, default=-1)
    if attempts[0].first_step:
        faults.append(f"the ledger begins at step {attempts[0].first_step}, not at step 0")
    faults += [f"step {step} is in no attempt" for step in range(first, last) if step not in steps]
    return Ledger(attempts, steps, faults)


def _attempt_steps(
    attempt: Attempt, ranks: Mapping[int, Sequence[Mapping[str, Any]]], faults: list[str]
) -> dict[int, list[Row]]:
    """Return the steps of one attempt; drop a last step that only some ranks wrote.

    The ranks synchronize after every step, so no rank is more than one step ahead of another.
    """
    rows = {
        rank: {line["step"]: Row(*(line[name] for name in Row._fields)) for line in lines[1:]}
        for rank, lines in ranks.items()
    }
    # Last step of each rank; the step before the first if the rank wrote no step.
    none = attempt.first_step - 1
    ends = [max(rows.get(rank, {}), default=none) for rank in range(attempt.world)]
    if max(ends) - min(ends) > 1:
        faults.append(
            f"attempt {attempt.attempt}: rank {ends.index(min(ends))} lists no step beyond "
            f"{min(ends)}, rank {ends.index(max(ends))} continues to {max(ends)}"
        )
    # Keep steps that all ranks wrote; report earlier steps that a rank lacks.
    steps = {}
    for step in range(attempt.first_step, min(ends) + 1):
        lacking = [rank for rank in range(attempt.world) if step not in rows[rank]]
        if lacking:
            faults.append(f"step {step}: attempt {attempt.attempt} lacks ranks {lacking}")
        else:
            steps[step] = [rows[rank][step] for rank in range(attempt.world)]
    return steps


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; ignore the incomplete line of a killed process."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict) and row]


# Auditing


class Finding(NamedTuple):
    """One sample that was not trained on exactly once in an epoch."""

    dataset: str  # folder of the dataset
    epoch: int
    key: str
    steps: list[int]  # steps that trained on the sample in that epoch


class Audit(NamedTuple):
    """The result of an audit."""

    steps: int
    attempts: int
    samples: int  # number of samples trained on, over all datasets and epochs
    missing: list[Finding]
    doubled: list[Finding]
    unknown: list[Finding]  # keys that are not in the dataset
    faults: list[str]
    quarantined: int = 0  # number of bad samples that the run replaced
    skipped: int = 0  # number of samples in skipped batches

    @property
    def exact(self) -> bool:
        """Return whether every sample was trained on exactly once per epoch."""
        return not (self.missing or self.doubled or self.unknown or self.faults)

    def lines(self) -> list[str]:
        """Return one line for each fault."""
        lines = list(self.faults)
        for fault, findings in (
            ("missing", self.missing),
            ("doubled", self.doubled),
            ("not in the dataset", self.unknown),
        ):
            for dataset, epoch, key, steps in findings:
                at_steps = f" (steps {', '.join(map(str, steps))})" if steps else ""
                lines.append(f"{dataset}: epoch {epoch}: {key} is {fault}{at_steps}")
        return lines


Seen = dict[int, dict[str, list[int]]]  # epoch -> key -> steps that trained on the sample
SkippedKeys = dict[int, set[str]]  # epoch -> keys


def audit_run(run: Path, skips: Iterable[tuple[str, int, int]] = ()) -> Audit:
    """Compare a run's ledger with its datasets; raise DataError without a ledger.

    No sample may occur twice in an epoch.  In a finished epoch no sample may be missing except
    those that last_batch=drop drops.  Bad samples in the run's quarantine may be missing, and as
    many other samples may occur twice.  `skips` lists the batches skipped by events of the run as
    (sft or preference, first, count): their samples must be missing in their epoch.  If the run
    changed its samples (data.changed=accept), report the steps before the change as a fault, since
    they cannot be compared.
    """
    ledger = read_ledger(run)
    faults = list(ledger.faults)
    batches = _skipped_batches(run, skips, faults)
    quarantine = read_quarantine(run / QUARANTINE)
    last = ledger.attempts[-1]
    audit = Audit(len(ledger.steps), len(ledger.attempts), 0, [], [], [], faults, len(quarantine))
    # Supervised clips and preference pairs have separate datasets and orders.
    for supervised, datasets in ((True, last.clips), (False, last.pairs)):
        kind = "sft" if supervised else "preference"
        start = _first_comparable_step(ledger, supervised)
        # Compare only rows with the order of the last attempt; others used other data.
        if start:
            faults.append(
                f"{run / LEDGER}: from step {start} on the run trained on other {kind} data "
                "(data.changed=accept); what it trained on before cannot be compared with these"
            )
        for index, dataset in enumerate(datasets):
            seen = _collect_seen(ledger, supervised, index, start)
            # Include all fingerprints since `start`: the samples may have been re-encoded.
            fingerprints = _fingerprints(ledger, supervised, index, start)
            bad = {e["key"] for e in quarantine if e["dataset"] in fingerprints}
            skipped = _skipped_keys(batches, kind, index)
            trained = sum(len(steps) for keys in seen.values() for steps in keys.values())
            audit = audit._replace(
                samples=audit.samples + trained,
                skipped=audit.skipped + sum(map(len, skipped.values())),
            )
            _compare(dataset, seen, bad, skipped, audit, changed=start > 0)
    return audit


def _is_supervised(row: Row) -> bool:
    return row.kind not in ("ndpo", "dpo")


def _order_names(attempt: Attempt, supervised: bool) -> list[str]:
    """Return the names that seeded the order of each dataset in an attempt."""
    datasets = attempt.clips if supervised else attempt.pairs
    return [dataset.get("order", dataset["fingerprint"]) for dataset in datasets]


def _first_comparable_step(ledger: Ledger, supervised: bool) -> int:
    """Return the first step from which on all attempts used the order of the last attempt.

    Re-encoded data keep their order.  Return 0 if no sample was trained on before that step.
    """
    # Attempts that contributed to the run's state: each replaces earlier attempts at later steps.
    history: list[tuple[int, list[str]]] = []  # (first step, orders)
    for attempt in ledger.attempts:
        history = [entry for entry in history if entry[0] < attempt.first_step]
        history.append((attempt.first_step, _order_names(attempt, supervised)))
    # Go back as long as the order equals that of the last attempt.
    same = itertools.takewhile(lambda entry: entry[1] == history[-1][1], reversed(history))
    start = min(first for first, _ in same)
    before = [row for step in range(start) for row in ledger.steps.get(step, [])]
    return start if any(_is_supervised(row) == supervised for row in before) else 0


def _fingerprints(ledger: Ledger, supervised: bool, index: int, start: int) -> set[str]:
    """Return the fingerprints of one dataset in the attempts since step `start`."""
    named = [a.clips if supervised else a.pairs for a in ledger.attempts if a.first_step >= start]
    return {datasets[index]["fingerprint"] for datasets in named if index < len(datasets)}


def _skipped_batches(
    run: Path, skips: Iterable[tuple[str, int, int]], faults: list[str]
) -> list[SkippedBatch]:
    """Return the requested skipped batches of the ledger; add a fault for every other batch."""
    asked = {(kind, b) for kind, first, count in skips for b in range(first, first + count)}
    batches = read_skipped(run / LEDGER)
    faults += [
        f"{run / LEDGER / SKIPPED}: {batch.kind} batch {batch.batch} was skipped, and no event of "
        "the run asked for it"
        for batch in batches
        if (batch.kind, batch.batch) not in asked
    ]
    return [batch for batch in batches if (batch.kind, batch.batch) in asked]


def _skipped_keys(batches: list[SkippedBatch], kind: str, index: int) -> SkippedKeys:
    """Return the skipped keys of one dataset by epoch."""
    keys: SkippedKeys = {}
    for batch in batches:
        if batch.kind == kind:
            for source, epoch, key in zip(batch.sources, batch.epochs, batch.keys, strict=True):
                if source == index:
                    keys.setdefault(epoch, set()).add(key)
    return keys


def _collect_seen(ledger: Ledger, supervised: bool, index: int, start: int) -> Seen:
    seen: Seen = {}
    for step, rows in sorted(ledger.steps.items()):
        for row in rows if step >= start else []:
            if _is_supervised(row) == supervised:
                for source, epoch, key in zip(row.sources, row.epochs, row.keys, strict=True):
                    if source == index:
                        seen.setdefault(epoch, {}).setdefault(key, []).append(step)
    return seen


def _compare(
    dataset: Mapping[str, Any],
    seen: Seen,
    bad: set[str],
    skipped: SkippedKeys,
    audit: Audit,
    *,
    changed: bool,
) -> None:
    """Add the findings of one dataset to `audit`; if `changed`, its first epoch is incomplete."""
    # The first two checks do not need to open the dataset.
    folder = dataset["folder"]
    audit.faults.extend(_trained_though_skipped(folder, seen, skipped))
    audit.doubled.extend(_find_doubled(folder, seen, bad))
    try:
        keys = _read_keys(dataset)
    except DataError as error:
        audit.faults.append(str(error))
        return
    audit.unknown.extend(
        Finding(folder, epoch, key, trained[key])
        for epoch, trained in sorted(seen.items())
        for key in sorted(set(trained) - keys)
    )
    first = min(seen, default=0) + 1 if changed else 0
    audit.missing.extend(_find_missing(dataset, seen, keys, bad, skipped, first))


def _trained_though_skipped(folder: str, seen: Seen, skipped: SkippedKeys) -> Iterator[str]:
    for epoch, keys in sorted(skipped.items()):
        for key in sorted(keys & set(seen.get(epoch, {}))):
            steps = ", ".join(map(str, seen[epoch][key]))
            yield f"{folder}: epoch {epoch}: {key} was trained on, though skipped (steps {steps})"


def _read_keys(dataset: Mapping[str, Any]) -> set[str]:
    """Return the keys of the dataset; raise DataError if the run trained on another dataset."""
    opened = open_dataset(dataset["folder"])
    if opened.fingerprint != dataset["fingerprint"]:
        raise DataError(
            f"{dataset['folder']}: is not the dataset that was trained on; put that one back"
        )
    return set(opened.keys)


def _find_doubled(folder: str, seen: Seen, bad: set[str]) -> Iterator[Finding]:
    for epoch, keys in sorted(seen.items()):
        # One duplicate is allowed for each missing bad sample, as its substitute.
        if sum(len(steps) - 1 for steps in keys.values()) <= len(bad - set(keys)):
            continue
        for key, steps in sorted(keys.items()):
            if len(steps) > 1:
                yield Finding(folder, epoch, key, steps)


def _find_missing(
    dataset: Mapping[str, Any],
    seen: Seen,
    keys: set[str],
    bad: set[str],
    skipped: SkippedKeys,
    first: int,
) -> Iterator[Finding]:
    """Yield the missing samples of each epoch from `first` on; the last epoch may be unfinished."""
    # last_batch=drop skips this number of arbitrary samples per epoch.
    unused = max(0, len(keys) - dataset["span"])
    for epoch in range(first, max(seen, default=0)):
        lacking = keys - set(seen.get(epoch, {})) - bad - skipped.get(epoch, set())
        if len(lacking) > unused:
            for key in sorted(lacking):
                yield Finding(dataset["folder"], epoch, key, [])
