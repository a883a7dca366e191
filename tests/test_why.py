"""`echolab why` on records of two nodes, word for word; on runs at work, lost, and on none."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from echolab.cli.__main__ import main
from echolab.launch.blame import Failure, Observation
from echolab.launch.processes import birth
from echolab.launch.records import NodeRecord

WAITS = """Current thread 0x00007f0000000000 (most recent call first):
  File "/site-packages/torch/distributed/distributed_c10d.py", line 2806 in all_reduce
  File "/echolab/training/ranks.py", line 40 in sums
"""
READS = """Thread 0x00007f0000000001 (most recent call first):
  File "/lib/threading.py", line 324 in wait

Current thread 0x00007f0000000000 (most recent call first):
  File "/echolab/data/tars.py", line 31 in read
  File "/echolab/training/datamodule.py", line 60 in __next__
"""


def record(launch: str, node: int, **changes: Any) -> NodeRecord:
    told: dict[str, Any] = {
        "launch": launch, "supervisor": node, "supervisors": 2, "host": f"n{node + 1}", "world": 4,
        "ranks": [2 * node, 2 * node + 1], "pid": 1, "born": "", "started": 1_760_000_000.0,
        "ended": 1_760_000_300.0, "first_step": 0, "last_step": 40, "checkpoint": 30,
        "section": "vote", "stay": 60.0, "seconds": {"init": 40.0, "forward": 80.0, "vote": 160.0},
        "longest": {"save": 2.0}, **changes,
    }  # fmt: skip
    return NodeRecord(**told)


def seen(rank: int, **changes: Any) -> Observation:
    told: dict[str, Any] = {
        "host": f"n{rank // 2 + 1}", "section": "vote", "step": 40, "switches": 200,
        "stay": 60.0, "late": 60.0, "state": "S", "stack": WAITS, **changes,
    }  # fmt: skip
    return Observation(rank, **told)


def write(run: Path, *records: NodeRecord) -> None:
    for one in records:
        folder = run / "attempts" / one.launch
        folder.mkdir(parents=True, exist_ok=True)
        one.write(folder)


def why(run: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["why", str(run), "format=json", *words]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


HANG = [
    record("slurm-7-0-0", 0, cause="hang", rank=0, observations=[seen(0), seen(1)]),
    record(
        "slurm-7-0-0", 1, cause="hang", rank=3, followed=True,
        observations=[seen(2), seen(3, section="data_wait", step=39, switches=196, stack=READS)],
    ),
]  # fmt: skip
GOLDEN = """\
RUN: hang: no progress within the deadline
  rank 3 on n2, in data_wait at step 39
  blocked, in data_wait for 60 s
    File "/echolab/data/tars.py", line 31 in read
    File "/echolab/training/datamodule.py", line 60 in __next__
  exit code 77; next: read the stack; run again
  newest checkpoint: step 30; again: True (infrastructure failure 1 of 3 allowed)

  attempt  began (UTC)       seconds  steps       saved  ended by
        1  2025-10-09 08:53      300  0-40           30  hang, rank 3 on n2

  goodput 45.0% of 300 s; lost: init 40 s, rework 45 s, hang 60 s, other 20 s
  a checkpoint every 416 s would lose least to failures and saves
