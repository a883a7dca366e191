"""Slurm: query jobs and nodes with its own commands, submit a job array with submitit."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from echolab.errors import ConfigError

SECONDS = 15.0  # timeout of a query: a busy controller answers late
SQUEUE_SECONDS = 60.0  # timeout of a query about a job array
ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "TIMEOUT",
)  # fmt: skip
# States in which the job will start again, as another launch.
WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
BATCH = "batch"  # step id of a launch that the job script itself started
LAUNCH = re.compile(r"slurm-(\d+)-(\d+)-(\w+)")
NODE_LOST = re.compile(r"down|fail|\*", re.IGNORECASE)  # `*`: the node does not respond

# submitit expects the prefix slurm_ for all parameters except these.
GENERAL = (
    "timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name",
    "stderr_to_stdout",
)  # fmt: skip
# Since Slurm 22.05 srun ignores --cpus-per-task of its job: each task would get one CPU.
CPUS_FOR_SRUN = (
    '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"'
)
# submitit starts `python -m`, which would import modules from the working folder.
NO_WORKING_FOLDER = "export PYTHONSAFEPATH=1"


# -- queries --------------------------------------------------------------------------------------


class Job(NamedTuple):
    """State of a job according to Slurm's controller."""

    state: str  # "UNKNOWN" for a job that Slurm has forgotten
    restarts: int
    exit_code: int = 0  # 0 until the job has ended


def launch_of(env: Mapping[str, str]) -> str:
    """Return the launch id of a job step from the environment of its tasks."""
    job, restart = env.get("SLURM_JOB_ID", "0"), env.get("SLURM_RESTART_COUNT", "0")
    return f"slurm-{job}-{restart}-{env.get('SLURM_STEP_ID', BATCH)}"


def parse_launch(launch: str) -> tuple[str, int, str] | None:
    """Return job, restart and step of a launch id; None if it is not a Slurm launch."""
    match = LAUNCH.fullmatch(launch)
    return (match[1], int(match[2]), match[3]) if match else None


def _query(command: Sequence[str]) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a command; code -1 if it did not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return -1, "", str(error)
    return done.returncode, done.stdout, done.stderr


def job_of(job: str) -> Job | None:
    """Return the state of a job; None if Slurm does not answer."""
    code, output, errors = _query(["scontrol", "--oneliner", "show", "job", job])
    if code and "Invalid job id" in errors:
        return Job("UNKNOWN", 0)
    state = re.search(r"\bJobState=(\w+)", output)
    restarts = re.search(r"\bRestarts=(\d+)", output)
    if code or not state or not restarts:
        return None
    exit_code = re.search(r"\bExitCode=(\d+):", output)
    return Job(state[1], int(restarts[1]), int(exit_code[1]) if exit_code else 0)


def state_of(launch: str) -> Literal["running", "ended", "restarted", "unknown"]:
    """Return the state of a launch; unknown if it is not Slurm's or Slurm does not answer.

    `restarted`: the launch has ended, but its job runs again and will soon start the next launch.
    """
    # Check the job first, then the number of its restarts, then the step.
    parsed = parse_launch(launch)
    job_state = job_of(parsed[0]) if parsed else None
    if parsed is None or job_state is None:
        return "unknown"
    job, restart, step = parsed
    if job_state.state in (*ENDED, *WAITING, "UNKNOWN"):
        return "ended"
    if job_state.restarts != restart:
        return "restarted"
    return "ended" if step != BATCH and _has_step_ended(job, step) else "running"


def _has_step_ended(job: str, step: str) -> bool:
    code, output, errors = _query(["squeue", "--noheader", f"--steps={job}.{step}", "--format=%i"])
    return (code == 0 and not output.strip()) or "Invalid job id" in errors


def lost_nodes(hosts: Iterable[str]) -> tuple[str, ...] | None:
    """Return the hosts that are down or do not respond; None if Slurm does not answer."""
    # One row for each node and partition.
    names = sorted(set(hosts))
    code, output, _ = _query(
        ["sinfo", "--noheader", "--Node", f"--nodes={','.join(names)}", "--format=%N %T"]
    )
    rows = [line.split() for line in output.splitlines() if len(line.split()) == 2]
    if code or not rows:
        return None
    return tuple(sorted({name for name, state in rows if NODE_LOST.search(state)}))


