"""On a real Slurm cluster: two nodes, made of namespaces on this machine. Needs root and Slurm."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import encoded
import pytest
import runs
from slurm_cluster import BATCH, ECHOLAB, Cluster, started, wait_for

from echolab.launch import exit_codes
from echolab.tracking.metrics import read_metrics
from echolab.training.checkpoints.checkpoint import latest_valid

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with started(2) as made:
        yield made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    clips, _ = encoded.write(tmp_path_factory.mktemp("encoded"))
    return [*encoded.SETTINGS, f"data.clips={clips}"]


def test_two_nodes_with_zero_2_resume_after_a_requeue(
    cluster: Cluster, data: list[str], tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    steps = 60
    settings = [
        *data, encoded.plan(("sft", steps)), f"run_dir={run}", "logger=wandb", "save_every=20",
        "trainer=zero2", "trainer.accelerator=cpu", "trainer.precision=32-true",
    ]  # fmt: skip
    options = ["--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={log}"]
    job = cluster("exec", "sbatch", *options, BATCH, *settings, cwd=tmp_path).strip()
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 5, 120, log)
    cluster("exec", "scancel", "--signal=USR1", job)

    def state() -> str:
        return cluster("exec", "scontrol", "show", "job", job)

    wait_for(lambda: "JobState=COMPLETED" in state(), 240, log)
    assert "Restarts=1" in state() and "NumNodes=2" in state()
    rows = [row for row in read_metrics(metrics) if "train/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert {row["attempt"] for row in rows} == {1, 2}
    # No step was trained twice: the run resumed from the checkpoint of the signal.
    assert metrics.read_text().count('"train/loss"') == steps
    identity = json.loads((run / "run.json").read_text())["id"]
    attempts = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    assert [a["host"] for a in attempts] == ["n1", "n1"]
    offline = sorted((run / "wandb").glob("offline-run-*"))
    assert len(offline) == 2 and all(folder.name.endswith(identity) for folder in offline)
    newest, rejected = latest_valid(run / "checkpoints")
    assert newest and not rejected and newest.step == steps
    assert newest.state["origin"] == {"world": 2, "masters": "PartitionedMasters"}


def test_a_term_to_all_processes_of_the_step_saves_with_wandb_on(
    cluster: Cluster, data: list[str], tmp_path: Path
) -> None:
    """`scancel` reaches the tracker and its service too; the next job resumes from that step."""
    unbroken, run, log = tmp_path / "unbroken", tmp_path / "run", tmp_path / "log"
    settings = [*data, encoded.plan(("sft", 60)), "save_every=1000", "trainer.strategy=ddp"]

    def submit(folder: Path, *words: str) -> str:
        options = ["--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={log}"]
        words = (*settings, f"run_dir={folder}", *words)
        return cluster("exec", "sbatch", *options, BATCH, *words, cwd=tmp_path).strip()

    def state(job: str) -> str:
        return cluster("exec", "scontrol", "show", "job", job)

    job, metrics = submit(run, "logger=wandb"), run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 5, 120, log)
    cluster("exec", "scancel", job)
    # Slurm says CANCELLED as soon as it sends the signal, and may kill a supervisor before it has
    # written how its ranks ended: the verdict follows from the files they left.
    wait_for(lambda: not cluster("exec", "squeue", "--noheader", f"--jobs={job}"), 120, log)
    verdict = json.loads(cluster("exec", str(ECHOLAB), "why", str(run), "format=json", "over=true"))
    assert (verdict["cause"], verdict["exit_code"]) == ("preempted", 75), log.read_text()
    newest, _ = latest_valid(run / "checkpoints")
    assert newest and 5 < newest.step < 60
    jobs = [submit(run, "logger=wandb"), submit(unbroken, "logger=none")]
    wait_for(lambda: all("JobState=COMPLETED" in state(job) for job in jobs), 240, log)
    rows = [row for row in read_metrics(metrics) if "train/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert [row["attempt"] for row in rows].count(1) == newest.step
    last = [folder / "checkpoints/step-000060" for folder in (run, unbroken)]
    assert runs.tensors_of(last[0]) == runs.tensors_of(last[1])


def test_a_rank_killed_on_the_second_node_is_named_and_the_job_continues(
    cluster: Cluster, data: list[str], tmp_path: Path
) -> None:
    """One task a node starts two ranks."""
    run, log = tmp_path / "run", tmp_path / "log"
    steps = 80
    settings = [
        *data, encoded.plan(("sft", steps)), f"run_dir={run}", "save_every=5", "batch_size=4",
        "trainer.strategy=ddp", "trainer.devices=2",
    ]  # fmt: skip
    options = ["--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={log}"]
    job = cluster("exec", "sbatch", *options, BATCH, *settings, cwd=tmp_path).strip()
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 8, 180, log)
    launch = next((run / "attempts").iterdir())
    record = json.loads((launch / "node-1.json").read_text())
    assert (record["host"], record["ranks"], record["num_supervisors"]) == ("n2", [2, 3], 2)
    cluster("on", "n2", "kill", "-KILL", str(record["pids"][1]))
    wait_for(
        lambda: "JobState=COMPLETED" in cluster("exec", "scontrol", "show", "job", job), 300, log
    )
    verdict = cluster("exec", str(ECHOLAB), "why", str(run), "format=json", "over=true")
    last = json.loads(verdict)
    assert (last["cause"], last["attempts"], last["checkpoint"]) == ("done", 2, steps)
    first = last["history"][0]
    assert (first["cause"], first["rank"], first["host"]) == ("killed", 3, "n2")
    assert "infrastructure failure 1 of 3 allowed" in log.read_text()


SCRIPTED = """#!/usr/bin/env bash
# Ranks that fail, and a verdict that blames n2.
case "$*" in
*--cfg*) echo runs/train ;;
why*)
    echo '{"launch": "slurm-'"$SLURM_JOB_ID"'-0-0", "cause": "killed", "exit_code": 77,
        "requeue": true, "decision": "again", "exclude": ["n2"]}'
    ;;
