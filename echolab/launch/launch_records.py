"""Records of a launch in the run folder: one by each supervisor, and one of its state in Slurm.

    RUN/attempts/LAUNCH/node-K.json    written at the start, during training and at the end;
                                       supervisors of several nodes communicate only by these
    RUN/attempts/LAUNCH/slurm.json     state of the launch's nodes and job, as Slurm reported it

A launch that is killed with its job records no end.  Only Slurm knows whether a node was lost or
the job was preempted, and only for a while.  Therefore the job script asks Slurm (`echolab why RUN
over=true`) or, if the script was killed too, the next launch of the run does.
"""

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from echolab.atomic_io import write_atomic
from echolab.errors import DataError
from echolab.launch import slurm
from echolab.launch.diagnosis import Observation, observation_from
from echolab.launch.processes import process_identity
from echolab.launch.rank_process import read_json
from echolab.launch.run_dir import ATTEMPTS, FORMAT
from echolab.redaction import mask_values

SECONDS = 15.0  # between two records of a running supervisor
SILENT = 60.0  # seconds without a record after which a supervisor on another host counts as lost
CHECKPOINT = re.compile(r"step-(\d+)")
SLURM_FILE = "slurm.json"
BY_SIGNAL = ("preempted", "preempted_unsaved")  # causes of a stop by a signal
RECENT = 3  # earlier launches to ask Slurm about


@dataclass
class NodeRecord:
    """One supervisor's part of a launch."""

    launch: str
    supervisor: int
    num_supervisors: int
    host: str
    world_size: int
    ranks: list[int]
    pid: int
    identity: str  # processes.process_identity of the supervisor, since pids are reused
    started: float  # time.time()
    epoch: int = 0  # lease epoch, which orders launches independently of clocks
    elapsed: float = 0.0  # seconds from `started` to `written_at`, by a monotonic clock
    written_at: float = 0.0  # time.time() of this record
    ended: float | None = None
    local_folder: str = ""  # folder of heartbeats and error files on that host
    pids: list[int] = field(default_factory=list)
    checkpoint_before: int = -1  # step of the newest checkpoint at the start, -1 if none
    checkpoint: int = -1
    waited: float = 0.0  # seconds waited for the previous launch before the ranks started
    stop_signal: int = 0  # first signal that was forwarded, 0 if none
    cause: str = ""  # key of exit_codes.CAUSES, by this supervisor's diagnosis
    rank: int = -1
    detail: str = ""
    exit_code: int = -1
    followed: bool = False  # ended because another supervisor had ended
    first_step: int = -1
    last_step: int = -1
    section: str = "init"  # current section of the first rank
    stay: float = 0.0  # seconds of the first rank in `section`
    seconds: dict[str, float] = field(default_factory=dict)  # of the first rank, by section
    longest: dict[str, float] = field(default_factory=dict)
    observations: list[Observation] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write the record atomically; raise StorageError if it cannot be written."""
        self.written_at = time.time()
        # Observations hold messages and stacks of ranks, which may contain secrets.
        observations = [observation.to_json() for observation in self.observations]
        values = {"format": FORMAT, **self.__dict__, "observations": observations}
        text = json.dumps(mask_values(values), indent=1)
        write_atomic(folder / f"node-{self.supervisor}.json", text.encode())


def _read_record(path: Path) -> NodeRecord | None:
    """Read one record; None while it is incomplete.  Raise DataError for another format."""
    values = read_json(path)
    if not values:
        return None
    # Refuse records of another version of echolab: their fields may mean something else.
    if (version := values.pop("format", None)) != FORMAT:
        raise DataError(
            f"{path}: record of format {version}, this version of echolab reads format {FORMAT}; "
            "use the version that wrote it"
        )
    observations = [observation_from(value) for value in values["observations"]]
    return NodeRecord(**{**values, "observations": observations})


def read_launch(folder: Path) -> list[NodeRecord]:
    """Return the records of a launch, in the order of its supervisors."""
    records = [_read_record(path) for path in folder.glob("node-*.json")]
    return sorted((record for record in records if record), key=lambda record: record.supervisor)


def read_launches(run: Path) -> list[list[NodeRecord]]:
    """Return the records of all launches of a run, the oldest launch first."""
    folders = [path for path in (run / ATTEMPTS).glob("*") if path.is_dir()]
    launches = [records for path in folders if (records := read_launch(path))]
    # Sort by lease epoch, because clocks of nodes differ.
    return sorted(launches, key=lambda records: min((r.epoch, r.started) for r in records))


def is_alive(record: NodeRecord, host: str, now: float) -> bool:
    """Return whether a supervisor still runs, seen from `host` at time.time() `now`."""
    if record.ended is not None:
        return False
    # Check the process itself on this host, and the age of its record on other hosts.
    if record.host == host:
        return process_identity(record.pid) == record.identity
    return now - record.written_at < SILENT


def all_ended(records: Sequence[NodeRecord]) -> bool:
    """Return whether all supervisors of a launch recorded their end."""
    return len(records) == records[0].num_supervisors and all(r.ended is not None for r in records)


def newest_checkpoint(run: Path) -> int:
    """Return the step in the name of the newest published checkpoint; -1 if there is none."""
    # Only published checkpoints have such a name.
    try:
        names = os.listdir(run / "checkpoints")
    except OSError:
        return -1
    return max((int(m[1]) for m in map(CHECKPOINT.fullmatch, names) if m), default=-1)


# -- state in Slurm -------------------------------------------------------------------------------


class SlurmRecord(NamedTuple):
    """State of a launch as Slurm reported it, shortly after its end."""

    down: tuple[str, ...]  # nodes of the launch that were down or did not respond
    state: str  # in Slurm's accounting: NODE_FAIL, REQUEUED, PREEMPTED; "" if unknown
    job_ended: bool  # True: Slurm ended the job; False: only the job step ended


def read_slurm_record(run: Path, launch: str) -> SlurmRecord | None:
    """Return Slurm's recorded state of a launch; None if none was recorded."""
    values = read_json(run / ATTEMPTS / launch / SLURM_FILE)
    return (
        SlurmRecord(tuple(values["down"]), values["state"], values["job_ended"]) if values else None
    )


