"""Jobs of one function each in Slurm: submitted by submitit as an array, watched through squeue."""

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from echolab.errors import ConfigError

# What submitit names without its cluster in front.
GENERAL = (
    "timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name",
    "stderr_to_stdout",
)  # fmt: skip
# Since Slurm 22.05 srun does not take over --cpus-per-task of its job: each task would get one CPU.
CPUS_FOR_SRUN = (
    '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"'
)
# submitit starts `python -m`: without this a module of the working folder would be executed.
NO_WORKING_FOLDER = "export PYTHONSAFEPATH=1"
SQUEUE_SECONDS = 60.0  # until an answer of Slurm is given up


class Resumable:
    """A function that submitit calls again, with the same words, when its job is queued again."""

    def __init__(self, function: Callable[[list[str]], None]) -> None:
        self.function = function

    def __call__(self, words: list[str]) -> None:
        """Call the function."""
        self.function(words)

    def checkpoint(self, words: list[str]) -> Any:
        """Return what the next attempt of the job does."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, words)


def submit(
    function: Callable[[list[str]], None],
    arguments: Sequence[list[str]],
    parameters: Mapping[str, Any],
) -> list[str]:
    """Queue a job for each of the arguments, with the settings of hydra.launcher; return their ids.

    Raises ConfigError if there is no Slurm here, or if it refuses the job.
    """
    import submitit
    from submitit.core.utils import FailedJobError

    settings = {key: value for key, value in parameters.items() if value is not None}
    folder, timeouts = settings.pop("submitit_folder"), settings.pop("max_num_timeout", 0)
    settings["setup"] = [CPUS_FOR_SRUN, NO_WORKING_FOLDER, *settings.get("setup", ())]
    named = {key if key in GENERAL else f"slurm_{key}": value for key, value in settings.items()}
    try:
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=timeouts)
        executor.update_parameters(**named)
        jobs = executor.map_array(Resumable(function), list(arguments))
    except (FailedJobError, RuntimeError, ValueError, TypeError, NameError) as error:
        words = " ".join(str(error).split())
        raise ConfigError(
            f"launcher=slurm: {words}; start the sweep where sbatch works, and see hydra.launcher "
            "in conf/launcher/slurm.yaml"
        ) from error
    return [job.job_id for job in jobs]


def states(jobs: Sequence[str]) -> dict[str, str] | None:
    """Return the states of those jobs that wait or run, by id; None if Slurm does not answer."""
    if not jobs:
        return {}
    try:
        answer = subprocess.run(
            ["squeue", "--noheader", "--array", "--format=%i %T", f"--jobs={','.join(jobs)}"],
            capture_output=True, text=True, timeout=SQUEUE_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return None
    found = dict(line.split(maxsplit=1) for line in answer.stdout.splitlines() if line.strip())
    return {job: state for job, state in found.items() if job in jobs}


def stop(jobs: Mapping[str, str], before: Set[str]) -> set[str]:
    """Cancel the jobs that wait, and send SIGTERM to the tasks of the others, which are returned.

    `jobs` has states; those in `before` got their signal already.  Slurm kills none of them: they
    have the time that a save takes.
    """
    waiting = [job for job, state in jobs.items() if state == "PENDING"]
    at_work = [job for job in jobs if job not in waiting and job not in before]
    for options, chosen in ((["--state=PENDING"], waiting), (["--signal=TERM"], at_work)):
        if chosen:
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    ["scancel", "--quiet", *options, *chosen], timeout=SQUEUE_SECONDS, check=False
                )
    return set(at_work)


def log_of(folder: str, job: str) -> Path:
    """Return where a job's first task writes its stderr; `folder` is submitit's, with %j."""
    from submitit.core.utils import JobPaths

    return JobPaths(folder, job_id=job).stderr


def queue_again() -> None:
    """Have submitit put the job of this process back into the queue; return if it does not."""
    signal.raise_signal(signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"])
