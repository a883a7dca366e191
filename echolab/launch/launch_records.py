"""What supervisors tell of a launch, `RUN/attempts/LAUNCH/node-K.json`, and what it comes to.

A record is written at the start, again while the ranks train, and whole at the end; with more than
one supervisor it is the only thing that they tell each other.
"""

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echolab.atomic_io import write_whole
from echolab.launch.diagnosis import Observation, observation_from
from echolab.launch.error_files import read_json
from echolab.launch.processes import birth
from echolab.launch.run_dir import ATTEMPTS
from echolab.redaction import masked_values

SECONDS = 15.0  # between two records of a supervisor at work
SILENT = 60.0  # seconds without a record after which a supervisor on another host is lost
CHECKPOINT = re.compile(r"step-(\d+)")


@dataclass
class NodeRecord:
    """One supervisor's part of a launch."""

    launch: str
    supervisor: int
    supervisors: int
    host: str
    world: int
    ranks: list[int]
    pid: int
    born: str  # of the supervisor, so that its pid is not mistaken for another's
    started: float  # time.time()
    epoch: int = 0  # of the lease: launches in their order, whatever the clocks were
    ran: float = 0.0  # seconds from `started` to `seen`, by a clock that nobody sets
    seen: float = 0.0  # when this was written
    ended: float | None = None
    beats: str = ""  # folder on that host
    pids: list[int] = field(default_factory=list)
    checkpoint_before: int = -1  # step of the newest checkpoint, -1 without
    checkpoint: int = -1
    waited: float = 0.0  # seconds before the ranks began, for the launch before to leave
    asked: int = 0  # the signal that was passed on
    cause: str = ""  # of exit_codes.CAUSES, as this supervisor saw it
    rank: int = -1
    detail: str = ""
    exit_code: int = -1
    followed: bool = False  # ended because another supervisor had
    first_step: int = -1
    last_step: int = -1
    section: str = "init"
    stay: float = 0.0  # seconds in it at the end
    seconds: dict[str, float] = field(default_factory=dict)  # by section, of the first rank
    longest: dict[str, float] = field(default_factory=dict)
    observations: list[Observation] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Whole, or not at all."""
        self.seen = time.time()
        told = {**self.__dict__, "observations": [o.plain() for o in self.observations]}
        text = json.dumps(masked_values(told), indent=1)
        write_whole(folder / f"node-{self.supervisor}.json", text.encode())


def record_from(told: dict[str, Any]) -> NodeRecord:
    """From JSON."""
    seen = [observation_from(one) for one in told["observations"]]
    return NodeRecord(**{**told, "observations": seen})


def read_launch(folder: Path) -> list[NodeRecord]:
    """The records of a launch, in the order of the supervisors."""
    told = [read_json(path) for path in folder.glob("node-*.json")]
    return sorted((record_from(one) for one in told if one), key=lambda record: record.supervisor)


def read_launches(run: Path) -> list[list[NodeRecord]]:
    """Of all launches of a run, the oldest first."""
    folders = [path for path in (run / ATTEMPTS).glob("*") if path.is_dir()]
    launches = [records for path in folders if (records := read_launch(path))]
    return sorted(launches, key=lambda records: min((r.epoch, r.started) for r in records))


def alive(record: NodeRecord, host: str, now: float) -> bool:
    """Whether a supervisor that told no end is at work still."""
    if record.ended is not None:
        return False
    if record.host == host:
        return birth(record.pid) == record.born
    return now - record.seen < SILENT


def newest_checkpoint(run: Path) -> int:
    """The step of the newest published checkpoint, by its name; -1 without one."""
    try:
        names = os.listdir(run / "checkpoints")
    except OSError:
        return -1
    return max((int(m[1]) for m in map(CHECKPOINT.fullmatch, names) if m), default=-1)


def stopped(records: Sequence[NodeRecord]) -> bool:
    """Whether all supervisors of a launch told their end."""
    return len(records) == records[0].supervisors and all(r.ended is not None for r in records)
