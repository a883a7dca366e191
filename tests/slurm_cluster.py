"""A Slurm cluster of namespaces on this machine, as a context manager. Needs root and Slurm."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPT = HERE / "slurm_cluster.sh"
BATCH = HERE.parent / "slurm/train.sbatch"
ECHOLAB = Path(sys.executable).parent / "echolab"
TOOLS = ("slurmctld", "slurmd", "munged", "slurmdbd", "mariadbd", "ip", "unshare")


class Cluster:
    """Calls tests/slurm_cluster.sh: `cluster("exec", "squeue")`."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "ECHOLAB_SLURM_DIR": str(folder),
            # submitit asks sacct whether a member died; without it a sweep may wait for ever
            "ECHOLAB_SLURM_ACCOUNTING": "1",
            "ECHOLAB": str(ECHOLAB),
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
            **environment,
        }

    def __call__(self, *words: str | Path, timeout: float = 300, cwd: Path | None = None) -> str:
        done = subprocess.run(
            ["bash", SCRIPT, *words], env=self.environment, cwd=cwd, timeout=timeout,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def job(self, job: str) -> str:
        """Return what Slurm knows of a job."""
        return self("exec", "scontrol", "show", "job", job)


@contextmanager
def started(nodes: int, **environment: str) -> Iterator[Cluster]:
    """Start a cluster of that many nodes; skip the test if none can be started here."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to make namespaces")
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        pytest.skip(f"no {missing[0]}: ECHOLAB_SLURM_ACCOUNTING=1 {SCRIPT} install")
    folder = Path(tempfile.mkdtemp(prefix="echolab-slurm-"))
    folder.chmod(0o755)  # munge wants its socket where every user may go
    cluster = Cluster(folder, **environment)
    cluster("start", str(nodes))
    try:
        yield cluster
    finally:
        cluster("stop")
        shutil.rmtree(folder)


def wait_for(what: Callable[[], bool], seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while not what():
        output = log.read_text()[-4000:] if log.exists() else "no log"
        assert time.monotonic() < end, f"waited {seconds} s; {output}"
        time.sleep(0.5)
