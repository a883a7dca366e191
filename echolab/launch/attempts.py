"""Attempts of a run: records of all supervisors of a launch merged into one; lost nodes."""

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from echolab.launch import slurm
from echolab.launch.diagnosis import (
    Observation,
    Verdict,
    find_root_cause,
    in_collective,
    is_secondary_failure,
    root_cause_observation,
)
from echolab.launch.exit_codes import CAUSES, Cause
from echolab.launch.launch_records import (
    BY_SIGNAL,
    NodeRecord,
    SlurmRecord,
    is_alive,
    newest_checkpoint,
    read_launches,
    read_slurm_record,
)
from echolab.launch.topology import this_host

RUNNING = "running"
# If supervisors recorded different planned ends, the first in this list counts.
ENDS = (
    "interrupted", "preempted_unsaved", "pruned", "stop", "memory", "time", "preempted", "done",
)  # fmt: skip


class Attempt(NamedTuple):
    """One launch of a run."""

    launch: str
    cause: str  # key of exit_codes.CAUSES, or `running`
    rank: int  # root-cause rank, -1 if none
    host: str  # host of the root-cause rank, "" if unknown
    section: str
    step: int
    detail: str
    exit_code: int  # -1 while running
    started: float
    ended: float  # time of the last record if no end was recorded
    elapsed: float  # seconds from `started` to `ended`, unaffected by clock changes
    hosts: tuple[str, ...]
    first_step: int  # first recorded step, -1 if none
    last_step: int
    checkpoint_before: int  # step of the newest checkpoint at the start, -1 if none
    checkpoint: int  # step of the newest checkpoint at the end
    seconds: dict[str, float]  # seconds of the first rank by section
    save_seconds: float  # duration of the longest save
    waited: float  # seconds that this launch waited for the previous one to leave
    last_section: str  # last section of the first rank
    last_stay: float  # seconds of the first rank in `last_section`
    stack: str
    first_error: str  # earliest exception of any rank that is not secondary

    @property
    def definition(self) -> Cause | None:
        """Definition of the cause; None while running."""
        return CAUSES.get(self.cause)

    @property
    def progressed(self) -> bool:
        """True if a checkpoint was saved."""
        return self.checkpoint > self.checkpoint_before


def attempts_of(run: Path, *, assume_ended: bool = False) -> list[Attempt]:
    """Return every launch of a run, the oldest first.

    If `assume_ended`, nodes that never recorded an end count as lost.
    """
    launches = read_launches(run)
    attempts = []
    for index, records in enumerate(launches):
        # Supervisors without a recorded end, or without any record.
        unfinished = [r.supervisor for r in records if r.ended is None]
        missing = set(range(records[0].num_supervisors)) - {r.supervisor for r in records}
        lost = [*unfinished, *sorted(missing)]
        later = launches[index + 1 :]
        running = not assume_ended and not later and _is_running(records)
        slurm_record = read_slurm_record(run, records[0].launch)
        attempt = merge(records, lost=lost, running=running, slurm_record=slurm_record)
        # The last record of a lost supervisor may be older than its last checkpoint.
        if lost:
            newest = min(r.checkpoint_before for r in later[0]) if later else newest_checkpoint(run)
            attempt = _with_last_checkpoint(attempt, newest)
        attempts.append(attempt)
    return attempts


def _with_last_checkpoint(attempt: Attempt, newest: int) -> Attempt:
    """Add a checkpoint published after the last record; the attempt then counts as saved."""
    updated = attempt._replace(checkpoint=max(attempt.checkpoint, newest))
    if attempt.cause == "preempted_unsaved" and newest >= max(attempt.last_step, 1):
        return updated._replace(cause="preempted", exit_code=CAUSES["preempted"].exit_code)
    return updated


def _is_running(records: Sequence[NodeRecord]) -> bool:
    """Return whether a supervisor of the last launch runs, according to this host or Slurm."""
    # Records of other hosts may be outdated: ask Slurm whether that launch still runs.
    host, now = this_host(), time.time()
    alive = [record for record in records if is_alive(record, host, now)]
    if not alive or any(record.host == host for record in alive):
        return bool(alive)
    return slurm.state_of(records[0].launch) not in ("ended", "restarted")


