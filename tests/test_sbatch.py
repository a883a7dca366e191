"""slurm/train.sbatch without a cluster: what it asks `echolab why`, and when it queues again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from echolab.launch.blame import Observation
from echolab.launch.records import NodeRecord

SCRIPT = Path(__file__).parents[1] / "slurm/train.sbatch"
COMMANDS = {
    "srun": 'exit "$SRUN_CODE"',
    "squeue": "echo RUNNING",
    "scontrol": 'echo "$*" >>"$CALLS"',
    "sleep": ":",
}


def submit(folder: Path, code: int, *words: str) -> tuple[int, list[str]]:
    """The script's exit code and its calls of scontrol; the ranks end with `code`."""
    commands = folder / "commands"
    commands.mkdir()
    for name, does in COMMANDS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (commands / name).chmod(0o755)
    calls = folder / "calls"
    env = {
        **os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "CALLS": str(calls),
        "SRUN_CODE": str(code), "ECHOLAB": str(Path(sys.executable).parent / "echolab"),
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1",
    }  # fmt: skip
    done = subprocess.run(["bash", SCRIPT, *words], env=env, cwd=folder, timeout=600)
    return done.returncode, calls.read_text().splitlines()


def write_attempt(run: Path, cause: str) -> None:
    seen = Observation(0, "n1", "forward", 7, 40, 1.0, exit=-9, died=9.0)
    folder = run / "attempts/slurm-7-0-0"
    folder.mkdir(parents=True)
    record = NodeRecord("slurm-7-0-0", 0, 1, "n1", 1, [0], 1, "", 1.0, ended=2.0, rank=0)
    record.cause, record.exit_code = cause, 77
    record.observations = [seen] if cause == "killed" else []
    record.write(folder)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("runs/sft", ["experiment=sft"]),  # which names it
        ("runs/mine", ["experiment=sft", "run=runs/mine"]),
        ("runs/train", []),
    ],
)
def test_the_verdict_is_that_of_the_composed_run(
    tmp_path: Path, run: str, words: list[str]
) -> None:
    write_attempt(tmp_path / run, "killed")
    code, calls = submit(tmp_path, 137, *words)
    assert code == 77 and "requeue 7" in calls


@pytest.mark.parametrize(("code", "again"), [(75, True), (76, True), (77, False), (1, False)])
def test_without_a_verdict_those_that_were_stopped_are_queued_again(
    tmp_path: Path, code: int, again: bool
) -> None:
    ended, calls = submit(tmp_path, code, "experiment=sft")
    assert ended == code and ("requeue 7" in calls) is again
