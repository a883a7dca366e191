"""`echolab why` on records of two nodes, word for word; on active, lost and missing runs."""

import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from echolab.cli.__main__ import main
from echolab.launch.diagnosis import Failure, Observation
from echolab.launch.launch_records import NodeRecord
from echolab.launch.processes import process_identity

WAITS = """Current thread 0x00007f0000000000 (most recent call first):
  File "/site-packages/torch/distributed/distributed_c10d.py", line 2806 in all_reduce
  File "/echolab/training/distributed.py", line 40 in sums
"""
READS = """Thread 0x00007f0000000001 (most recent call first):
  File "/lib/threading.py", line 324 in wait

Current thread 0x00007f0000000000 (most recent call first):
  File "/echolab/data/tars.py", line 31 in read
  File "/echolab/training/datamodule.py", line 60 in __next__
"""


def record(launch: str, node: int, **changes: Any) -> NodeRecord:
    fields: dict[str, Any] = {
        "launch": launch, "supervisor": node, "num_supervisors": 2, "host": f"n{node + 1}",
        "world_size": 4, "ranks": [2 * node, 2 * node + 1], "pid": 1, "identity": "",
        "started": 1_760_000_000.0,
        "ended": 1_760_000_300.0, "first_step": 0, "last_step": 40, "checkpoint": 30,
        "section": "vote", "stay": 60.0, "seconds": {"init": 40.0, "forward": 80.0, "vote": 160.0},
        "longest": {"save": 2.0}, **changes,
    }  # fmt: skip
    return NodeRecord(**fields)


def seen(rank: int, **changes: Any) -> Observation:
    fields: dict[str, Any] = {
        "host": f"n{rank // 2 + 1}", "section": "vote", "step": 40, "switches": 200,
        "stay": 60.0, "timeout": 60.0, "process_state": "S", "stack": WAITS, **changes,
    }  # fmt: skip
    return Observation(rank, **fields)


def write(run: Path, *records: NodeRecord) -> None:
    for one in records:
        folder = run / "attempts" / one.launch
        folder.mkdir(parents=True, exist_ok=True)
        one.write(folder)


def why(run: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["why", str(run), "format=json", *words]) == 0
    verdict: dict[str, Any] = json.loads(capsys.readouterr().out)
    return verdict


HANG = [
    record("slurm-7-0-0", 0, cause="hang", rank=0, observations=[seen(0), seen(1)]),
    record(
        "slurm-7-0-0", 1, cause="hang", rank=3, followed=True,
        observations=[seen(2), seen(3, section="data_wait", step=39, switches=196, stack=READS)],
    ),
]  # fmt: skip
GOLDEN = """\
RUN: hang: no progress within the timeout
  rank 3 on host n2, section data_wait, step 39
  blocked, in data_wait for 60 s
    File "/echolab/data/tars.py", line 31 in read
    File "/echolab/training/datamodule.py", line 60 in __next__
  exit code: 77
  next: read the stack trace of that rank; run the same command again
  restart: yes (infrastructure failure 1 of 3 allowed)
  newest checkpoint: step 30

  attempt  started (UTC)     seconds  steps       checkpoint  cause
        1  2025-10-09 08:53      300  0-40                30  hang, rank 3 on host n2

  goodput: 45.0% of 300 s; the rest: start 40 s, repeated steps 45 s, hang 60 s, other 20 s
  recommended checkpoint interval: 416 s
"""


def test_the_answer_for_two_nodes_is_given_word_for_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, *HANG)
    assert main(["why", str(tmp_path)]) == 0
    assert capsys.readouterr().out.replace(str(tmp_path), "RUN") == GOLDEN
    verdict = why(tmp_path, capsys)
    wanted = {
        "cause": "hang", "rank": 3, "step": 39, "exit_code": 77, "requeue": True, "exclude": [],
        "host": "n2", "section": "data_wait", "attempts": 1, "checkpoint": 30, "goodput": 0.45,
    }  # fmt: skip
    assert {key: verdict[key] for key in wanted} == wanted and verdict["next_action"]


def test_the_earliest_exception_of_all_nodes_is_the_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bug = Failure("KeyError", "'audio'", "code", 50.0, "Traceback ...")
    later = Failure("ValueError", "shape", "code", 51.0)
    echo = Failure("RuntimeError", "Connection closed by peer [10.0.0.2]", "code", 40.0)
    write(
        tmp_path,
        record(
            "a",
            0,
            observations=[seen(0, exit_code=1, failure=later), seen(1, exit_code=1, failure=echo)],
        ),
        record("a", 1, observations=[seen(2, exit_code=1, failure=bug), seen(3)]),
    )
    verdict = why(tmp_path, capsys)
    assert (verdict["cause"], verdict["rank"], verdict["host"]) == ("code", 2, "n2")
    assert verdict["earliest_error"] == "rank 2 (n2): KeyError: 'audio'"
    assert verdict["requeue"] and verdict["decision"] == "code failure 1 of 1 allowed"


