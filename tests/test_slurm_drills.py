"""Nodes fail and jobs are stopped on a real cluster, at a step, in a validation and in a save.

After each drill the run resumes in its folder from its last save, its last weights are those of an
undisturbed run, and `echolab why` names the cause and the node. Four drills always run, three at a
time; all run with ECHOLAB_DRILLS=all, some with ECHOLAB_DRILLS=cut-n1-save,...
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import encoded
import pytest
from runs import tensors_of
from slurm_cluster import BATCH, HERE, Cluster, started, wait_for

from echolab.launch.lease import LEASE
from echolab.tracking.metrics import read_metrics
from echolab.training.checkpoints.checkpoint import latest_valid

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STEPS = 60
SETTINGS = (
    *encoded.SETTINGS, encoded.plan(("sft", STEPS)), "batch_size=4", "trainer.strategy=ddp",
    "logger=wandb", "save_every=20", "val_every=15", "data.val_batch_size=2",
)  # fmt: skip
# Preemption as Slurm does it by itself: TERM, and KILL when the partition's grace is over.
CONF = "SlurmctldParameters=idle_on_node_suspend\n"
SLOW = {
    "PYTHONPATH": str(HERE / "drilled"), "ECHOLAB_DRILL_EVAL": "0.4", "ECHOLAB_DRILL_SAVE": "0.3"
}  # fmt: skip
# Run on a node, which has the heartbeats: wait until rank 0 is in a section, after some steps.
WAITS = """
import sys, time
from pathlib import Path
from echolab.heartbeat import read_heartbeat
wanted, least = sys.argv[1].split(","), int(sys.argv[2])
end = time.monotonic() + 400
while time.monotonic() < end:
    paths = Path("/dev/shm").glob("echolab-rank-*/rank-0.heartbeat")
    states = [read_heartbeat(path) for path in paths]
    if any(state and state.section in wanted and state.step >= least for state in states):
        sys.exit()
    time.sleep(0.002)