def merge(
    records: Sequence[NodeRecord],
    *,
    lost: Sequence[int],
    running: bool,
    slurm_record: SlurmRecord | None = None,
) -> Attempt:
    """Merge the records of a launch's supervisors; those in `lost` recorded no end."""
    observations = [o for record in records for o in record.observations]
    verdict = Verdict(-1, RUNNING, "")
    if not running:
        verdict = _verdict(records, observations, lost, slurm_record)
    # Section, step and stack come from the root-cause rank, or from its node's first rank.
    observation = root_cause_observation(verdict.rank, verdict.cause, observations)
    record = next((r for r in records if verdict.rank in r.ranks), records[0])
    return Attempt(
        launch=records[0].launch,
        cause=verdict.cause,
        rank=verdict.rank,
        host=_host(verdict, records),
        section=observation.section if observation else record.section,
        step=observation.step if observation else record.last_step,
        detail=verdict.detail,
        exit_code=_exit_code(records, verdict.cause),
        started=min(r.started for r in records),
        ended=max(r.ended or r.written_at for r in records),
        elapsed=_elapsed(records),
        hosts=tuple(dict.fromkeys(r.host for r in records)),
        first_step=records[0].first_step,
        last_step=max(r.last_step for r in records),
        checkpoint_before=min(r.checkpoint_before for r in records),
        checkpoint=max(r.checkpoint for r in records),
        seconds=records[0].seconds,
        save_seconds=max(r.longest.get("save", 0.0) for r in records),
        waited=max(r.waited for r in records),
        last_section=records[0].section,
        last_stay=records[0].stay,
        stack=observation.stack if observation else "",
        first_error=first_error(observations),
    )


def _elapsed(records: Sequence[NodeRecord]) -> float:
    """Return the seconds from the first start to the last record.

    Starts of several nodes are compared by their clocks, which usually agree within seconds.  A
    larger difference means that a clock was set, and is ignored.
    """
    # Offsets larger than the attempt itself are clock changes.
    first = min(r.started for r in records)
    offsets = {r.supervisor: r.started - first for r in records}
    elapsed = [
        r.elapsed + (offsets[r.supervisor] if offsets[r.supervisor] < r.elapsed else 0.0)
        for r in records
    ]
    return max(elapsed) or max(max(r.ended or r.written_at for r in records) - first, 0.0)


def _verdict(
    records: Sequence[NodeRecord],
    observations: Sequence[Observation],
    lost: Sequence[int],
    slurm_record: SlurmRecord | None,
) -> Verdict:
    verdict = find_root_cause(observations)
    # A lost node explains a failure better than a rank that only waited for it.
    if verdict is None or verdict.cause in BY_SIGNAL or _is_waiting_only(verdict, observations):
        if node_verdict := _node_verdict(records, verdict, lost, slurm_record):
            return node_verdict
    if verdict:
        stopped = next((r for r in records if r.cause == "preempted_unsaved"), None)
        # A rank that hung after a stop signal had no time left to save.
        if verdict.cause == "hang" and stopped:
            return Verdict(verdict.rank, stopped.cause, stopped.detail)
        return verdict
    # No rank failed: use the cause that the supervisors recorded, failures before planned ends.
    causes = [record.cause for record in records]
    failed = [cause for cause in causes if cause and cause not in ENDS]
    worst = failed[0] if failed else next((c for c in ENDS if c in causes), causes[0])
    record = records[causes.index(worst)]
    return Verdict(-1 if worst == "done" else record.rank, worst, record.detail)


