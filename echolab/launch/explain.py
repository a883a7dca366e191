"""Explain how a run ended: last message of the supervisor, output of `echolab why`, goodput."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from echolab.heartbeat import STEP_SECTIONS
from echolab.launch.attempts import RUNNING, Attempt
from echolab.launch.diagnosis import Observation, main_thread, root_cause_observation
from echolab.launch.exit_codes import CAUSES
from echolab.launch.launch_records import NodeRecord, newest_checkpoint
from echolab.launch.restart_policy import Decision, decide
from echolab.launch.run_dir import ATTEMPTS

# Causes that the user can correct: the error message explains how, without a traceback.
USER_ERRORS = ("config", "data", "start", "refused", "diverged", "parity")
LOG_LINES = 20
FRAMES = 8  # frames of the stack trace that are printed
# Lost time: JSON key and description.
LOSSES = {
    "waiting": "waiting for the previous launch", "init": "start", "data_wait": "waiting for data",
    "eval": "validation", "save": "checkpoints", "pause": "pause", "rework": "repeated steps",
    "hang": "hang", "other": "other",
}  # fmt: skip
PRIOR_SECONDS = 24 * 3600.0  # assumed mean time between failures, before any was observed
MIN_INTERVAL, MAX_INTERVAL = 300.0, 4 * 3600.0  # seconds between checkpoints


# -- the supervisor's last message ----------------------------------------------------------------


def failure_message(run: Path, record: NodeRecord) -> str:
    """Return one line with rank, host, cause, section, step and remedy, after the rank's output."""
    observation = root_cause_observation(record.rank, record.cause, record.observations)
    if record.cause == "interrupted":
        return "echolab: stopped"
    if observation and observation.failure and record.cause in USER_ERRORS:
        return f"echolab: error: {observation.failure.message}"
    cause = CAUSES[record.cause]
    position = f" in {observation.section} at step {observation.step}" if observation else ""
    # A rank of another node is named without this node's host.
    if record.rank < 0:
        rank = "all ranks"
    else:
        rank = f"rank {record.rank}" + (f" ({record.host})" if record.rank in record.ranks else "")
    line = (
        f"echolab: error: {run}: {rank}: {cause.summary}{position}: {record.detail}; "
        f"{cause.next_action} (echolab why {run})"
    )
    return "\n".join([*_rank_output(run, record, observation), " ".join(line.split())])


def _rank_output(run: Path, record: NodeRecord, observation: Observation | None) -> list[str]:
    """Return the traceback of a bug, or the last lines of the log of a rank that was killed."""
    if observation and observation.failure and record.cause in ("code", "teardown"):
        return [observation.failure.traceback.rstrip()]
    log = run / ATTEMPTS / record.launch / f"rank-{record.rank}.log"
    if record.cause not in ("killed", "exited") or not log.exists():
        return []
    lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return [f"rank {record.rank}| {line}" for line in lines]


# -- `echolab why` --------------------------------------------------------------------------------


def summarize(run: Path, attempts: Sequence[Attempt], max_infrastructure: int) -> dict[str, Any]:
    """Return figures of the last attempt and of all attempts, as JSON values."""
    last, decision = attempts[-1], decide(attempts, max_infrastructure)
    goodput = measure_goodput(attempts)
    # The newest checkpoint on the disk now, which may differ from the recorded one.
    saved = newest_checkpoint(run) if (run / "checkpoints").is_dir() else last.checkpoint
    return {
        "run": str(run),
        "launch": last.launch,
        "cause": last.cause,
        "rank": None if last.rank < 0 else last.rank,
        "host": last.host or None,
        "section": last.section,
        "step": last.step,
        "detail": last.detail,
        "exit_code": None if last.exit_code < 0 else last.exit_code,
        "next_action": next_action(last, decision, saved),
        "requeue": decision.restart,
        "decision": decision.reason,
        "exclude": list(decision.exclude),
        "attempts": len(attempts),
        "checkpoint": None if saved < 0 else saved,
        "earliest_error": last.first_error or None,
        "stack": main_thread(last.stack),
        "goodput": round(goodput.share, 4),
        "allocated_seconds": round(goodput.allocated, 3),
        "useful_seconds": round(goodput.useful, 3),
        "lost_seconds": {name: round(seconds, 3) for name, seconds in goodput.losses.items()},
        "checkpoint_interval_seconds": round(checkpoint_interval(attempts), 1),
        "history": [_history_entry(attempt) for attempt in attempts],
    }


