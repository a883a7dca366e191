"""A run with any fault of its tracker equals a run without a tracker."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import encoded
import pytest
import runs
from test_tracker import KEY, closed_port, never_answers, rows_of, tracker

from echolab.cli import train_rank
from echolab.cli.train_rank import exit_code, train
from echolab.config.compose import compose
from echolab.heartbeat import Heartbeat
from echolab.launch.exit_codes import DONE
from echolab.training.checkpoints.checkpoint import saved_steps

STEPS = 4
Fault = Callable[[pytest.MonkeyPatch, Path], Any]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    clips, _ = encoded.write(tmp_path_factory.mktemp("encoded"))
    return [
        *encoded.SETTINGS, encoded.plan(("sft", STEPS)), f"data.clips={clips}",
        f"data.val_clips={clips}", "data.val_overlaps=accept", "data.val_num_clips=2",
        "val_every=2", "verify_export=true",
    ]  # fmt: skip


def trained(folder: Path, settings: list[str], logger: str) -> tuple[int, list[int], Any, Any]:
    """Return exit code, saved steps, the last checkpoint's tensors, and the rows of
    metrics.jsonl.
    """
    result = train(compose([*settings, f"run_dir={folder}", f"logger={logger}"]), Heartbeat(None))
    steps = saved_steps(folder / "checkpoints")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [
        {k: value for k, value in json.loads(line).items() if k != "time" and k[:5] != "perf/"}
        for line in lines
    ]  # fmt: skip
    tensors = runs.tensors_of(folder / f"checkpoints/step-{steps[0]:06d}")
    return exit_code(result, folder), steps, tensors, rows


@pytest.fixture(scope="module")
def expected(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Train without a tracker."""
    return trained(tmp_path_factory.mktemp("without") / "run", settings, "none")


@pytest.mark.parametrize("strategy", ["single", "zero1"])
def test_a_rank_without_a_tracker_imports_neither_wandb_nor_trl(
    tmp_path: Path, strategy: str
) -> None:
    """A real rank runs through all kinds of epochs; Python itself lists what it imports."""
    clips, pairs = encoded.write(tmp_path / "encoded")
    settings = [
        *encoded.SETTINGS, encoded.plan(("sft", 1), ("ndpo", 1), ("dpo", 1)),
        f"data.clips={clips}", f"data.pairs={pairs}", f"run_dir={tmp_path / 'run'}", "logger=none",
        f"trainer.strategy={strategy}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "echolab.cli", "train", *settings]
    env = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    packages = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}
    assert done.returncode == DONE, done.stderr
    assert {"torch", "lightning_fabric"} <= packages and not packages & {"wandb", "trl"}


def killed(number: int, section: str) -> Fault:
    """Send a signal to all processes of the tracker when a section begins at the second step."""

    @contextmanager
    def fault(patch: pytest.MonkeyPatch, run: Path) -> Iterator[None]:
        enter, hit = Heartbeat.enter, []

        def enter_and_kill(heartbeat: Heartbeat, entered: str, step: int | None = None) -> None:
            enter(heartbeat, entered, step)
            if entered == section and heartbeat.step == 2 and not hit:
                while not list(run.glob("wandb/offline-run-*/run-*.wandb")):
                    time.sleep(0.01)  # it is open
                ours, services = tracker()
                hit.extend(ours + services)
                for pid in hit:
                    os.kill(pid, number)

        patch.setattr(Heartbeat, "enter", enter_and_kill)
        yield
        assert hit

    return fault


def without_server(server: Callable[[], Any]) -> Fault:
    @contextmanager
    def fault(patch: pytest.MonkeyPatch, run: Path) -> Iterator[None]:
        with server() as address:
            patch.setenv("WANDB_BASE_URL", address)
            patch.setenv("WANDB_API_KEY", KEY)
            patch.setenv("WANDB_MODE", "online")
            yield

    return fault


@contextmanager
def wrong_key(patch: pytest.MonkeyPatch, run: Path) -> Iterator[None]:
    patch.setenv("WANDB_API_KEY", "too-short-a-key")
    patch.setenv("WANDB_MODE", "online")
    yield


@contextmanager
def full_disk(patch: pytest.MonkeyPatch, run: Path) -> Iterator[None]:
    """Make the disk full below wandb/ alone."""
    make, disk = train_rank._wandb_run, run / "wandb"

    def on_small_disk(*given: Any) -> Any:
        disk.mkdir()
        small = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)]
        subprocess.run(small, check=True)
        return make(*given)

    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small disk")
    patch.setattr(train_rank, "_wandb_run", on_small_disk)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


FAULTS: dict[str, tuple[Fault, bool, str]] = {  # fault, whether wandb has all, what is said
    "TERM in a step": (killed(signal.SIGTERM, "forward"), True, ""),
    "KILL in a validation": (killed(signal.SIGKILL, "eval"), True, ""),
    "TERM in a save": (killed(signal.SIGTERM, "save"), True, ""),
    "no server": (without_server(closed_port), True, "recorded offline instead, `wandb sync"),
    "silent server": (without_server(never_answers), True, "recorded offline instead, `wandb sync"),
    "wrong key": (wrong_key, True, "recorded offline instead, `wandb sync"),
    "full disk": (full_disk, False, "records are missing"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_with_a_faulty_tracker_trains_saves_and_ends_as_without_one(
    settings: list[str], expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], name: str,
) -> None:  # fmt: skip
    fault, complete, said = FAULTS[name]
    run = tmp_path / "run"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("echolab.cli.train_rank.FINISH_SECONDS", 40.0)  # for a busy machine
    if "server" in name:
        monkeypatch.setattr("echolab.cli.train_rank.FINISH_SECONDS", 12.0)
    with ExitStack() as stack:
        stack.enter_context(fault(monkeypatch, run))
        result = trained(run, settings, "wandb")
        assert result == expected and result[0] == DONE
        rows = rows_of(run) if complete else []
    lines = [line for line in capfd.readouterr().err.splitlines() if "echolab: wandb" in line]
    assert len(lines) == bool(said) and all("metrics.jsonl has all values" in t for t in lines)
    if "server" in name and "not finished" in lines[0]:  # the machine was too busy
        return
    assert all(said in line for line in lines), lines
    if complete:
        assert [row["trainer/step"] for row in rows] == [row["step"] for row in expected[3]]