@pytest.mark.parametrize(("has", "host"), [(None, None), (3, "n2")])
def test_a_replica_difference_is_assigned_to_the_differing_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], has: int | None, host: str | None
) -> None:
    """All ranks raise the error; the first of them is on a healthy host."""
    fault = Failure("ReplicaError", "differ", "replicas", 50.0, shared=True, rank=has)
    for number in range(2):
        about = {"started": 2e9 + 1000 * number, "checkpoint_before": number, "rank": -1}
        observations = [
            seen(rank, exit_code=77, failure=fault, section="vote") for rank in range(4)
        ]
        for node, own in enumerate((observations[:2], observations[2:])):
            about["checkpoint"] = number + 1
            write(tmp_path, record(f"slurm-7-{number}-0", node, observations=own, **about))
    verdict = why(tmp_path, capsys)
    assert (verdict["cause"], verdict["rank"], verdict["host"]) == ("replicas", has, host)
    assert verdict["exclude"] == ([host] if host else []) and verdict["requeue"]
    assert (verdict["section"], verdict["step"]) == ("vote", 40)


def test_attempts_are_counted_and_budgets_respected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        later = {"started": 2e9 + 1000 * number, "ended": 2e9 + 1000 * number + 300}
        lost = {"checkpoint_before": 30, "checkpoint": 30, **later}
        launch = f"slurm-7-{number}-0"
        observations = [seen(2, exit_code=-9, ended_at=1.0), seen(3)]
        write(tmp_path, record(launch, 0, observations=[seen(0), seen(1)], **lost))
        write(tmp_path, record(launch, 1, observations=observations, **lost))
    verdict = why(tmp_path, capsys)
    assert (verdict["cause"], verdict["rank"], verdict["attempts"]) == ("killed", 2, 2)
    assert not verdict["requeue"] and verdict["exclude"] == ["n2"]
    assert verdict["next_action"].startswith(
        "do not restart: 2 attempts in a row saved no checkpoint; "
    )
    assert [row["cause"] for row in verdict["history"]] == ["killed", "killed"]
    (tmp_path / "config.json").write_text(json.dumps({"max_infra_restarts": 0}))
    assert not why(tmp_path, capsys)["requeue"]


def test_an_active_run_is_reported_as_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"ended": None, "host": socket.gethostname(), "pid": os.getpid()}
    write(
        tmp_path, record("a", 0, num_supervisors=1, identity=process_identity(os.getpid()), **own)
    )
    verdict = why(tmp_path, capsys)
    assert verdict["cause"] == "running" and verdict["exit_code"] is None and not verdict["requeue"]
    assert verdict["section"] == "vote" and verdict["step"] == 40
    # The pid is another process's by now: lost.
    write(tmp_path, record("a", 0, num_supervisors=1, identity="another", **own))
    verdict = why(tmp_path, capsys)
    assert verdict["cause"] == "node_lost" and verdict["exit_code"] == 77


def test_a_node_without_a_recorded_end_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, HANG[0], record("slurm-7-0-0", 1, ended=None))
    # n2 wrote lately, and might be at work
    assert why(tmp_path, capsys)["cause"] == "running"
    verdict = why(tmp_path, capsys, "over=true")
    assert (verdict["cause"], verdict["rank"], verdict["host"]) == ("node_lost", 2, "n2")
    assert verdict["detail"] == "no end recorded by n2"
    # But where the first node knows better, it is believed.
    own = seen(1, exit_code=1, failure=Failure("KeyError", "'audio'", "code", 50.0))
    write(tmp_path, record("slurm-7-0-0", 0, observations=[seen(0), own]))
    assert why(tmp_path, capsys, "over=true")["cause"] == "code"


def test_ranks_that_ended_by_themselves_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for cause, code in (("preempted", 75), ("time", 75), ("preempted_unsaved", 76), ("done", 0)):
        both = {"cause": cause, "exit_code": code, "observations": []}
        write(tmp_path, record("a", 0, **both), record("a", 1, **both))
        verdict = why(tmp_path, capsys)
        assert (verdict["cause"], verdict["exit_code"]) == (cause, code)
        assert verdict["requeue"] is (cause != "done")


# -- launches without a recorded end ----------------------------------------------------------


def commands(folder: Path, monkeypatch: pytest.MonkeyPatch, **does: str) -> None:
    """Write stubs of the given Slurm commands; the others do not answer."""
    for name in ("scontrol", "squeue", "sinfo", "sacct"):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{does.get(name, 'exit 1')}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