def next_action(last: Attempt, decision: Decision, saved: int) -> str:
    """Return advice to the user, preceded by the reason if a restart would not help.

    `saved` is the step of the newest checkpoint on the disk.
    """
    if last.cause == RUNNING:
        return "wait for the end, or create a file STOP, SAVE or PAUSE in the run folder"
    if last.cause == "done" and saved < last.last_step:
        return f"run the same command again: the run was rolled back to step {max(saved, 0)}"
    action = CAUSES[last.cause].next_action
    definition = last.definition
    restartable = definition and definition.budget in ("infrastructure", "code", "preemption")
    if restartable and not decision.restart:
        return f"do not restart: {decision.reason}; {action}"
    return action


def _history_entry(attempt: Attempt) -> dict[str, Any]:
    return {
        "launch": attempt.launch, "cause": attempt.cause, "rank": attempt.rank,
        "host": attempt.host, "started": attempt.started,
        "seconds": round(attempt.elapsed, 3), "first_step": attempt.first_step,
        "last_step": attempt.last_step, "checkpoint_before": attempt.checkpoint_before,
        "checkpoint": attempt.checkpoint,
    }  # fmt: skip


def format_summary(summary: dict[str, Any]) -> str:
    """Return the figures of `summarize` as text."""
    # How the last attempt ended, and where.
    name = summary["cause"]
    cause = CAUSES[name].summary if name in CAUSES else "training"
    lines = [f"{summary['run']}: {name}: {cause}"]
    section, step = summary["section"], summary["step"]
    if summary["rank"] is not None:
        rank = f"rank {summary['rank']} on host {summary['host']}"
        lines.append(f"  {rank}, section {section}, step {step}")
    else:
        lines.append(f"  {'' if name == 'done' else f'section {section}, '}step {step}")
    lines += [f"  {summary['detail']}"] if summary["detail"] else []
    # The first exception may be of another rank than the root cause.
    error = summary["earliest_error"]
    if error and not (summary["detail"] and error.endswith(summary["detail"])):
        lines.append(f"  first exception: {error}")
    lines += [f"    {frame}" for frame in summary["stack"][:FRAMES]]
    if summary["exit_code"] is not None:
        lines.append(f"  exit code: {summary['exit_code']}")
    # What to do next, and from which checkpoint training would resume.
    lines.append(f"  next: {summary['next_action']}")
    restart = "yes" if summary["requeue"] else "no"
    lines.append(f"  restart: {restart} ({summary['decision']})")
    if summary["exclude"]:
        lines.append(f"  hosts to exclude: {', '.join(summary['exclude'])}")
    saved = "none" if summary["checkpoint"] is None else f"step {summary['checkpoint']}"
    lines.append(f"  newest checkpoint: {saved}")
    # All attempts, and how much of their time was useful.
    return "\n".join([*lines, "", *_history(summary["history"]), "", *_goodput_lines(summary)])