*) exit 77 ;;
esac
"""


def test_failed_hosts_are_excluded_as_well_as_the_users(cluster: Cluster, tmp_path: Path) -> None:
    """With both nodes excluded the job cannot start: it waits, and can be inspected."""
    echolab, log = tmp_path / "echolab", tmp_path / "log"
    echolab.write_text(SCRIPTED)
    echolab.chmod(0o755)
    options = ["--parsable", "--nodes=1", "--exclude=n1", f"--output={log}"]
    job = cluster(
        "exec", "env", f"ECHOLAB={echolab}", "sbatch", *options, BATCH, cwd=tmp_path
    ).strip()

    def state() -> str:
        return cluster("exec", "scontrol", "show", "job", job)

    try:
        wait_for(lambda: "ExcNodeList=n1,n2" in state(), 120, log)
        wait_for(lambda: "JobState=PENDING" in state(), 60, log)
        assert "Restarts=1" in state() and "ExcNodeList=n1,n2" in log.read_text()
    finally:
        cluster("exec", "scancel", job)


def test_a_sweep_requests_gpus_and_cpus_and_survives_failed_members(
    cluster: Cluster, data: list[str], tmp_path: Path
) -> None:
    """The folder may have any name; members that request GPUs, which do not exist here, are
    refused.
    """
    words = [
        *data, encoded.plan(("sft", 3)), f"run_dir={tmp_path / 'a=b #c (d)~ü'}", "launcher=slurm",
        "hydra.launcher.timeout_min=5", "data.num_workers=1", "trainer=gpu,cpu", "seed=1,2",
    ]  # fmt: skip
    script = f'{ECHOLAB} train -m "$@" 2>&1; echo "code $?"'

    def sweep() -> str:
        out = cluster("exec", "bash", "-c", script, "bash", *words, cwd=tmp_path, timeout=600)
        assert out.splitlines()[-1] == f"code {exit_codes.FATAL}", out
        return out

    first = sweep()
    table = [line.split()[:2] for line in first.partition("a sweep of 4:\n")[2].splitlines()[:4]]
    assert [says for _, says in table] == ["done:", "done:", "config:", "config:"]
    numbers = dict(re.findall(r"^echolab: (\S+): job (\S+),", first, re.MULTILINE))
    hosts = set()
    for name, _ in table:
        folder = tmp_path / "a=b #c (d)~ü" / name
        job = cluster("exec", "scontrol", "show", "job", numbers[name])
        assert "CPUs/Task=3" in job and ("gres/gpu=1" in job) == ("trainer-gpu" in name)
        if "trainer-cpu" in name:
            done = cluster("exec", "sacct", "-nPj", numbers[name], "--format=JobID,AllocCPUS")
            assert f"{numbers[name]}.0|3" in done.split()  # of the task, by srun
            assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 3
            assert json.loads((folder / "config.json").read_text())["run_dir"] == str(folder)
            hosts.add(json.loads((folder / "attempts.jsonl").read_text())["SLURM_JOB_ID"])
    assert len(hosts) == 2
    again = sweep()
    assert again.count("not started again") == 2 and again.count(": job ") == 2


def test_a_stopped_sweep_continues_with_its_existing_jobs(
    cluster: Cluster, data: list[str], tmp_path: Path
) -> None:
    """The driver is killed, a member is requeued by Slurm, and SIGTERM comes: all save, nothing
    runs twice.
    """
    words = [
        *data, encoded.plan(("sft", 20000)), f"run_dir={tmp_path / 'sweep'}", "launcher=slurm",
        "hydra.launcher.timeout_min=10",
    ]  # fmt: skip
    script = f"""
        {ECHOLAB} train -m "$@" seed=1,2 >first.log 2>&1 & pid=$!
        until [ "$(ls sweep/*/metrics.jsonl | wc -l)" = 2 ]; do sleep 0.5; done
        kill -KILL $pid
        scontrol requeue "$(cat sweep/seed-1-*/.job)"
        {ECHOLAB} train -m "$@" seed=1,2,3 >second.log 2>&1 & pid=$!
        until [ "$(ls sweep/*/metrics.jsonl | wc -l)" = 3 ] &&
            [ "$(wc -l <"$(ls sweep/seed-1-*/attempts.jsonl)")" = 2 ]; do sleep 0.5; done
        sleep 5
        kill -TERM $pid
        wait $pid
        echo "code $?"
        squeue --noheader
    """
    out = cluster("exec", "bash", "-c", script, "bash", *words, cwd=tmp_path, timeout=600)
    log = (tmp_path / "second.log").read_text()
    assert out.split() == ["code", str(exit_codes.STOPPED_SAVED)], out + log
    assert log.count(": job ") == 1  # of seed=3 alone
    assert log.count("preempted: stopped by a signal, checkpoint saved") == 2 * 3
    for folder in (tmp_path / "sweep").glob("seed-*"):
        newest, rejected = latest_valid(folder / "checkpoints")
        steps = [
            row["step"] for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row
        ]
        assert newest and not rejected and steps == list(range(1, newest.step + 1))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_ranks_have_the_requested_cpus_and_run_their_checkout(tmp_path: Path) -> None:
    """Slurm binds the CPUs; the environment does not name echolab, or is empty."""
    conf, command = tmp_path / "slurm.conf", tmp_path / "my echolab"
    conf.write_text("TaskPlugin=task/affinity\n")
    says = "import os; print('CPUs', len(os.sched_getaffinity(0)))"
    command.write_text(
        f'#!/usr/bin/env bash\n[[ $* != *trainer.num_nodes=* ]] || python3 -c "{says}"\n'
    )
    command.chmod(0o755)
    settings = {"ECHOLAB_SLURM_CPUS": "2", "ECHOLAB_SLURM_EXTRA_CONF": str(conf)}
    with started(1, **settings, ECHOLAB_SLURM_ACCOUNTING="0") as small:

        def submit(number: int, env: list[str], *options: str, cwd: Path = tmp_path) -> str:
            log = tmp_path / f"log-{number}"
            words = ["--parsable", "--cpus-per-task=2", f"--output={log}", *options]
            job = small("exec", "env", *env, "sbatch", *words, cwd=cwd).strip()
            wait_for(lambda: "EndTime=Unknown" not in small.job(job), 120, log)
            wait_for(lambda: "JobState=RUNNING" not in small.job(job), 120, log)
            return log.read_text()

        assert "CPUs 2" in submit(1, [f"ECHOLAB={command}"], str(BATCH))
        bare = ["-u", "ECHOLAB", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
        message = "nonsense=1: there is no such setting"  # it is echolab that says so
        assert message in submit(2, bare, "--export=NONE", str(BATCH), "nonsense=1")
        there = BATCH.parent
        assert message in submit(3, bare, BATCH.name, "run_dir=a b", "nonsense=1", cwd=there)