def _node_verdict(
    records: Sequence[NodeRecord],
    verdict: Verdict | None,
    lost: Sequence[int],
    slurm_record: SlurmRecord | None,
) -> Verdict | None:
    """Return a verdict for a lost node or a job that was killed before it could save; else None.

    A node that Slurm cannot reach is lost and is the reason why Slurm stopped the job, whether or
    not the job saved.  A node that did not receive a signal which others received is lost too.  If
    Slurm reaches all nodes and ended the job, it was a preemption.
    """
    by_signal = any(record.cause in BY_SIGNAL for record in records)
    if not (lost or verdict or by_signal):
        return None
    # Nodes that Slurm reports as down.
    down = slurm_record.down if slurm_record else ()
    if down_records := [record for record in records if record.host in down]:
        state = f" ({slurm_record.state})" if slurm_record and slurm_record.state else ""
        names = ", ".join(dict.fromkeys(record.host for record in down_records))
        saved = ", saved" if any(record.cause == "preempted" for record in records) else ""
        return Verdict(down_records[0].ranks[0], "node_lost", f"Slurm lost {names}{state}{saved}")
    if not lost or (verdict and verdict.cause in BY_SIGNAL):
        return None
    job_ended = slurm_record is not None and slurm_record.job_ended
    return _unfinished_verdict(records, lost, job_ended=job_ended)


def _unfinished_verdict(
    records: Sequence[NodeRecord], lost: Sequence[int], *, job_ended: bool
) -> Verdict:
    """Return the verdict for supervisors without a recorded end, on nodes that Slurm reaches."""
    # `silent` supervisors recorded no end; `unsignaled` ones of them received no signal either.
    silent = [record for record in records if record.supervisor in lost]
    unsignaled = [record for record in silent if not record.stop_signal]
    number = next((record.stop_signal for record in records if record.stop_signal), 0)
    # All or none received a signal, and the job ended: it was killed, and no node is lost.
    if (job_ended and len(unsignaled) in (0, len(records))) or (number and not unsignaled):
        detail = signal.Signals(number).name if number else "killed by Slurm without a signal"
        return Verdict(-1, "preempted_unsaved", detail)
    # Otherwise name the nodes without a signal, or without an end.
    if number:
        names = ", ".join(dict.fromkeys(record.host for record in unsignaled))
        rank = unsignaled[0].ranks[0]
        return Verdict(rank, "node_lost", f"{names} did not receive the signal to stop")
    hosts = {record.supervisor: record.host for record in silent}
    rank = silent[0].ranks[0] if silent else -1
    names = ", ".join(hosts.get(index, f"supervisor {index}") for index in lost)
    return Verdict(rank, "node_lost", f"no end recorded by {names}")


def _host(verdict: Verdict, records: Sequence[NodeRecord]) -> str:
    """Return the host of the root-cause rank, or of the first rank for a planned end."""
    if verdict.rank < 0 and verdict.cause not in (*ENDS, RUNNING):
        return ""
    hosts = [record.host for record in records if verdict.rank in record.ranks or verdict.rank < 0]
    return hosts[0] if hosts else ""


def _is_waiting_only(verdict: Verdict, observations: Sequence[Observation]) -> bool:
    """Return whether the rank of the verdict failed or hung only because it lost another rank."""
    observation = root_cause_observation(verdict.rank, verdict.cause, observations)
    assert observation
    failure = observation.failure
    secondary = failure is not None and is_secondary_failure(failure)
    return secondary or (verdict.cause == "hang" and in_collective(observation.stack))


def _exit_code(records: Sequence[NodeRecord], cause: str) -> int:
    if cause == RUNNING:
        return -1
    if cause in ENDS:  # in a planned end the ranks chose the exit code
        default = CAUSES[cause].exit_code
        return max((r.exit_code for r in records if r.cause == cause), default=default)
    return CAUSES[cause].exit_code


def first_error(observations: Sequence[Observation]) -> str:
    """Return the first exception of a launch as text; "" without one."""
    # An exception that only reports a lost peer counts if there is no other.
    failed = [o for o in observations if o.failure]
    primary = [o for o in failed if o.failure and not is_secondary_failure(o.failure)] or failed
    if not primary:
        return ""
    first = min(primary, key=lambda o: (o.failure.time if o.failure else 0.0, o.rank))
    assert first.failure
    failure = first.failure
    return f"rank {first.rank} ({first.host}): {failure.error_type}: {failure.message}"
