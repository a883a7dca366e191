"""Does a ledger prove that every sample was trained on exactly once an epoch?"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from echolab.data.bad_samples import QUARANTINE, read_quarantine
from echolab.data.ledger import (
    LEDGER,
    SKIPPED,
    Attempt,
    Ledger,
    LeftOut,
    read_ledger,
    read_left_out,
)
from echolab.data.shard_reader import open_dataset
from echolab.errors import DataError


class Finding(NamedTuple):
    """One thing that should not be."""

    dataset: str  # its folder
    epoch: int
    key: str
    steps: list[int]  # those that trained on it in that epoch


class Audit(NamedTuple):
    """The outcome; `exact` where there is nothing to say against it."""

    steps: int
    attempts: int
    samples: int  # trained on, over all datasets and epochs
    missing: list[Finding]
    doubled: list[Finding]
    strange: list[Finding]  # keys that the dataset does not hold
    faults: list[str]
    quarantined: int = 0  # bad samples that others stood in for, as the run wrote down
    skipped: int = 0  # samples of batches that events of the run left out

    @property
    def exact(self) -> bool:
        """Whether every sample was trained on exactly once an epoch."""
        return not (self.missing or self.doubled or self.strange or self.faults)

    def lines(self) -> list[str]:
        """One line for each fault."""
        said = list(self.faults)
        for what, findings in (
            ("missing", self.missing),
            ("doubled", self.doubled),
            ("not in the dataset", self.strange),
        ):
            for dataset, epoch, key, steps in findings:
                where = f" (steps {', '.join(map(str, steps))})" if steps else ""
                said.append(f"{dataset}: epoch {epoch}: {key} is {what}{where}")
        return said


Seen = dict[int, dict[str, list[int]]]  # epoch -> key -> the steps that trained on it


def audit(run: Path, skips: Iterable[tuple[str, int, int]] = ()) -> Audit:
    """Read a run's ledger and weigh it against its datasets; raises DataError without a ledger.

    In every epoch no sample may come twice, and in an epoch that was gone through, none may be
    missing, beyond those that remainder=drop leaves out: so each comes k or k + 1 times in all.
    Bad samples in the run's quarantine may be missing, and as many others come once more.
    `skips` are the batches that events of the run left out, (sft or preference, first, count):
    their samples may be missing in the epoch that they would have come in, and may not be there.
    Where the run went on with other samples (data.changed=accept), those before are a fault: they
    cannot be weighed.
    """
    ledger = read_ledger(run)
    faults = list(ledger.faults)
    batches = _left_out(run, skips, faults)
    quarantine = read_quarantine(run / QUARANTINE)
    last = ledger.attempts[-1]
    found = Audit(len(ledger.steps), len(ledger.attempts), 0, [], [], [], faults, len(quarantine))
    for supervised, datasets in ((True, last.clips), (False, last.pairs)):
        kind = "sft" if supervised else "preference"
        begun = _drawn_since(ledger, supervised)
        if begun:
            faults.append(
                f"{run / LEDGER}: from step {begun} on the run trained on other {kind} data "
                "(data.changed=accept); what it trained on before cannot be weighed against these"
            )
        for number, dataset in enumerate(datasets):
            seen = _seen(ledger, supervised, number, begun)
            prints = _fingerprints(ledger, supervised, number, begun)
            bad = {e["key"] for e in quarantine if e["dataset"] in prints}
            out = _keys_left_out(batches, kind, number)
            found = found._replace(
                samples=found.samples
                + sum(len(steps) for e in seen.values() for steps in e.values()),
                skipped=found.skipped + sum(map(len, out.values())),
            )
            _weigh(dataset, seen, bad, out, found, cut=begun > 0)
    return found


def _orders(attempt: Attempt, supervised: bool) -> list[str]:
    """Return what the order of each dataset depended on in an attempt."""
    datasets = attempt.clips if supervised else attempt.pairs
    return [dataset.get("order", dataset["fingerprint"]) for dataset in datasets]


def _drawn_since(ledger: Ledger, supervised: bool) -> int:
    """Return the first step of the attempts whose samples came in the order of the last one's.

    Data that were encoded again keep their order.  0 where nothing was drawn before.
    """
    led: list[tuple[int, list[str]]] = []  # to the run's state: (first step, orders)
    for attempt in ledger.attempts:
        led = [one for one in led if one[0] < attempt.first_step]
        led.append((attempt.first_step, _orders(attempt, supervised)))
    alike = itertools.takewhile(lambda one: one[1] == led[-1][1], reversed(led))
    begun = min(first for first, _ in alike)
    before = [row for step in range(begun) for row in ledger.steps.get(step, [])]
    return begun if any((row.kind == "sft") == supervised for row in before) else 0


def _fingerprints(ledger: Ledger, supervised: bool, number: int, begun: int) -> set[str]:
    """Return those of one dataset in the attempts since step `begun`."""
    named = [a.clips if supervised else a.pairs for a in ledger.attempts if a.first_step >= begun]
    return {datasets[number]["fingerprint"] for datasets in named if number < len(datasets)}


def _weigh(
    dataset: Mapping[str, Any],
    seen: Seen,
    bad: set[str],
    out: dict[int, set[str]],
    found: Audit,
    *,
    cut: bool,
) -> None:
    """Add to the lists of `found` what is wrong with one dataset.

    With `cut` its first epoch began with other data.
    """
    folder = dataset["folder"]
    found.faults.extend(_trained_all_the_same(folder, seen, out))
    found.doubled.extend(_doubled(folder, seen, bad))
    try:
        keys = _keys(dataset)
    except DataError as error:
        found.faults.append(str(error))
        return
    found.strange.extend(_strange(folder, seen, keys))
    first = min(seen, default=0) + 1 if cut else 0
    found.missing.extend(_missing(dataset, seen, keys, bad, out, first))


def _left_out(run: Path, skips: Iterable[tuple[str, int, int]], faults: list[str]) -> list[LeftOut]:
    """The batches that the ledger says were left out, less those that no event asked for."""
    asked = {(kind, b) for kind, first, count in skips for b in range(first, first + count)}
    told = read_left_out(run / LEDGER)
    faults += [
        f"{run / LEDGER / SKIPPED}: {batch.kind} batch {batch.batch} was left out, and no event of "
        "the run asked for it"
        for batch in told
        if (batch.kind, batch.batch) not in asked
    ]
    return [batch for batch in told if (batch.kind, batch.batch) in asked]


def _keys_left_out(batches: list[LeftOut], kind: str, number: int) -> dict[int, set[str]]:
    """By epoch, those of one dataset."""
    found: dict[int, set[str]] = {}
    for batch in batches:
        if batch.kind == kind:
            for source, epoch, key in zip(batch.sources, batch.epochs, batch.keys, strict=True):
                if source == number:
                    found.setdefault(epoch, set()).add(key)
    return found


def _trained_all_the_same(folder: str, seen: Seen, out: dict[int, set[str]]) -> Iterator[str]:
    for epoch, keys in sorted(out.items()):
        for key in sorted(keys & set(seen.get(epoch, {}))):
            steps = ", ".join(map(str, seen[epoch][key]))
            yield f"{folder}: epoch {epoch}: {key} was to be left out (steps {steps})"


def _seen(ledger: Ledger, supervised: bool, number: int, begun: int) -> Seen:
    seen: Seen = {}
    for step, rows in sorted(ledger.steps.items()):
        for row in rows if step >= begun else []:
            if (row.kind == "sft") == supervised:
                for source, epoch, key in zip(row.sources, row.epochs, row.keys, strict=True):
                    if source == number:
                        seen.setdefault(epoch, {}).setdefault(key, []).append(step)
    return seen


def _keys(dataset: Mapping[str, Any]) -> set[str]:
    """What the dataset holds, as long as it is the one that was trained on."""
    found = open_dataset(dataset["folder"])
    if found.fingerprint != dataset["fingerprint"]:
        raise DataError(
            f"{dataset['folder']}: is not the dataset that was trained on; put that one there"
        )
    return set(found.keys)


def _doubled(folder: str, seen: Seen, bad: set[str]) -> Iterator[Finding]:
    for epoch, keys in sorted(seen.items()):
        if sum(len(steps) - 1 for steps in keys.values()) <= len(bad - set(keys)):
            continue  # they stand for bad ones
        for key, steps in sorted(keys.items()):
            if len(steps) > 1:
                yield Finding(folder, epoch, key, steps)


def _strange(folder: str, seen: Seen, keys: set[str]) -> Iterator[Finding]:
    for epoch, found in sorted(seen.items()):
        for key in sorted(set(found) - keys):
            yield Finding(folder, epoch, key, found[key])


def _missing(
    dataset: Mapping[str, Any],
    seen: Seen,
    keys: set[str],
    bad: set[str],
    out: dict[int, set[str]],
    first: int,
) -> Iterator[Finding]:
    """In every epoch from `first` on before the last, which may still be under way."""
    unused = max(0, len(keys) - dataset["span"])
    for epoch in range(first, max(seen, default=0)):
        lacking = keys - set(seen.get(epoch, {})) - bad - out.get(epoch, set())
        if len(lacking) > unused:
            for key in sorted(lacking):
                yield Finding(dataset["folder"], epoch, key, [])
