"""What the records of all supervisors of a launch come to: one attempt, with one verdict."""

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from echolab.launch import slurm
from echolab.launch.diagnosis import (
    Observation,
    Verdict,
    culprit,
    in_collective,
    is_echo,
    witness,
)  # fmt: skip
from echolab.launch.evidence import BY_SIGNAL, Evidence, read_evidence
from echolab.launch.exit_codes import CAUSES, Cause
from echolab.launch.launch_records import NodeRecord, alive, newest_checkpoint, read_launches
from echolab.launch.topology import this_host

RUNNING = "running"
# Of several supervisors' words on an end without failure, the first here counts.
ENDS = (
    "interrupted", "preempted_unsaved", "pruned", "stop", "memory", "time", "preempted", "done",
)  # fmt: skip


class Attempt(NamedTuple):
    """One launch of a run."""

    launch: str
    cause: str  # of exit_codes.CAUSES, or running
    rank: int  # to blame, -1 where nobody is
    host: str  # its own, "" where it is not known
    section: str
    step: int
    detail: str
    exit_code: int  # -1 while running
    started: float
    ended: float  # or when a record was written last
    elapsed: float  # seconds between the two, though the clock was set meanwhile
    hosts: tuple[str, ...]
    first_step: int  # the first that was told, -1 where none was
    last_step: int
    checkpoint_before: int  # step of the newest, -1 without
    checkpoint: int
    seconds: dict[str, float]  # of the first rank, by section
    save_seconds: float  # the longest save
    waited: float  # seconds, for the launch before to leave
    last_section: str  # of the first rank
    last_stay: float  # of the first rank in it
    stack: str
    earliest: str  # the earliest exception of any rank that is not an echo

    @property
    def why(self) -> Cause | None:
        """What the cause means; None while running."""
        return CAUSES.get(self.cause)

    @property
    def progressed(self) -> bool:
        """Whether a checkpoint was made."""
        return self.checkpoint > self.checkpoint_before


def attempts_of(run: Path, *, over: bool = False) -> list[Attempt]:
    """Every launch of a run, the oldest first.

    With `over` no supervisor works any more: who told no end is lost.
    """
    launches = read_launches(run)
    merged = []
    for number, records in enumerate(launches):
        lost = [r.supervisor for r in records if r.ended is None]
        missing = set(range(records[0].supervisors)) - {r.supervisor for r in records}
        told_none = [*lost, *sorted(missing)]
        later = launches[number + 1 :]
        lives = not over and not later and _lives(records)
        evidence = read_evidence(run, records[0].launch)
        one = merge(records, lost=told_none, lives=lives, evidence=evidence)
        if told_none:  # their last words may be older than the last checkpoint
            seen = min(r.checkpoint_before for r in later[0]) if later else newest_checkpoint(run)
            one = _with_its_last_save(one, seen)
        merged.append(one)
    return merged


def _with_its_last_save(attempt: Attempt, newest: int) -> Attempt:
    """The checkpoint that one published after its last words; then it was stopped, saved."""
    found = attempt._replace(checkpoint=max(attempt.checkpoint, newest))
    if attempt.cause == "preempted_unsaved" and newest >= max(attempt.last_step, 1):
        return found._replace(cause="preempted", exit_code=CAUSES["preempted"].exit_code)
    return found


def _lives(records: Sequence[NodeRecord]) -> bool:
    """Whether a supervisor of the last launch is at work, where it is seen or Slurm sees it."""
    host, now = this_host(), time.time()
    living = [record for record in records if alive(record, host, now)]
    if not living or any(record.host == host for record in living):
        return bool(living)
    return slurm.state_of(records[0].launch) not in ("over", "anew")


def merge(
    records: Sequence[NodeRecord],
    *,
    lost: Sequence[int],
    lives: bool,
    evidence: Evidence | None = None,
) -> Attempt:
    """One attempt of its supervisors' records; `lost` told no end, `lives`: some are at work."""
    seen = [o for record in records for o in record.observations]
    verdict = Verdict(-1, RUNNING, "") if lives else _verdict(records, seen, lost, evidence)
    observed = witness(verdict.rank, verdict.cause, seen)
    own = next((r for r in records if verdict.rank in r.ranks), records[0])
    return Attempt(
        launch=records[0].launch,
        cause=verdict.cause,
        rank=verdict.rank,
        host=_host(verdict, records),
        section=observed.section if observed else own.section,
        step=observed.step if observed else own.last_step,
        detail=verdict.detail,
        exit_code=_exit_code(records, verdict.cause),
        started=min(r.started for r in records),
        ended=max(r.ended or r.seen for r in records),
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
        stack=observed.stack if observed else "",
        earliest=earliest(seen),
    )