def record_slurm_state(run: Path, records: Sequence[NodeRecord], *, job_ended: bool) -> None:
    """Ask Slurm about a launch that a signal or no recorded reason ended, and record the answer.

    May be repeated: Slurm may notice only later that a node is down.  Raises DataError if the
    answer cannot be written.
    """
    # A launch that recorded its own failure needs no other explanation.
    launch = records[0].launch
    by_signal = any(r.followed or r.cause in BY_SIGNAL for r in records)
    if all_ended(records) and not by_signal:
        return
    # Keep a recorded node that was down, even if the node has recovered since.
    known = read_slurm_record(run, launch)
    if slurm.parse_launch(launch) is None or (known and known.down):
        return
    down = slurm.lost_nodes(record.host for record in records)
    if down is None:
        return
    job_ended = known.job_ended if known else job_ended
    answer = SlurmRecord(down, slurm.accounting_state(launch), job_ended)
    write_atomic(run / ATTEMPTS / launch / SLURM_FILE, json.dumps(answer._asdict()).encode())


def record_earlier_launches(run: Path, this_launch: str) -> None:
    """Record Slurm's state of the previous launches, whose job scripts may have been killed."""
    earlier = [records for records in read_launches(run) if records[0].launch != this_launch]
    for records in earlier[-RECENT:]:
        # Both launches are steps of one start of a job: only the step ended, the job still runs.
        previous, current = slurm.parse_launch(records[0].launch), slurm.parse_launch(this_launch)
        same_start = previous is not None and current is not None and previous[:2] == current[:2]
        record_slurm_state(run, records, job_ended=not same_start)