sys.exit("never")
"""
SHARED = ("preempted", "preempted_unsaved")  # of all nodes: whether there was time does not matter


class Drill(NamedTuple):
    """A disturbance and its moment."""

    how: str
    moment: str

    def __str__(self) -> str:
        return f"{self.how}-{self.moment}"


class Outcome(NamedTuple):
    """Result of a drill."""

    verdict: dict[str, Any]  # by `echolab why`
    weights: dict[str, bytes]
    rows: list[dict[str, Any]]
    jobs: list[str]  # what Slurm says of them
    changed: dict[str, str]  # last lines of files that were written once the run was done
    log: str


def scancel(cluster: Cluster, job: str) -> None:
    cluster("exec", "scancel", job)


def term(cluster: Cluster, job: str) -> None:
    cluster("exec", "scancel", "--signal=TERM", job)


def requeue(cluster: Cluster, job: str) -> None:
    cluster("exec", "scontrol", "requeue", job)


def preempt(cluster: Cluster, job: str) -> None:
    urgent = ["--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null"]
    cluster("exec", "sbatch", *urgent, "--wrap=sleep 3")


def slurmd(cluster: Cluster, job: str) -> None:
    """Stop the daemon of a node alone: all other processes continue."""
    pid = cluster.folder / "run/slurmd-n2.daemon"
    cluster("on", "n2", "bash", "-c", f"kill -KILL $(cat {pid})")


def cut(node: str) -> Callable[[Cluster, str], None]:
    return lambda cluster, job: cluster("cut", node) and None


class How(NamedTuple):
    act: Callable[[Cluster, str], None]
    causes: tuple[str, ...]
    host: str | None  # which is to blame, if one is


HOW = {
    "scancel": How(scancel, SHARED, None),
    "term": How(term, ("preempted",), None),
    "requeue": How(requeue, SHARED, None),
    "preempt": How(preempt, SHARED, None),
    "slurmd": How(slurmd, ("node_lost",), "n2"),
    "cut-n2": How(cut("n2"), ("node_lost",), "n2"),
    "cut-n1": How(cut("n1"), ("node_lost",), "n1"),  # with rank 0 and the job's script
}
ANOTHER = Drill("another-job", "step")
ALL = [Drill(how, moment) for how in HOW for moment in ("step", "validation", "save")]
USUAL = ("requeue-validation", "preempt-save", "cut-n2-step", "cut-n1-save")


def chosen() -> list[Drill]:
    asked = os.environ.get("ECHOLAB_DRILLS", ",".join(USUAL))
    return [drill for drill in ALL if asked == "all" or str(drill) in asked.split(",")]


def submit(cluster: Cluster, folder: Path, clips: Path, log: Path) -> str:
    words = [*SETTINGS, f"data.clips={clips}", f"run_dir={folder / 'run'}"]
    words += [f"data.val_clips={clips}", "data.val_overlaps=accept"]
    options = ["--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={log}"]
    return cluster("exec", "sbatch", *options, BATCH, *words, cwd=folder).strip()


def wait_for_moment(cluster: Cluster, moment: str, run: Path, log: Path) -> None:
    if moment == "save":  # the save of step 40: an earlier one is complete
        pattern = "checkpoints/.partial-*-step-000040/*.safetensors"
        wait_for(lambda: bool(list(run.glob(pattern))), 400, log)
        return
    sections = "eval" if moment == "validation" else "forward,backward,optimizer,vote"
    least = "30" if moment == "validation" else "34"
    cluster("on", "n1", sys.executable, "-c", WAITS, sections, least, timeout=450)


def contents(run: Path) -> dict[str, tuple[int, int]]:
    """Return the modification time and the size of every file."""
    paths = (path for path in run.rglob("*") if path.is_file() and LEASE not in path.parts)
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def outcome_of(drill: Drill | None, folder: Path, clips: Path) -> Outcome:
    """Run a drill on its own cluster; None is a run without disturbance."""
    folder.mkdir()
    run, log, conf = folder / "run", folder / "log", folder / "slurm.conf"
    conf.write_text(CONF)
    # A dead daemon is noticed late: its job must not be done before.
    step = "1" if drill and drill.how == "slurmd" else "0"
    settings = {**SLOW, "ECHOLAB_DRILL_STEP": step, "ECHOLAB_SLURM_EXTRA_CONF": str(conf)}
    # Most clusters have Slurm's accounting, which says NODE_FAIL; none is needed.
    accounts = bool(drill) and drill.how.startswith("cut")
    with started(3, **settings, ECHOLAB_SLURM_ACCOUNTING=str(int(accounts))) as cluster:
        jobs = [submit(cluster, folder, clips, log)]
        if drill:
            wait_for_moment(cluster, drill.moment, run, log)
            if drill != ANOTHER:
                HOW[drill.how].act(cluster, jobs[0])
        if drill and drill.how == "scancel":
            wait_for(lambda: "JobState=CANCELLED" in cluster.job(jobs[0]), 60, log)
        if drill and drill.how in ("scancel", "another-job"):
            jobs.append(submit(cluster, folder, clips, log))
        wait_for(lambda: "JobState=COMPLETED" in cluster.job(jobs[-1]), 500, log)
        before = contents(run)
        if drill and drill.how.startswith("cut"):
            cluster("heal", HOW[drill.how].host or "")
            time.sleep(5)
        verdict = cluster("exec", cluster.environment["ECHOLAB"], "why", run, "format=json")
        after, said = contents(run), [cluster.job(job) for job in jobs]
    newest, rejected = latest_valid(run / "checkpoints")
    assert newest and newest.step == STEPS and not rejected
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]
    names = [name for name in before | after if before.get(name) != after.get(name)]
    changed = {
        name: Path(name).read_text(errors="replace")[-2000:] for name in names if name in after
    }
    return Outcome(
        json.loads(verdict), tensors_of(newest.path), rows, said, changed, log.read_text()
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Outcome]]]:
    """Run three drills at a time: most of a drill is waiting for Slurm."""
    root = tmp_path_factory.mktemp("drills")
    clips = encoded.write(root / "encoded")[0]
    with ThreadPoolExecutor(3) as pool:
        begun = {
            str(drill): pool.submit(outcome_of, drill, root / str(drill), clips)
            for drill in [None, *chosen(), ANOTHER]
        }
        yield begun
        for future in begun.values():
            future.cancel()


@pytest.mark.parametrize("drill", chosen(), ids=str)
def test_a_disturbed_run_equals_an_undisturbed_run(
    drill: Drill, outcomes: dict[str, Future[Outcome]]
) -> None:
    undisturbed = outcomes["None"].result()
    outcome, how = outcomes[str(drill)].result(), HOW[drill.how]
    verdict, (first, *later) = outcome.verdict, outcome.verdict["history"]
    print(f"{drill}: {len(later) + 1} attempts; {first['cause']} {verdict['host']}", first)
    assert verdict["cause"] == "done" and later[-1]["last_step"] == STEPS
    assert len(later) == 1, outcome.log
    assert first["cause"] in how.causes, outcome.log
    assert how.host in (None, first["host"])
    assert not verdict["exclude"]
    # The run resumes at the very step if there was time to save, else from its last checkpoint.
    assert later[0]["first_step"] == first["checkpoint"] >= 20
    if first["cause"] == "preempted":
        assert first["checkpoint"] >= first["last_step"]
    assert [row["step"] for row in outcome.rows] == list(range(1, STEPS + 1))
    assert [row["train/loss"] for row in outcome.rows] == [
        row["train/loss"] for row in undisturbed.rows
    ]
    assert outcome.weights == undisturbed.weights
    assert not outcome.changed  # a node that was cut off writes nothing into a run that is done


def test_another_job_of_the_run_waits_for_the_first(outcomes: dict[str, Future[Outcome]]) -> None:
    """The run is submitted twice by mistake: the second job is refused, requeued, and ends when
    all is done.
    """
    undisturbed, outcome = outcomes["None"].result(), outcomes[str(ANOTHER)].result()
    first, *later = outcome.verdict["history"]
    assert first["cause"] == "done" and first["last_step"] == STEPS, outcome.log
    assert [row["cause"] for row in later] == ["done"] and later[0]["first_step"] in (-1, STEPS)
    assert outcome.verdict["cause"] == "done" and outcome.weights == undisturbed.weights
    assert "Restarts=0" in outcome.jobs[0] and "Restarts=1" in outcome.jobs[1]
    assert all("JobState=COMPLETED" in said for said in outcome.jobs)
    assert "job 1 is using" in outcome.log and "Dependency=afterany:1" in outcome.log