def _history(entries: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["  attempt  started (UTC)     seconds  steps       checkpoint  cause"]
    for number, entry in enumerate(entries, 1):
        started = time.strftime("%Y-%m-%d %H:%M", time.gmtime(entry["started"]))
        steps = f"{max(entry['first_step'], 0)}-{entry['last_step']}"
        saved = entry["checkpoint"] if entry["checkpoint"] > entry["checkpoint_before"] else "-"
        rank = f", rank {entry['rank']} on host {entry['host']}" if entry["rank"] >= 0 else ""
        lines.append(
            f"  {number:>7}  {started}  {entry['seconds']:>7.0f}  {steps:<10}  {saved!s:>10}  "
            f"{entry['cause']}{rank}"
        )
    return lines


def _goodput_lines(summary: dict[str, Any]) -> list[str]:
    losses = [
        f"{LOSSES[name]} {seconds:.0f} s"
        for name, seconds in summary["lost_seconds"].items()
        if seconds >= 0.5
    ]
    return [
        f"  goodput: {summary['goodput']:.1%} of {summary['allocated_seconds']:.0f} s; the rest: "
        f"{', '.join(losses) or 'nothing'}",
        f"  recommended checkpoint interval: {summary['checkpoint_interval_seconds']:.0f} s",
    ]


# -- goodput --------------------------------------------------------------------------------------


class Goodput(NamedTuple):
    """Useful, allocated and lost seconds of the first rank, which represents all ranks."""

    useful: float
    allocated: float
    losses: dict[str, float]  # by key of LOSSES; with `useful` they sum to `allocated`

    @property
    def share(self) -> float:
        """Useful share of the allocated time; 0 if nothing was allocated."""
        return self.useful / self.allocated if self.allocated else 0.0


def measure_goodput(attempts: Sequence[Attempt]) -> Goodput:
    """Measure goodput over all attempts, the oldest first.

    Steps that no later attempt repeated are useful.  After a hang, the first rank's time in its
    last section counts as lost: that rank hung, or waited for the rank that hung.
    """
    useful, allocated = 0.0, 0.0
    losses = dict.fromkeys(LOSSES, 0.0)
    for index, attempt in enumerate(attempts):
        seconds = dict(attempt.seconds)
        # Count the time of the hang as lost, not as time of its section.
        hang = 0.0
        if attempt.cause in ("hang", "stopped_process"):
            hang = min(attempt.last_stay, seconds.get(attempt.last_section, 0.0))
            seconds[attempt.last_section] = seconds.get(attempt.last_section, 0.0) - hang
        # Steps that a later attempt repeated were lost, in proportion.
        steps = sum(seconds.get(name, 0.0) for name in STEP_SECTIONS)
        rework = steps * lost_share(attempt, attempts[index + 1 :])
        for name in ("init", "data_wait", "eval", "save", "pause"):
            losses[name] += seconds.get(name, 0.0)
        losses["waiting"] += attempt.waited
        losses["rework"] += rework
        losses["hang"] += hang
        # The remaining time of the attempt was needed to start and end processes.
        known = sum(seconds.values()) - seconds.get("teardown", 0.0) + hang + attempt.waited
        losses["other"] += max(attempt.elapsed - known, 0.0)
        useful += steps - rework
        allocated += max(attempt.elapsed, known)
    return Goodput(useful, allocated, losses)


def lost_share(attempt: Attempt, later: Sequence[Attempt]) -> float:
    """Return the share of an attempt's steps that the next attempt had to repeat."""
    first = attempt.first_step if attempt.first_step >= 0 else 0
    done = attempt.last_step - first
    if done <= 0:
        return 0.0
    # The next attempt that trained shows where training resumed; without one, the checkpoint does.
    following = next((a for a in later if a.first_step >= 0), None)
    if following is not None:
        kept = following.first_step
    elif attempt.cause == "done" or attempt.definition is None:
        return 0.0
    else:
        kept = max(attempt.checkpoint, 0)
    return min(max(attempt.last_step - kept, 0), done) / done


def checkpoint_interval(attempts: Sequence[Attempt]) -> float:
    """Return the interval between checkpoints that loses the least time, in seconds.

    Young's formula: sqrt(2 x save time x mean time between failures), with a prior of one failure a
    day, within bounds.
    """
    # The prior keeps one early failure from asking for very frequent checkpoints.
    save = max((a.save_seconds for a in attempts), default=0.0)
    failures = sum(1 for a in attempts if a.definition and a.definition.budget == "infrastructure")
    allocated = sum(a.elapsed for a in attempts)
    between = (allocated + PRIOR_SECONDS) / (failures + 1)
    return min(max(math.sqrt(2 * save * between), MIN_INTERVAL), MAX_INTERVAL)
