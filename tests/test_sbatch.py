"""slurm/train.sbatch without a cluster: its call of `echolab why`, and when it requeues the job."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from echolab.launch.diagnosis import Observation
from echolab.launch.launch_records import NodeRecord

SCRIPT = Path(__file__).parents[1] / "slurm/train.sbatch"
ECHOLAB = Path(sys.executable).parent / "echolab"
COMMANDS = {
    "srun": 'printf "%s\\n" "$@" >"$SRUN_WORDS"; exit "$SRUN_CODE"',
    "squeue": "echo RUNNING",
    "scontrol": 'echo "$*" >>"$CALLS"; [[ $* != *"show job"* ]] || echo "$SHOWN"',
    "sleep": ":",
}


class Job:
    """A job whose batch script runs here, with stubs of Slurm's commands."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        commands = folder / "commands"
        commands.mkdir()
        for name, does in COMMANDS.items():
            write_command(commands / name, does)
        self.env = {
            "PATH": f"{commands}:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/"),
            "CALLS": str(self.calls), "SRUN_WORDS": str(folder / "srun"), "SHOWN": "",
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1",
        }  # fmt: skip

    def run(
        self, code: int, *words: str, script: Path = SCRIPT, **env: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run the script; the ranks end with `code`."""
        return subprocess.run(
            ["bash", script, *words], env={**self.env, "SRUN_CODE": str(code), **env},
            cwd=self.folder, timeout=600, capture_output=True, text=True,
        )  # fmt: skip

    def ranks(self) -> list[str]:
        """Return the words of srun."""
        return (self.folder / "srun").read_text().splitlines()


def write_command(path: Path, does: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{does}\n")
    path.chmod(0o755)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def write_attempt(run: Path, cause: str, launch: str = "slurm-7-0-0", **changes: object) -> None:
    seen = Observation(0, "n1", "forward", 7, 40, 1.0, exit_code=-9, ended_at=9.0)
    folder = run / "attempts" / launch
    folder.mkdir(parents=True)
    record = NodeRecord(launch, 0, 1, "n1", 1, [0], 1, "", 1.0, ended=2.0, rank=0)
    record.cause, record.exit_code = cause, 77
    record.observations = [seen] if cause == "killed" else []
    record.__dict__.update(changes)
    record.write(folder)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("runs/sft", ["experiment=sft"]),  # which names it
        ("runs/mine", ["experiment=sft", "run_dir=runs/mine"]),
        ("runs/train", []),
    ],
)
def test_the_job_gets_the_verdict_on_the_run_of_its_settings(
    job: Job, run: str, words: list[str]
) -> None:
    write_attempt(job.folder / run, "killed")
    done = job.run(137, *words, ECHOLAB=str(ECHOLAB))
    assert done.returncode == 77 and "requeue 7" in job.calls.read_text()


@pytest.mark.parametrize(("code", "again"), [(75, True), (76, True), (77, False), (1, False)])
def test_without_a_verdict_a_stopped_job_is_requeued(job: Job, code: int, again: bool) -> None:
    done = job.run(code, "experiment=sft", ECHOLAB=str(ECHOLAB))
    assert done.returncode == code and ("requeue 7" in job.calls.read_text()) is again


def test_a_job_waits_in_the_queue_while_another_trains_the_run(job: Job) -> None:
    write_attempt(job.folder / "runs/sft", "", launch="slurm-5-0-0", ended=None, host="elsewhere")
    done = job.run(77, "experiment=sft", ECHOLAB=str(ECHOLAB))
    assert done.returncode == 77 and "job 5 is using runs/sft" in done.stdout
    calls = job.calls.read_text()
    assert "requeue 7" in calls and "update JobId=7 Dependency=afterany:5" in calls


@pytest.mark.parametrize("signaled", [False, True])
def test_a_signal_to_the_job_is_distinguished_from_a_failed_step(job: Job, signaled: bool) -> None:
    """Neither records an end: only the second is a failure."""
    write_attempt(job.folder / "runs/sft", "", ended=None, stop_signal=0)
    write_command(job.folder / "commands/sinfo", "echo n1 mixed")
    signal = "kill -TERM $PPID; " if signaled else ""
    write_command(job.folder / "commands/srun", f"{signal}exit 137")
    done = job.run(137, "experiment=sft", ECHOLAB=str(ECHOLAB))
    stopped = "preempted_unsaved: preemptions are not counted"
    cause = stopped if signaled else "node_lost: infrastructure"
    assert cause in done.stdout and done.returncode == (76 if signaled else 77)


# -- which echolab --------------------------------------------------------------------------------


def checkout(folder: Path, name: str) -> Path:
    """Make a folder with this script, and a command that prints which one it is."""
    made = folder / name
    (made / "slurm").mkdir(parents=True)
    shutil.copy(SCRIPT, made / "slurm")
    (made / ".venv/bin").mkdir(parents=True)
    write_command(made / ".venv/bin/echolab", f"echo '{name}'")
    return made / "slurm/train.sbatch"


def spooled(folder: Path) -> Path:
    """Make the copy of the script that Slurm makes."""
    (folder / "spool/job00007").mkdir(parents=True)
    return Path(shutil.copy(SCRIPT, folder / "spool/job00007/slurm_script"))


@pytest.mark.parametrize("name", ["checkout", "a check out"])
@pytest.mark.parametrize("words", [[], ["experiment=sft", "run_dir=my runs/a"]])
def test_the_job_runs_echolab_of_the_checkout_it_was_submitted_from(
    job: Job, name: str, words: list[str]
) -> None:
    """Slurm runs a copy of the script, and no environment was exported."""
    script = checkout(job.folder, name)
    shown = f"JobId=7 JobName=a Command={' '.join([str(script), *words])} WorkDir=/x StdErr=/y"
    done = job.run(0, *words, script=spooled(job.folder), SHOWN=shown)
    assert done.returncode == 0, done.stderr
    ranks = job.ranks()
    assert ranks[ranks.index("train") - 1] == str(script.parents[1] / ".venv/bin/echolab")
    assert ranks[-1 - len(words) : -1] == words


def test_otherwise_echolab_is_taken_from_the_submission_folder_or_the_path(job: Job) -> None:
    here, script = checkout(job.folder, "here").parents[1], spooled(job.folder)
    answer = f"JobId=7 Command={job.folder}/copied.sbatch WorkDir={here}"
    job.run(0, script=script, SHOWN=answer, SLURM_SUBMIT_DIR=str(here))
    assert str(here / ".venv/bin/echolab") in job.ranks()
    write_command(job.folder / "commands/echolab", "true")
    job.run(0, script=script, SHOWN=answer, SLURM_SUBMIT_DIR="/")
    assert "echolab" in job.ranks()


def test_a_missing_echolab_is_a_one_line_error_before_the_ranks(job: Job) -> None:
    done = job.run(0, script=spooled(job.folder), SLURM_SUBMIT_DIR="/")
    assert done.returncode == 1 and not (job.folder / "srun").exists()
    assert done.stderr.count("\n") == 1
    assert "no echolab" in done.stderr and "ECHOLAB=" in done.stderr


@pytest.mark.parametrize("spaces", [False, True])
def test_echolab_may_be_several_words_or_a_path_with_spaces(job: Job, spaces: bool) -> None:
    command = job.folder / "my tools" / "echolab"
    command.parent.mkdir()
    write_command(command, "true")
    given = str(command) if spaces else f"{sys.executable} -P -m echolab.cli"
    job.run(0, ECHOLAB=given)
    ranks = job.ranks()
    words = [given] if spaces else given.split()
    assert ranks[ranks.index("train") - len(words) : ranks.index("train")] == words


@pytest.mark.parametrize("cpus", ["", "4"])
def test_the_cpus_of_a_task_are_passed_on_with_the_environment(job: Job, cpus: str) -> None:
    job.run(0, ECHOLAB="true", **({"SLURM_CPUS_PER_TASK": cpus} if cpus else {}))
    given = [word for word in job.ranks() if word.startswith("--cpus-per-task")]
    assert given == ([f"--cpus-per-task={cpus}"] if cpus else [])
    assert "--export=ALL" in job.ranks()
