"""Why a run is as it is, from all its attempts: figures for programs, words for people."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echolab.launch.attempts import RUNNING, Attempt
from echolab.launch.diagnosis import main_thread
from echolab.launch.exit_codes import CAUSES
from echolab.launch.goodput import account, checkpoint_interval
from echolab.launch.launch_records import newest_checkpoint
from echolab.launch.restart_policy import Decision, decide

FRAMES = 8  # of the stack, in words


def figures(run: Path, attempts: Sequence[Attempt], infrastructure: int) -> dict[str, Any]:
    """Of the last attempt, and of all; JSON."""
    last, decision = attempts[-1], decide(attempts, infrastructure)
    goodput = account(attempts)
    # What is on the disk now, whatever was told of it then.
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
        "requeue": decision.go_on,
        "decision": decision.why,
        "exclude": list(decision.exclude),
        "attempts": len(attempts),
        "checkpoint": None if saved < 0 else saved,
        "earliest_error": last.earliest or None,
        "stack": main_thread(last.stack),
        "goodput": round(goodput.share, 4),
        "allocated_seconds": round(goodput.allocated, 3),
        "useful_seconds": round(goodput.useful, 3),
        "lost_seconds": {name: round(seconds, 3) for name, seconds in goodput.losses.items()},
        "checkpoint_interval_seconds": round(checkpoint_interval(attempts), 1),
        "history": [_row(attempt) for attempt in attempts],
    }


def next_action(last: Attempt, decision: Decision, saved: int) -> str:
    """What to do; where starting again would be in vain, that first.

    `saved` is the step of the newest checkpoint now.
    """
    if last.cause == RUNNING:
        return "wait; STOP, SAVE or PAUSE in its folder steer it"
    if last.cause == "done" and saved < last.last_step:
        return f"run the same command again: it is back at its checkpoint of step {max(saved, 0)}"
    says = CAUSES[last.cause].next_action
    idle = last.why and last.why.budget in ("infrastructure", "code", "preemption")
    if idle and not decision.go_on:
        return f"stop: {decision.why}; {says}"
    return says


def _row(attempt: Attempt) -> dict[str, Any]:
    return {
        "launch": attempt.launch, "cause": attempt.cause, "rank": attempt.rank,
        "host": attempt.host, "started": attempt.started,
        "seconds": round(attempt.elapsed, 3), "first_step": attempt.first_step,
        "last_step": attempt.last_step, "checkpoint_before": attempt.checkpoint_before,
        "checkpoint": attempt.checkpoint,
    }  # fmt: skip


def words(told: dict[str, Any]) -> str:
    """The figures, for people."""
    cause = CAUSES[told["cause"]].says if told["cause"] in CAUSES else "at work"
    lines = [f"{told['run']}: {told['cause']}: {cause}"]
    if told["rank"] is not None:
        lines.append(
            f"  rank {told['rank']} on {told['host']}, in {told['section']} at step {told['step']}"
        )
    else:
        where = "" if told["cause"] == "done" else f"in {told['section']} "
        lines.append(f"  {where}at step {told['step']}")
    lines += [f"  {told['detail']}"] if told["detail"] else []
    lines += [f"  first error: {told['earliest_error']}"] if told["earliest_error"] else []
    lines += [f"    {frame}" for frame in told["stack"][:FRAMES]]
    if told["exit_code"] is not None:
        lines.append(f"  exit code {told['exit_code']}; next: {told['next_action']}")
    else:
        lines.append(f"  next: {told['next_action']}")
    saved = "none" if told["checkpoint"] is None else f"step {told['checkpoint']}"
    lines.append(f"  newest checkpoint: {saved}; again: {told['requeue']} ({told['decision']})")
    if told["exclude"]:
        lines.append(f"  hosts to leave out: {', '.join(told['exclude'])}")
    return "\n".join([*lines, "", *_history(told["history"]), "", *_goodput(told)])


def _history(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["  attempt  began (UTC)       seconds  steps       saved  ended by"]
    for number, row in enumerate(rows, 1):
        began = time.strftime("%Y-%m-%d %H:%M", time.gmtime(row["started"]))
        steps = f"{max(row['first_step'], 0)}-{row['last_step']}"
        made = row["checkpoint"] if row["checkpoint"] > row["checkpoint_before"] else "-"
        where = f", rank {row['rank']} on {row['host']}" if row["rank"] >= 0 else ""
        lines.append(
            f"  {number:>7}  {began}  {row['seconds']:>7.0f}  {steps:<10}  {made!s:>5}  "
            f"{row['cause']}{where}"
        )
    return lines


def _goodput(told: dict[str, Any]) -> list[str]:
    losses = ", ".join(f"{name} {s:.0f} s" for name, s in told["lost_seconds"].items() if s >= 0.5)
    return [
        f"  goodput {told['goodput']:.1%} of {told['allocated_seconds']:.0f} s; lost: "
        f"{losses or 'nothing'}",
        "  a checkpoint every "
        f"{told['checkpoint_interval_seconds']:.0f} s would lose least to failures and saves",
    ]