def accounting_state(launch: str) -> str:
    """Return the end state of one start of a job, such as NODE_FAIL; "" if unknown."""
    # Accounting lists one row for each start of a requeued job, in order.
    parsed = parse_launch(launch)
    if parsed is None:
        return ""
    options = ["--duplicates", "--allocations", "--noheader", "--parsable2", "--format=State"]
    code, output, _ = _query(["sacct", f"--jobs={parsed[0]}", *options])
    states = output.split("\n")[:-1]
    return states[parsed[1]].split()[0] if not code and parsed[1] < len(states) else ""


# -- job arrays -----------------------------------------------------------------------------------


class Resumable:
    """A function that submitit calls again with the same arguments when its job is requeued."""

    def __init__(self, function: Callable[[list[str]], None]) -> None:
        self.function = function

    def __call__(self, arguments: list[str]) -> None:
        """Call the function."""
        self.function(arguments)

    def checkpoint(self, arguments: list[str]) -> Any:
        """Return the submission of the job's next attempt."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, arguments)


def submit(
    function: Callable[[list[str]], None],
    arguments: Sequence[list[str]],
    parameters: Mapping[str, Any],
) -> list[str]:
    """Queue a job for each of the arguments, with the settings of hydra.launcher; return job ids.

    Raises ConfigError if there is no Slurm, or if it rejects the job.
    """
    import submitit
    from submitit.core.utils import FailedJobError

    # Translate the settings of Hydra's launcher into parameters of submitit.
    settings = {key: value for key, value in parameters.items() if value is not None}
    folder, timeouts = settings.pop("submitit_folder"), settings.pop("max_num_timeout", 0)
    settings["setup"] = [CPUS_FOR_SRUN, NO_WORKING_FOLDER, *settings.get("setup", ())]
    prefixed = {key if key in GENERAL else f"slurm_{key}": value for key, value in settings.items()}
    try:
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=timeouts)
        executor.update_parameters(**prefixed)
        jobs = executor.map_array(Resumable(function), list(arguments))
    except (FailedJobError, RuntimeError, ValueError, TypeError, NameError) as error:
        message = " ".join(str(error).split())
        raise ConfigError(
            f"launcher=slurm: {message}; start the sweep on a host with sbatch, and see "
            "hydra.launcher in conf/launcher/slurm.yaml"
        ) from error
    return [job.job_id for job in jobs]


def job_states(jobs: Sequence[str]) -> dict[str, str] | None:
    """Return the states of the pending and running jobs, by id; None if Slurm does not answer."""
    if not jobs:
        return {}
    # squeue fails if Slurm has forgotten one of several jobs, but still lists the others.
    try:
        answer = subprocess.run(
            ["squeue", "--noheader", "--array", "--format=%i %T", f"--jobs={','.join(jobs)}"],
            capture_output=True, text=True, timeout=SQUEUE_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return None
    states = dict(line.split(maxsplit=1) for line in answer.stdout.splitlines() if line.strip())
    return {job: state for job, state in states.items() if job in jobs}


def stop_jobs(states: Mapping[str, str], signaled: Set[str]) -> set[str]:
    """Cancel pending jobs and send SIGTERM to the tasks of running jobs; return the latter.

    `states` are by job id; jobs in `signaled` are not signaled again.  Slurm does not kill the
    running jobs, so that they have the time to save a checkpoint.
    """
    pending = [job for job, state in states.items() if state == "PENDING"]
    running = [job for job in states if job not in pending and job not in signaled]
    for options, jobs in ((["--state=PENDING"], pending), (["--signal=TERM"], running)):
        if jobs:
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    ["scancel", "--quiet", *options, *jobs], timeout=SQUEUE_SECONDS, check=False
                )
    return set(running)


def log_path(folder: str, job: str) -> Path:
    """Return the stderr file of a job's first task; `folder` is submitit's, with %j."""
    from submitit.core.utils import JobPaths

    return JobPaths(folder, job_id=job).stderr


def requeue_this_job() -> None:
    """Let submitit requeue the job of this process; return if it does not."""
    signal.raise_signal(signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"])