"""


def test_of_two_nodes_word_for_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, *HANG)
    assert main(["why", str(tmp_path)]) == 0
    assert capsys.readouterr().out.replace(str(tmp_path), "RUN") == GOLDEN
    told = why(tmp_path, capsys)
    wanted = {
        "cause": "hang", "rank": 3, "step": 39, "exit_code": 77, "requeue": True, "exclude": [],
        "host": "n2", "section": "data_wait", "attempts": 1, "checkpoint": 30, "goodput": 0.45,
    }  # fmt: skip
    assert {key: told[key] for key in wanted} == wanted and told["next_action"]


def test_the_earliest_exception_of_all_nodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bug = Failure("KeyError", "'audio'", "code", 50.0, "Traceback ...")
    later = Failure("ValueError", "shape", "code", 51.0)
    echo = Failure("RuntimeError", "Connection closed by peer [10.0.0.2]", "code", 40.0)
    write(
        tmp_path,
        record(
            "a", 0, observations=[seen(0, exit=1, failure=later), seen(1, exit=1, failure=echo)]
        ),
        record("a", 1, observations=[seen(2, exit=1, failure=bug), seen(3)]),
    )
    told = why(tmp_path, capsys)
    assert (told["cause"], told["rank"], told["host"]) == ("code", 2, "n2")
    assert told["earliest_error"] == "rank 2 (n2): KeyError: 'audio'"
    assert told["requeue"] and told["decision"] == "code failure 1 of 1 allowed"


@pytest.mark.parametrize(("has", "host"), [(None, None), (3, "n2")])
def test_replicas_that_differ_are_of_the_rank_that_has_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], has: int | None, host: str | None
) -> None:
    """All ranks raise it; the first of them is on a host that is as good as any."""
    fault = Failure("ReplicaError", "differ", "replicas", 50.0, shared=True, rank=has)
    for number in range(2):
        about = {"started": 2e9 + 1000 * number, "checkpoint_before": number, "rank": -1}
        observations = [seen(rank, exit=77, failure=fault, section="vote") for rank in range(4)]
        for node, own in enumerate((observations[:2], observations[2:])):
            about["checkpoint"] = number + 1
            write(tmp_path, record(f"slurm-7-{number}-0", node, observations=own, **about))
    told = why(tmp_path, capsys)
    assert (told["cause"], told["rank"], told["host"]) == ("replicas", has, host)
    assert told["exclude"] == ([host] if host else []) and told["requeue"]
    assert (told["section"], told["step"]) == ("vote", 40)


def test_attempts_are_counted_and_budgets_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        later = {"started": 2e9 + 1000 * number, "ended": 2e9 + 1000 * number + 300}
        gone = {"checkpoint_before": 30, "checkpoint": 30, **later}
        launch = f"slurm-7-{number}-0"
        observations = [seen(2, exit=-9, died=1.0), seen(3)]
        write(tmp_path, record(launch, 0, observations=[seen(0), seen(1)], **gone))
        write(tmp_path, record(launch, 1, observations=observations, **gone))
    told = why(tmp_path, capsys)
    assert (told["cause"], told["rank"], told["attempts"]) == ("killed", 2, 2)
    assert not told["requeue"] and told["exclude"] == ["n2"]
    assert told["next_action"].startswith("stop: 2 attempts in a row made no checkpoint; ")
    assert [row["cause"] for row in told["history"]] == ["killed", "killed"]
    (tmp_path / "config.json").write_text(json.dumps({"supervise": {"infrastructure": 0}}))
    assert not why(tmp_path, capsys)["requeue"]


def test_a_run_at_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"ended": None, "host": socket.gethostname(), "pid": os.getpid()}
    write(tmp_path, record("a", 0, supervisors=1, born=birth(os.getpid()), **own))
    told = why(tmp_path, capsys)
    assert told["cause"] == "running" and told["exit_code"] is None and not told["requeue"]
    assert told["section"] == "vote" and told["step"] == 40
    # The pid is another process's by now: lost.
    write(tmp_path, record("a", 0, supervisors=1, born="another", **own))
    told = why(tmp_path, capsys)
    assert told["cause"] == "node_lost" and told["exit_code"] == 77


def test_a_node_that_told_no_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, HANG[0], record("slurm-7-0-0", 1, ended=None))
    # n2 wrote lately, and might be at work
    assert why(tmp_path, capsys)["cause"] == "running"
    told = why(tmp_path, capsys, "over=true")
    assert (told["cause"], told["rank"], told["host"]) == ("node_lost", 2, "n2")
    assert told["detail"] == "no end was told by n2"
    # But where the first node knows better, it is believed.
    own = seen(1, exit=1, failure=Failure("KeyError", "'audio'", "code", 50.0))
    write(tmp_path, record("slurm-7-0-0", 0, observations=[seen(0), own]))
    assert why(tmp_path, capsys, "over=true")["cause"] == "code"


def test_ranks_that_ended_by_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for cause, code in (("preempted", 75), ("time", 75), ("preempted_unsaved", 76), ("done", 0)):
        both = {"cause": cause, "exit_code": code, "observations": []}
        write(tmp_path, record("a", 0, **both), record("a", 1, **both))
        told = why(tmp_path, capsys)
        assert (told["cause"], told["exit_code"]) == (cause, code)
        assert told["requeue"] is (cause != "done")


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", str(tmp_path / "nowhere")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no attempts of a run in it" in said
