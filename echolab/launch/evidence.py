"""How Slurm ended a launch, written down while it is known: `RUN/attempts/LAUNCH/slurm.json`.

A launch that is killed with its job tells no end.  Whether a node was lost or the job was preempted
only Slurm knows, and it forgets: so the job's script asks it (`echolab why RUN over=true`), or,
where that was killed too, the next launch of the run.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from echolab.atomic_io import write_whole
from echolab.launch import slurm
from echolab.launch.error_files import read_json
from echolab.launch.launch_records import NodeRecord, read_launches, stopped
from echolab.launch.run_dir import ATTEMPTS

FILE = "slurm.json"
BY_SIGNAL = ("preempted", "preempted_unsaved")  # causes
RECENT = 3  # launches before, that may not have been asked about


class Evidence(NamedTuple):
    """What Slurm said of a launch when it had just ended."""

    down: tuple[str, ...]  # its nodes that were down, or did not answer
    state: str  # of the job's start, by its accounting: NODE_FAIL, REQUEUED, PREEMPTED; or ""
    job_ended: bool  # Slurm ended the job; otherwise the job went on and its step was over


def read_evidence(run: Path, launch: str) -> Evidence | None:
    """Return what was written down of a launch; None where nothing was."""
    told = read_json(run / ATTEMPTS / launch / FILE)
    return Evidence(tuple(told["down"]), told["state"], told["job_ended"]) if told else None


def note(run: Path, records: Sequence[NodeRecord], *, job_ended: bool) -> None:
    """Ask Slurm about a launch that a signal or nothing ended, and write down what it says.

    It may see only later that a node is down.  Raises DataError where it cannot be written.
    """
    launch = records[0].launch
    if stopped(records) and not any(r.followed or r.cause in BY_SIGNAL for r in records):
        return
    known = read_evidence(run, launch)
    if slurm.parsed(launch) is None or (known and known.down):
        return
    down = slurm.lost_nodes(record.host for record in records)
    if down is None:
        return
    found = Evidence(down, slurm.account_of(launch), known.job_ended if known else job_ended)
    write_whole(run / ATTEMPTS / launch / FILE, json.dumps(found._asdict()).encode())


def note_earlier(run: Path, own: str) -> None:
    """Write down of the launches before `own` what nobody did: their jobs' scripts were killed."""
    earlier = [records for records in read_launches(run) if records[0].launch != own]
    for records in earlier[-RECENT:]:
        theirs, ours = slurm.parsed(records[0].launch), slurm.parsed(own)
        same = theirs is not None and ours is not None and theirs[:2] == ours[:2]
        note(run, records, job_ended=not same)