NO_END = {"ended": None, "host": "n1"}
SCONTROL = "echo 'JobId=7 JobState={} Restarts={}'"


@pytest.mark.parametrize(
    ("scontrol", "squeue", "running"),
    [
        ("exit 1", "exit 1", True),  # it wrote lately, and nobody knows better
        (SCONTROL.format("RUNNING", 0), "echo 7.0", True),
        (SCONTROL.format("RUNNING", 0), "true", False),
        (SCONTROL.format("RUNNING", 1), "echo 7.0", False),
        (SCONTROL.format("PENDING", 1), "true", False),
        (SCONTROL.format("FAILED", 0), "true", False),
        ("echo 'Invalid job id specified' >&2; exit 1", "true", False),
    ],
)
def test_slurm_proves_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    scontrol: str, squeue: str, running: bool,
) -> None:  # fmt: skip
    commands(tmp_path, monkeypatch, scontrol=scontrol, squeue=squeue)
    write(tmp_path / "run", record("slurm-7-0-0", 0, num_supervisors=1, **NO_END))
    assert (why(tmp_path / "run", capsys)["cause"] == "running") is running


def test_a_later_launch_proves_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, record("slurm-7-0-0", 0, num_supervisors=1, **NO_END))
    own = {"ended": None, "host": socket.gethostname(), "pid": os.getpid(), "started": 2e9}
    write(
        tmp_path,
        record("slurm-7-1-0", 0, num_supervisors=1, identity=process_identity(os.getpid()), **own),
    )
    verdict = why(tmp_path, capsys)
    assert [row["cause"] for row in verdict["history"]] == ["node_lost", "running"]


class Lost(NamedTuple):
    """Two nodes of a launch that Slurm killed; what Slurm recorded of it, and the expected
    cause.
    """

    asked: tuple[int, int]  # the signal that each received
    evidence: dict[str, Any] | None
    cause: str
    host: str | None


ENDED = {"down": [], "state": "", "job_ended": True}


@pytest.mark.parametrize(
    "case",
    [
        # without Slurm's record: the node that did not receive the other's signal
        Lost((15, 0), None, "node_lost", "n2"),
        Lost((0, 15), None, "node_lost", "n1"),
        Lost((15, 15), None, "preempted_unsaved", None),
        # Slurm names the node, for any signals
        Lost((15, 0), {**ENDED, "down": ["n2"]}, "node_lost", "n2"),
        Lost((0, 0), {**ENDED, "down": ["n1"], "state": "NODE_FAIL"}, "node_lost", "n1"),
        # all nodes are well: the job was killed, with a signal before or without
        Lost((0, 0), ENDED, "preempted_unsaved", None),
        Lost((15, 15), {**ENDED, "state": "REQUEUED"}, "preempted_unsaved", None),
        # the job outlived its step: its nodes recorded no end, and no signal killed them
        Lost((0, 0), {**ENDED, "job_ended": False}, "node_lost", "n1"),
    ],
)
def test_a_killed_job_and_a_lost_node_are_distinguished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: Lost
) -> None:
    for number in range(2):  # what happens twice to a host leaves it out
        launch, later = f"slurm-7-{number}-0", {"started": 1e9 + 1000 * number, "ended": None}
        steps = {"checkpoint_before": number, "checkpoint": number + 1, **later}
        both = [record(launch, n, stop_signal=case.asked[n], **steps) for n in range(2)]
        write(tmp_path, *both)
        if case.evidence:
            (tmp_path / "attempts" / launch / "slurm.json").write_text(json.dumps(case.evidence))
    verdict = why(tmp_path, capsys, "over=true")
    assert verdict["cause"] == case.cause and verdict["requeue"]
    assert verdict["exclude"] == ([case.host] if case.host else [])
    if case.host:
        assert verdict["host"] == case.host
    else:
        assert (verdict["rank"], verdict["exit_code"]) == (None, 76)


