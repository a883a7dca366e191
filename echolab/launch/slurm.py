"""What Slurm says of jobs and nodes, by its own commands; nothing where there are none."""

import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

SECONDS = 15.0  # that a command may take: a busy controller answers late
OVER = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "TIMEOUT",
)  # fmt: skip
# It will start again, as another launch.
WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
BATCH = "batch"  # in place of a step's number: started by the job's script itself
LAUNCH = re.compile(r"slurm-(\d+)-(\d+)-(\w+)")
LOST = re.compile(r"down|fail|\*", re.IGNORECASE)  # among the states of a node


class Job(NamedTuple):
    """A job as the controller knows it."""

    state: str  # "UNKNOWN" of one that it has forgotten
    restarts: int


def launch_of(env: Mapping[str, str]) -> str:
    """Return the name of the launch that a step of a job is, by the environment of its tasks."""
    job, restart = env.get("SLURM_JOB_ID", "0"), env.get("SLURM_RESTART_COUNT", "0")
    return f"slurm-{job}-{restart}-{env.get('SLURM_STEP_ID', BATCH)}"


def parsed(launch: str) -> tuple[str, int, str] | None:
    """Return job, restart and step of a launch; None of one that is not Slurm's."""
    match = LAUNCH.fullmatch(launch)
    return (match[1], int(match[2]), match[3]) if match else None


def _ask(command: Sequence[str]) -> tuple[int, str, str]:
    """Return the exit code, what it said and what it complained of; -1 where it did not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return -1, "", str(error)
    return done.returncode, done.stdout, done.stderr


def job_of(job: str) -> Job | None:
    """Return what Slurm knows of a job; None where it does not answer."""
    code, told, fault = _ask(["scontrol", "--oneliner", "show", "job", job])
    if code and "Invalid job id" in fault:
        return Job("UNKNOWN", 0)
    state = re.search(r"\bJobState=(\w+)", told)
    restarts = re.search(r"\bRestarts=(\d+)", told)
    if code or not state or not restarts:
        return None
    return Job(state[1], int(restarts[1]))


def state_of(launch: str) -> Literal["at work", "over", "anew", "unknown"]:
    """Return what Slurm says of a launch; unknown where it is not Slurm's, or has no answer.

    `anew`: it is over, and its job runs again, whose next launch may come at any moment.
    """
    about = parsed(launch)
    seen = job_of(about[0]) if about else None
    if about is None or seen is None:
        return "unknown"
    job, restart, step = about
    if seen.state in OVER or seen.state in WAITING or seen.state == "UNKNOWN":
        return "over"
    if seen.restarts != restart:
        return "anew"
    return "over" if step != BATCH and _step_is_over(job, step) else "at work"


def _step_is_over(job: str, step: str) -> bool:
    code, told, fault = _ask(["squeue", "--noheader", f"--steps={job}.{step}", "--format=%i"])
    return (code == 0 and not told.strip()) or "Invalid job id" in fault


def lost_nodes(hosts: Iterable[str]) -> tuple[str, ...] | None:
    """Return those that are down or do not answer the controller; None where Slurm says nothing."""
    wanted = sorted(set(hosts))
    code, told, _ = _ask(
        ["sinfo", "--noheader", "--Node", f"--nodes={','.join(wanted)}", "--format=%N %T"]
    )
    rows = [line.split() for line in told.splitlines() if len(line.split()) == 2]
    if code or not rows:
        return None
    return tuple(sorted({name for name, state in rows if LOST.search(state)}))


def account_of(launch: str) -> str:
    """Return how a start of a job ended, by Slurm's accounting: NODE_FAIL, say; "" without any."""
    about = parsed(launch)
    if about is None:
        return ""
    words = ["--duplicates", "--allocations", "--noheader", "--parsable2", "--format=State"]
    code, told, _ = _ask(["sacct", f"--jobs={about[0]}", *words])
    states = told.split("\n")[:-1]
    return states[about[1]].split()[0] if not code and about[1] < len(states) else ""
