"""The events of a run: `events.jsonl` in the run folder, one JSON line for each event.

    {"id": 3, "time": 1765432100.5, "step": 950, "kind": "rollback", "to": 800, "skip": [...], ...}

Kinds: spike, recompute, reproducible, rollback, straggler, replicas, data (the run continues with
changed datasets).  The file is append-only; only rank 0 or `echolab rollback` writes it.  Skips are
permanent.
"""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from echolab.atomic_io import ABSENT, append_text, fsync, read_file, retry, write_error
from echolab.errors import DataError
from echolab.redaction import mask_values
from echolab.training import distributed
from echolab.training.schedule import Skip

__all__ = ["EVENTS", "Event", "History", "Skip", "append", "read", "skips"]

EVENTS = "events.jsonl"


class Event(NamedTuple):
    """One line of the file."""

    id: int  # from 1
    time: float  # seconds since 1970, by the writer's clock
    step: int  # step of the run, from 0
    kind: str
    details: dict[str, Any]  # all other entries of the line


def append(folder: Path, step: int, kind: str, **details: Any) -> Event:
    """Append an event to the run in `folder` and wait until it is on disk.

    Raise StorageError, after some retries, if it cannot be written, since later steps depend on it.
    An incomplete line of a killed writer remains in the file and is ignored.
    """
    path = folder / EVENTS
    event = Event(
        1 + max((e.id for e in read(folder)), default=0), time.time(), step, kind, details
    )
    head = {name: value for name, value in event._asdict().items() if name != "details"}
    # Mask secrets, which messages may contain.
    line = json.dumps(mask_values({**head, **details}), allow_nan=False) + "\n"
    is_new = not path.exists()
    append_text(path, line, patient=True)
    try:
        retry(lambda: fsync(path))
        if is_new:
            retry(lambda: fsync(folder))
    except OSError as error:
        raise write_error(path, error) from error
    return event


def read(folder: Path) -> list[Event]:
    """Return all events of a run, oldest first; empty if there is no file.

    Raise DataError for a line that is not an event.  Incomplete lines are ignored.
    """
    path = folder / EVENTS
    try:
        text = read_file(path).decode()
    except ABSENT:
        return []
    events = []
    # A line that is not valid JSON is incomplete; all other lines must be events.
    for line_number, line in enumerate(text.splitlines(), 1):
        try:
            details = json.loads(line)
        except ValueError:
            continue  # the writer was killed within the line
        try:
            head = {name: details.pop(name) for name in Event._fields[:-1]}
            events.append(Event(**head, details=details))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: line {line_number} is no event ({error!r}); put back the file as it was"
            ) from error
    return events


class History:
    """The events of a run, the same on all ranks while it trains; rank 0 writes new ones."""

    def __init__(self, folder: Path) -> None:
        """Read the events on rank 0 and send them to all ranks; collective."""
        self.folder = folder
        # Only rank 0 reads, since a shared disk may show new lines to other ranks later.
        local_events = read(folder) if distributed.rank() == 0 else []
        details = distributed.gather_text(json.dumps([list(event) for event in local_events]))[0]
        self.events = [Event(*event) for event in json.loads(details)]

    @property
    def skips(self) -> tuple[Skip, ...]:
        """The batches that events skip, for `Schedule.leaving_out`."""
        return _skips(self.events)

    def add(self, step: int, kind: str, **details: Any) -> None:
        """Append an event; every rank must call this with the same arguments."""
        if distributed.rank() == 0:
            # Rank 0 writes; other ranks only add the event to the list.
            self.events.append(append(self.folder, step, kind, **details))
        else:
            self.events.append(Event(len(self.events) + 1, time.time(), step, kind, details))


def skips(folder: Path) -> tuple[Skip, ...]:
    """Return the batches that the events of a run skipped."""
    return _skips(read(folder))


def _skips(events: list[Event]) -> tuple[Skip, ...]:
    skipped = [Skip(*event.details["skip"]) for event in events if event.details.get("skip")]
    return tuple(skip.check() for skip in dict.fromkeys(skipped))