def test_a_node_that_slurm_lost_is_blamed_and_not_the_ranks_that_waited_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both nodes recorded their end: from the stacks alone rank 0 would be the cause."""
    waits = [replace(HANG[0]), replace(HANG[1], observations=[seen(2), seen(3)])]
    write(tmp_path, *waits)
    assert why(tmp_path, capsys)["cause"] == "hang"
    slurm_record = {"down": ["n2"], "state": "", "job_ended": False}
    (tmp_path / "attempts/slurm-7-0-0/slurm.json").write_text(json.dumps(slurm_record))
    verdict = why(tmp_path, capsys)
    assert (verdict["cause"], verdict["rank"], verdict["host"]) == ("node_lost", 2, "n2")
    # Who knows why it failed is believed all the same.
    bug = seen(1, exit_code=1, failure=Failure("KeyError", "'audio'", "code", 50.0))
    write(tmp_path, replace(HANG[0], observations=[seen(0), bug]))
    assert why(tmp_path, capsys)["cause"] == "code"


@pytest.mark.parametrize("stopped", [False, True])
def test_the_job_asks_slurm_once_its_step_is_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    stopped: bool,
) -> None:  # fmt: skip
    commands(
        tmp_path, monkeypatch, sinfo="printf 'n1 mixed\nn2 down*\nn2 down*\n'",
        sacct="printf 'NODE_FAIL\nCANCELLED by 0\n'",
    )  # fmt: skip
    run = tmp_path / "run"
    write(run, *(record("slurm-7-1-0", node, ended=None) for node in range(2)))
    kept = run / "attempts/slurm-7-1-0/slurm.json"
    words = ["over=true", f"stopped={str(stopped).lower()}"]
    why(run, capsys, *words)
    assert not kept.exists()  # not in its job: too late to know
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    verdict = why(run, capsys, *words)
    assert (verdict["cause"], verdict["host"]) == ("node_lost", "n2")
    slurm_record = {"down": ["n2"], "state": "CANCELLED", "job_ended": stopped}
    assert json.loads(kept.read_text()) == slurm_record
    commands(tmp_path, monkeypatch, sinfo="printf 'n1 idle\nn2 idle\n'")  # it was healed
    assert why(run, capsys, "over=true")["host"] == "n2"


def test_a_launch_killed_after_its_save_counts_as_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm's patience ended between the save and the record of it."""
    write(tmp_path, *(record("slurm-7-0-0", n, ended=None, stop_signal=15) for n in range(2)))
    assert why(tmp_path, capsys, "over=true")["cause"] == "preempted_unsaved"
    (tmp_path / "checkpoints/step-000041").mkdir(parents=True)
    verdict = why(tmp_path, capsys, "over=true")
    assert (verdict["cause"], verdict["exit_code"], verdict["checkpoint"]) == ("preempted", 75, 41)


def test_a_node_that_slurm_lost_is_named_though_all_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The node's daemon was dead and its ranks were not: they saved at the signal to the others."""
    saved = {"cause": "preempted", "exit_code": 75, "stop_signal": 15, "detail": "SIGTERM"}
    write(tmp_path, *(record("slurm-7-0-0", n, observations=[], **saved) for n in range(2)))
    assert why(tmp_path, capsys)["cause"] == "preempted"
    slurm_record = {"down": ["n2"], "state": "NODE_FAIL", "job_ended": True}
    (tmp_path / "attempts/slurm-7-0-0/slurm.json").write_text(json.dumps(slurm_record))
    verdict = why(tmp_path, capsys)
    assert (verdict["cause"], verdict["host"], verdict["requeue"]) == ("node_lost", "n2", True)
    assert verdict["detail"] == "Slurm lost n2 (NODE_FAIL), saved"


# -- the answer describes the present ------------------------------------------------------------


def test_one_failed_supervisor_makes_the_launch_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = {"cause": "done", "exit_code": 0, "observations": []}
    failed = {**done, "cause": "node_lost", "exit_code": 77, "followed": True, "rank": 2}
    for causes in ((done, failed), (failed, done)):
        write(tmp_path, *(record("a", n, **cause) for n, cause in enumerate(causes)))
        verdict = why(tmp_path, capsys)
        assert (verdict["cause"], verdict["exit_code"]) == ("node_lost", 77)


def test_checkpoints_are_counted_on_the_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last record of a lost supervisor is older than the checkpoints."""
    write(tmp_path, record("a", 0, num_supervisors=1, ended=None, checkpoint=-1))
    for step in (20, 40):
        (tmp_path / f"checkpoints/step-{step:06d}").mkdir(parents=True)
    verdict = why(tmp_path, capsys, "over=true")
    assert verdict["checkpoint"] == verdict["history"][0]["checkpoint"] == 40
    assert verdict["decision"] == "infrastructure failure 1 of 3 allowed"
    # Rolled back, a finished run has steps to do.
    done = {"cause": "done", "exit_code": 0, "checkpoint": 40, "last_step": 40}
    write(tmp_path, record("a", 0, num_supervisors=1, **done))
    assert why(tmp_path, capsys)["next_action"].startswith("nothing")
    (tmp_path / "checkpoints/step-000040").rename(tmp_path / "elsewhere")
    verdict = why(tmp_path, capsys)
    assert verdict["checkpoint"] == 20 and "run the same command again" in verdict["next_action"]


def test_a_missing_run_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", str(tmp_path / "nowhere")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no attempts of a run in it" in said
