"""Real ranks over gloo under faults: the run ends within its bound, and the rank is named."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import encoded
import pytest
from safetensors.torch import save

from echolab.cli.__main__ import main
from echolab.data.shard_writer import ShardWriter
from echolab.heartbeat import heartbeat_path, read_heartbeat
from echolab.launch import exit_codes
from echolab.launch.launch_records import NodeRecord, read_launches

pytestmark = pytest.mark.slow

# Steps of tiny networks on a crowded machine take up to a second.
DEADLINES = ("timeouts.min_step_timeout=8", "timeouts.step=20", "timeouts.data_wait=20")
BOUND = 600.0  # seconds after which it hangs, on a machine with other work


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoded.write(tmp_path_factory.mktemp("encoded"), 12)[0]


class Training:
    """`echolab train` with several ranks, in progress."""

    def __init__(self, run: Path, clips: Path, ranks: int, *words: str) -> None:
        self.run, self.ranks = run, ranks
        command = [sys.executable, "-m", "echolab.cli", "train", *encoded.SETTINGS]
        command += [
            f"data.clips={clips}",
            f"run_dir={run}",
            encoded.plan(("sft", 5000)),
            *DEADLINES,
        ]
        command += ["trainer.strategy=ddp", f"trainer.devices={ranks}", f"batch_size={ranks}"]
        self.process = subprocess.Popen(
            [*command, "save_every=5", *words],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *about: object) -> None:
        self.process.kill()  # its ranks go with it
        self.process.wait()

    def at_work(self, steps: int = 8) -> NodeRecord:
        """Return the record of the launch, once every rank did so many steps."""
        end = time.monotonic() + BOUND
        while time.monotonic() < end:
            assert self.process.poll() is None, self.process.communicate()[1]
            for record in (r for launch in read_launches(self.run) for r in launch):
                progress = [
                    read_heartbeat(heartbeat_path(Path(record.local_folder), r))
                    for r in record.ranks
                ]
                if all(beat and beat.step >= steps for beat in progress):
                    return record
            time.sleep(0.1)
        raise AssertionError("no steps were taken")

    def end(self) -> str:
        """Return the output; the run must have failed in a way that is worth another try."""
        said = self.process.communicate(timeout=BOUND)[1]
        assert self.process.returncode == exit_codes.RETRYABLE, said
        return said


def why(run: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["why", str(run), "format=json"]) == 0
    verdict: dict[str, Any] = json.loads(capsys.readouterr().out)
    return verdict


def send(number: int, rank: int) -> Callable[[NodeRecord], None]:
    return lambda record: os.kill(record.pids[rank], number)


@pytest.mark.parametrize(
    ("ranks", "hurt", "cause", "rank"),
    [
        (4, send(signal.SIGKILL, 2), "killed", 2),
        (2, send(signal.SIGSTOP, 1), "stopped_process", 1),
    ],
)
def test_a_killed_or_stopped_rank_is_named(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    ranks: int, hurt: Callable[[NodeRecord], None], cause: str, rank: int,
) -> None:  # fmt: skip
    with Training(tmp_path / "run", clips, ranks) as training:
        record = training.at_work()
        hurt(record)
        said = training.end()
    verdict = why(training.run, capsys)
    assert (verdict["cause"], verdict["rank"]) == (cause, rank), said
    assert verdict["requeue"] and verdict["checkpoint"] >= 5 and verdict["step"] >= 8
    assert f"rank {rank} (" in said.splitlines()[-1]
    assert not any(Path(f"/proc/{pid}").exists() for pid in record.pids)


def many(clips: Path) -> Path:
    """Write shards, too many to keep open."""
    with ShardWriter(clips, kind="encoded", samples_per_shard=1) as writer:
        for i in range(80):
            members = {"safetensors": save(encoded.tensors(i)), "json": b"{}"}
            writer.write(f"clip-{i:02d}", members)
    return clips


def block(shard: Path) -> None:
    """Replace a file by a pipe without a writer."""
    shard.rename(shard.with_suffix(".kept"))
    os.mkfifo(shard)


def test_a_read_that_never_returns_is_a_hang_in_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One shard of many becomes a pipe."""
    clips = many(tmp_path / "clips")
    shard = sorted(clips.glob("*.tar"))[7]
    with Training(tmp_path / "run", clips, 2) as training:
        training.at_work()
        block(shard)
        said = training.end()
    verdict = why(training.run, capsys)
    assert (verdict["cause"], verdict["section"]) == ("hang", "data_wait"), said
    stacks = {p.stem: p.read_text() for p in training.run.glob("attempts/*/rank-*.stack")}
    assert [name for name in stacks if "data/shard_reader.py" in stacks[name]] == [
        f"rank-{verdict['rank']}"
    ]
    assert len(stacks) == 2 and any("data/shard_reader.py" in frame for frame in verdict["stack"])


def test_ctrl_c_twice_ends_the_run_as_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rank itself records the interrupt, though Lightning would exit with 1."""
    with Training(tmp_path / "run", many(tmp_path / "clips"), 1) as training:
        record = training.at_work()
        block(sorted((tmp_path / "clips").glob("*.tar"))[7])
        path, end = heartbeat_path(Path(record.local_folder), 0), time.monotonic() + BOUND
        while not ((beat := read_heartbeat(path)) and time.monotonic() - beat.since > 3):
            assert time.monotonic() < end
            time.sleep(0.05)
        for _ in range(2):  # to the rank alone: its supervisor has no part in it
            os.kill(record.pids[0], signal.SIGINT)
            time.sleep(0.5)
        said = training.process.communicate(timeout=BOUND)[1]
    assert training.process.returncode == exit_codes.INTERRUPTED, said
    verdict = why(training.run, capsys)
    assert (verdict["cause"], verdict["rank"], verdict["section"]) == (
        "interrupted",
        0,
        "data_wait",
    )
    assert verdict["detail"].startswith("KeyboardInterrupt")


def test_a_signal_while_ranks_start_is_kept(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python itself has hardly started; the ranks stop after their first step, and save."""
    with Training(tmp_path / "run", clips, 2) as training:
        end = time.monotonic() + BOUND
        while not read_launches(training.run) and time.monotonic() < end:
            time.sleep(0.01)
        training.process.send_signal(signal.SIGTERM)
        said = training.process.communicate(timeout=BOUND)[1]
    assert training.process.returncode == exit_codes.STOPPED_SAVED, said
    verdict = why(training.run, capsys)
    assert (verdict["cause"], verdict["step"], verdict["checkpoint"]) == ("preempted", 1, 1)
    assert verdict["detail"] == "SIGTERM" and verdict["requeue"]