def _elapsed(records: Sequence[NodeRecord]) -> float:
    """Return the seconds from the first start to the last word.

    The starts of several nodes are compared by their clocks, which are seconds apart at most; where
    it is more, a clock was set.  Records of older versions tell no more than clocks.
    """
    first = min(r.started for r in records)
    apart = {r.supervisor: r.started - first for r in records}
    known = [r.ran + (apart[r.supervisor] if apart[r.supervisor] < r.ran else 0.0) for r in records]
    return max(known) or max(max(r.ended or r.seen for r in records) - first, 0.0)


def _verdict(
    records: Sequence[NodeRecord],
    seen: Sequence[Observation],
    lost: Sequence[int],
    evidence: Evidence | None,
) -> Verdict:
    found = culprit(seen)
    if found is None or found.cause in BY_SIGNAL or _only_waits(found, seen):
        if verdict := _of_a_node(records, found, lost, evidence):
            return verdict
    if found:
        asked = next((r for r in records if r.cause == "preempted_unsaved"), None)
        if found.cause == "hang" and asked:  # it was given no more time than the signal left
            return Verdict(found.rank, asked.cause, asked.detail)
        return found
    causes = [record.cause for record in records]
    failed = [cause for cause in causes if cause and cause not in ENDS]
    worst = failed[0] if failed else next((c for c in ENDS if c in causes), causes[0])
    record = records[causes.index(worst)]
    return Verdict(-1 if worst == "done" else record.rank, worst, record.detail)


def _of_a_node(
    records: Sequence[NodeRecord],
    found: Verdict | None,
    lost: Sequence[int],
    evidence: Evidence | None,
) -> Verdict | None:
    """A node that was lost, or a job that was killed before it could save; None for neither.

    Those nodes are lost which Slurm does not reach: that is then why it stopped the job, were there
    time to save or not.  Of those that told no end also which alone did not hear its signal.  Where
    it reaches all, and ended the job, it was a preemption.
    """
    stopped = any(record.cause in BY_SIGNAL for record in records)
    if not (lost or found or stopped):
        return None
    down = evidence.down if evidence else ()
    if gone := [record for record in records if record.host in down]:
        state = f" ({evidence.state})" if evidence and evidence.state else ""
        names = ", ".join(dict.fromkeys(record.host for record in gone))
        saved = ", saved" if any(record.cause == "preempted" for record in records) else ""
        return Verdict(gone[0].ranks[0], "node_lost", f"Slurm lost {names}{state}{saved}")
    if not lost or (found and found.cause in BY_SIGNAL):
        return None
    silent = [record for record in records if record.supervisor in lost]
    deaf = [record for record in silent if not record.asked]
    asked = next((record.asked for record in records if record.asked), 0)
    preempted = evidence is not None and evidence.job_ended and len(deaf) in (0, len(records))
    if preempted or (asked and not deaf):
        how = signal.Signals(asked).name if asked else "killed by Slurm without a signal before"
        return Verdict(-1, "preempted_unsaved", how)
    if asked:
        names = ", ".join(dict.fromkeys(record.host for record in deaf))
        return Verdict(deaf[0].ranks[0], "node_lost", f"{names} did not hear the signal to stop")
    told = {record.supervisor: record for record in silent}
    rank = silent[0].ranks[0] if silent else -1
    which = ", ".join(told[n].host if n in told else f"supervisor {n}" for n in lost)
    return Verdict(rank, "node_lost", f"no end was told by {which}")


def _host(verdict: Verdict, records: Sequence[NodeRecord]) -> str:
    """Of the rank to blame; of an end that nobody is to blame for, that of the first."""
    if verdict.rank < 0 and verdict.cause not in (*ENDS, RUNNING):
        return ""
    hosts = [record.host for record in records if verdict.rank in record.ranks or verdict.rank < 0]
    return hosts[0] if hosts else ""


def _only_waits(verdict: Verdict, seen: Sequence[Observation]) -> bool:
    """Whether the best that was found is a rank that missed another."""
    one = witness(verdict.rank, verdict.cause, seen)
    assert one
    echoed = one.failure is not None and is_echo(one.failure)
    return echoed or (verdict.cause == "hang" and in_collective(one.stack))


def _exit_code(records: Sequence[NodeRecord], cause: str) -> int:
    if cause == RUNNING:
        return -1
    if cause in ENDS:  # ranks chose it themselves
        own = CAUSES[cause].exit_code
        return max((r.exit_code for r in records if r.cause == cause), default=own)
    return CAUSES[cause].exit_code


def earliest(seen: Sequence[Observation]) -> str:
    """The first exception of a launch, in words; "" where there was none."""
    failed = [o for o in seen if o.failure]
    own = [o for o in failed if o.failure and not is_echo(o.failure)] or failed
    if not own:
        return ""
    first = min(own, key=lambda o: (o.failure.time if o.failure else 0.0, o.rank))
    assert first.failure
    return f"rank {first.rank} ({first.host}): {first.failure.kind}: {first.failure.message}"
