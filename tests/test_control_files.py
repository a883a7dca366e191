"""Requests to a running training to end, save or wait: files, the clock, signals, memory."""

import errno
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import runs

from echolab.training.callbacks.step_sync import REQUESTS
from echolab.training.checkpoints.checkpoint import saved_steps
from echolab.training.config import Intervals
from echolab.training.fit import FitResult
from echolab.training.signals import StopSignals

STEPS = 6


@pytest.fixture(autouse=True)
def look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echolab.training.callbacks.step_sync.POLL_SECONDS", 0.0)
    monkeypatch.setattr("echolab.training.callbacks.step_sync.PAUSE_SECONDS", 0.02)


def train(root: Path, at_two: Any, **changes: Any) -> FitResult:
    """Train a run in which `at_two(run folder)` is called after its second step."""

    def on_step(step: int, steps: int) -> None:
        if step == 2:
            at_two(root / "run")

    every = Intervals(log_every=1, save_every=0)
    result, _ = runs.train(
        root, runs.schedule(("sft", STEPS)), intervals=every, on_step=on_step, **changes
    )
    return result


def touch(name: str) -> Any:
    return lambda run: (run / name).touch()


def test_stop_saves_and_the_same_call_resumes(tmp_path: Path) -> None:
    result = train(tmp_path, touch("STOP"))
    assert (result.reason, result.step, result.unsaved) == ("stop", 3, False)
    assert saved_steps(tmp_path / "run/checkpoints") == [3]
    assert not (tmp_path / "run/STOP").exists()
    assert train(tmp_path, touch("nothing")).reason == "done"
    again = train(tmp_path, touch("nothing"))
    assert again.done and again.reason == "done" and again.checkpoint


def test_a_save_request_saves_once_and_training_continues(tmp_path: Path) -> None:
    assert train(tmp_path, touch("SAVE")).done
    assert saved_steps(tmp_path / "run/checkpoints") == [6, 3]
    assert not (tmp_path / "run/SAVE").exists()


@pytest.mark.parametrize("how", ["empty folder", "folder", "link", "immutable"])
def test_a_request_of_any_kind_is_obeyed_once(
    tmp_path: Path, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A request file that cannot be removed ends no run, and causes no second save."""
    path = tmp_path / "run/SAVE"

    def make(run: Path) -> None:
        if how == "link":
            path.symlink_to("nowhere")
        elif how == "immutable":
            path.touch()
            if subprocess.run(["chattr", "+i", str(path)], capture_output=True).returncode:
                pytest.skip("this file system has no immutable files, or this user may not")
        else:
            path.mkdir()
            if how == "folder":
                (path / "file").touch()

    try:
        assert train(tmp_path, make).done
    finally:
        subprocess.run(["chattr", "-i", str(path)], capture_output=True)
    assert saved_steps(tmp_path / "run/checkpoints") == [6, 3]
    said = capfd.readouterr().err
    stays = how in ("folder", "immutable")
    assert path.exists() is stays and ("cannot be removed" in said) is stays
    assert said.count("cannot be removed") <= 1


def test_an_unreadable_folder_counts_as_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = Path.lstat

    def lstat(self: Path) -> os.stat_result:
        if self.name in REQUESTS:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return stat(self)

    monkeypatch.setattr(Path, "lstat", lstat)
    assert train(tmp_path, touch("STOP")).done


def test_prune_ends_the_run_without_a_checkpoint(tmp_path: Path) -> None:
    result = train(tmp_path, touch("PRUNE"))
    assert (result.reason, result.step) == ("prune", 3)
    assert saved_steps(tmp_path / "run/checkpoints") == []


def test_pause_saves_and_waits_until_the_file_is_removed(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    def pause(run: Path) -> None:
        (run / "PAUSE").touch()

        def later() -> None:
            while not saved_steps(run / "checkpoints"):
                time.sleep(0.02)
            time.sleep(0.2)
            seen.append(saved_steps(run / "checkpoints"))
            (run / "PAUSE").unlink()

        threading.Thread(target=later).start()

    assert train(tmp_path, pause).done
    assert seen == [[3]]


def test_a_paused_run_can_be_stopped(tmp_path: Path) -> None:
    def pause(run: Path) -> None:
        (run / "PAUSE").touch()
        threading.Timer(0.5, (run / "STOP").touch).start()

    result = train(tmp_path, pause)
    assert (result.reason, result.step) == ("stop", 3)
    assert saved_steps(tmp_path / "run/checkpoints") == [3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step(tmp_path: Path, number: signal.Signals) -> None:
    result = train(tmp_path, lambda run: os.kill(os.getpid(), number))
    assert (result.reason, result.step, result.stopped_by) == ("signal", 3, number)
    assert saved_steps(tmp_path / "run/checkpoints") == [3]


def test_without_time_for_a_save_nothing_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("echolab.training.callbacks.checkpoints.SAVE_TIMES", 1e6)
    every = Intervals(log_every=0, save_every=1)

    def on_step(step: int, steps: int) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    result, _ = runs.train(
        tmp_path,
        runs.schedule(("sft", STEPS)),
        intervals=every,
        on_step=on_step,
        signal_grace_seconds={signal.SIGTERM: 30.0},
    )
    assert (result.reason, result.step, result.unsaved) == ("signal", 5, True)
    assert 5 not in saved_steps(tmp_path / "run/checkpoints")


@pytest.mark.parametrize("at", [3, 5])  # 5: the signal comes in the last step
def test_a_late_end_is_not_done_and_a_started_save_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr("echolab.training.callbacks.checkpoints.SAVE_TIMES", 1e6)

    def on_step(step: int, steps: int) -> None:
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    result, _ = runs.train(
        tmp_path,
        runs.schedule(("sft", STEPS)),
        intervals=Intervals(log_every=0, save_every=1),
        on_step=on_step,
        signal_grace_seconds={signal.SIGTERM: 30.0},
    )
    assert result.step == at + 1 and result.unsaved and not result.done
    assert result.reason == "signal"
    assert saved_steps(tmp_path / "run/checkpoints")[0] == at


def test_a_run_saves_before_the_jobs_time_limit(tmp_path: Path) -> None:
    result = train(tmp_path, touch("nothing"), job_end_time=time.time() + 59)
    assert (result.reason, result.step) == ("time", 1)
    assert saved_steps(tmp_path / "run/checkpoints") == [1]
    assert train(tmp_path, touch("nothing"), job_end_time=time.time() + 3600).done


def test_too_much_memory_causes_a_planned_restart(tmp_path: Path) -> None:
    result = train(tmp_path, touch("nothing"), max_host_memory_gb=1e-3)
    assert (result.reason, result.step, result.unsaved) == ("memory", 1, False)
    assert saved_steps(tmp_path / "run/checkpoints") == [1]


def test_a_signal_before_training_is_kept() -> None:
    with StopSignals():
        os.kill(os.getpid(), signal.SIGUSR1)
        with StopSignals({signal.SIGUSR1: 100.0}) as inner:
            assert inner.received == signal.SIGUSR1
            assert 0 < inner.seconds_left <= 100
    assert StopSignals().seconds_left == float("inf")
