"""The ledger: which samples each optimizer step trained on, appended as training goes.

A run's folder `ledger` holds one file for each rank of each attempt, attempt-0002-rank-00001.jsonl.
Its first line tells the attempt, the rank, the world, the first step and the datasets; then comes
one line a step, written when the optimizer has made it:

    {"step": 7, "kind": "sft", "sources": [0, ...], "epochs": [1, ...], "keys": ["clip-3", ...],
     "noise": ["9f86d081884c7d65", ...]}

What was read ahead and never trained on is in no line.  An attempt that goes on from a checkpoint
trains some steps again; the rows of earlier attempts from its first step on led nowhere, and
`read_ledger` leaves them out.

skipped.jsonl lists the samples of every global batch that the run was told to leave out.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from echolab.atomic_io import LineLog, append_text, retried, write_error
from echolab.errors import DataError

LEDGER = "ledger"
SKIPPED = "skipped.jsonl"
FORMAT = 1


class Row(NamedTuple):
    """One rank's part of one step; lists are aligned."""

    step: int  # from 0
    kind: str
    sources: list[int]  # number of the dataset
    epochs: list[int]
    keys: list[str]
    noise: list[str]  # a hash of each clip's noise and noise level


class LeftOut(NamedTuple):
    """One global batch that is never trained on; lists are aligned."""

    kind: str  # sft or preference
    batch: int
    sources: list[int]
    epochs: list[int]
    keys: list[str]


class Attempt(NamedTuple):
    """Where an attempt began, and with what."""

    attempt: int
    world: int  # ranks that write: those that share their clips with others count once
    first_step: int
    clips: list[dict[str, Any]]  # the datasets, as the plan tells them
    pairs: list[dict[str, Any]]


class LedgerWriter:
    """Appends to one rank's file of one attempt."""

    def __init__(self, folder: Path, attempt: Attempt, rank: int) -> None:
        """Raises StorageError where the folder cannot be written, DataError where the attempt is
        there already."""
        try:
            retried(lambda: folder.mkdir(parents=True, exist_ok=True))
        except OSError as error:
            raise write_error(folder, error) from error
        self.path = folder / f"attempt-{attempt.attempt:04d}-rank-{rank:05d}.jsonl"
        if self.path.exists():
            raise DataError(f"{self.path}: is there already; do two processes train in this run?")
        head = _line({"format": FORMAT, "rank": rank, **attempt._asdict()})
        append_text(self.path, head, patient=True)
        self._lines = LineLog(self.path)

    def write(self, row: Row) -> None:
        """Write what this rank trained on in one step, now or, if it cannot be, later."""
        self._lines.add(_line(row._asdict()))

    def close(self) -> None:
        """Write what waits."""
        self._lines.close()


class Ledger(NamedTuple):
    """What a run's ledger proves: the attempts, and the steps that led to its state."""

    attempts: list[Attempt]
    steps: dict[int, list[Row]]  # by step, the rows of the ranks in order
    faults: list[str]  # what is missing in the ledger itself


def write_left_out(folder: Path, batches: Iterable[LeftOut]) -> None:
    """Add to what the ledger in `folder` says was left out; StorageError where that cannot be."""
    text = "".join(_line(batch._asdict()) for batch in batches)
    if text:
        append_text(folder / SKIPPED, text, patient=True)


def read_left_out(folder: Path) -> list[LeftOut]:
    """What the ledger in `folder` says was left out; a line cut off is none."""
    path = folder / SKIPPED
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [row for line in lines if (row := _parsed(line))]
    return [LeftOut(*(row[name] for name in LeftOut._fields)) for row in rows]


def next_attempt(folder: Path) -> int:
    """A number above those of all attempts so far; from 1."""
    found = [int(path.name[8:12]) for path in folder.glob("attempt-????-rank-?????.jsonl")]
    return max(found, default=0) + 1


def read_ledger(run: Path) -> Ledger:
    """The effective rows of a run; raises DataError where there is no ledger, or no sense in it."""
    folder = run / LEDGER
    files: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for path in sorted(folder.glob("attempt-????-rank-?????.jsonl")):
        lines = [row for line in path.read_text().splitlines() if (row := _parsed(line))]
        if not lines or lines[0].get("format") != FORMAT:
            continue  # killed before its first line was whole: it trained nothing
        files.setdefault(lines[0]["attempt"], {})[lines[0]["rank"]] = lines
    if not files:
        raise DataError(f"{folder}: holds no ledger; a run with data.log_samples=true writes one")
    attempts: list[Attempt] = []
    steps: dict[int, list[Row]] = {}
    faults: list[str] = []
    try:
        for number in sorted(files):
            head = next(iter(files[number].values()))[0]
            attempt = Attempt(*(head[name] for name in Attempt._fields))
            attempts.append(attempt)
            steps = {step: rows for step, rows in steps.items() if step < attempt.first_step}
            steps |= _steps_of(attempt, files[number], faults)
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder}: attempt {number} cannot be understood ({error!r})") from error
    if not steps:
        faults.append("the ledger tells no step")
    first, last = min(steps, default=0), max(steps, default=-1)
    if attempts[0].first_step:
        faults.append(f"the ledger begins at step {attempts[0].first_step}, not at step 0")
    faults += [f"step {step} is in no attempt" for step in range(first, last) if step not in steps]
    return Ledger(attempts, steps, faults)


def _steps_of(
    attempt: Attempt, ranks: Mapping[int, Sequence[Mapping[str, Any]]], faults: list[str]
) -> dict[int, list[Row]]:
    """The steps of one attempt; a last one that only some ranks wrote does not count.

    The ranks vote after every step, so that none is more than one step ahead when all die.
    """
    rows = {
        rank: {line["step"]: Row(*(line[name] for name in Row._fields)) for line in lines[1:]}
        for rank, lines in ranks.items()
    }
    none = attempt.first_step - 1
    ends = [max(rows.get(rank, {}), default=none) for rank in range(attempt.world)]
    if max(ends) - min(ends) > 1:
        faults.append(
            f"attempt {attempt.attempt}: rank {ends.index(min(ends))} tells no step beyond "
            f"{min(ends)}, rank {ends.index(max(ends))} goes on to {max(ends)}"
        )
    steps = {}
    for step in range(attempt.first_step, min(ends) + 1):
        lacking = [rank for rank in range(attempt.world) if step not in rows[rank]]
        if lacking:
            faults.append(f"step {step}: attempt {attempt.attempt} lacks ranks {lacking}")
        else:
            steps[step] = [rows[rank][step] for rank in range(attempt.world)]
    return steps


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":")) + "\n"


def _parsed(line: str) -> dict[str, Any] | None:
    """A row; None for what a killed process left unfinished."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
