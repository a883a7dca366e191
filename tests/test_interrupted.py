"""A stop during a validation or the last check loses nothing and records nothing false."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import rank_interrupted
import runs
from forked import ForkServer
from rank_interrupted import HELD, STEPS, restored  # noqa: F401 - a fixture

from echolab.training.checkpoints.checkpoint import saved_steps
from echolab.training.config import Intervals

# devices, ranks that share a clip
KINDS = {"single": (1, 1), "ddp": (2, 1), "zero2": (2, 1), "zero3": (2, 1), "ddp-shared": (2, 2)}


class Starts:
    """Starts `rank_interrupted.main` over the clips of `data`."""

    def __init__(self, server: ForkServer, data: Path) -> None:
        self.server, self.data = server, data

    def __call__(self, kind: str, run: str, place: str = "", count: int = 0) -> dict[str, Any]:
        devices, together = KINDS[kind]
        arguments = {
            "root": str(self.data), "run": run, "strategy": kind.removesuffix("-shared"),
            "devices": devices, "together": together, "place": place, "count": count,
            "victim": 0 if place == "export" else devices - 1,
        }  # fmt: skip
        self.server.run("rank_interrupted:main", world=devices, arguments=arguments)
        record: dict[str, Any] = json.loads((self.data / f"{run}.json").read_text())
        return record


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Starts:
    folder = tmp_path_factory.mktemp("interrupted")
    runs.write_clips(folder / "clips", 7)
    runs.write_pairs(folder / "pairs", 5)
    runs.write_clips(folder / "held", HELD, 50)
    return Starts(fork_server, folder)


SIGNALED = ["signal", signal.SIGTERM, False, False]


@pytest.mark.parametrize(
    "kind",
    [
        "single", "ddp",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("zero2", "zero3", "ddp-shared")),
    ],
)  # fmt: skip
def test_a_run_stopped_in_each_validation_equals_one_not_stopped(starts: Starts, kind: str) -> None:
    """5 held-out clips on 2 ranks are uneven; one rank alone gets the signal."""
    not_stopped = starts(kind, f"{kind}-not-stopped")
    assert not_stopped["result"] == [STEPS, "done", 0, True, False]
    assert not_stopped["val"] == [2, STEPS] and not_stopped["parity"] == [STEPS]

    run = f"{kind}-run"
    record = starts(kind, run, "validation", 2)
    assert record["result"] == [2, *SIGNALED]
    assert record["saved"] == [2], "the save is published before the validation begins"
    assert record["val"] == [] and record["trained"] == [1, 2]
    record = starts(kind, run, "validation", 5)
    assert record["result"] == [STEPS, *SIGNALED]
    assert record["saved"] == [STEPS, 2]
    assert record["val"] == [] and record["trained"] == [3, STEPS]
    for place in ("sampling", "export"):
        record = starts(kind, run, place, 1)
        assert record["result"] == [STEPS, *SIGNALED]
        assert record["val"] == [STEPS] and record["trained"] == record["parity"] == []
        assert not (starts.data / run / "parity.json").exists()
    record = starts(kind, run)
    assert record["result"] == [STEPS, "done", 0, True, False]
    assert record["parity"] == [STEPS] and record["trained"] == []
    last = f"checkpoints/step-{STEPS:06d}"
    unbroken, broken = (
        runs.tensors_of(starts.data / r / last) for r in (f"{kind}-not-stopped", run)
    )
    assert unbroken == broken


def test_a_stop_request_or_the_time_limit_ends_a_validation(
    tmp_path: Path,
    restored: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """If it comes between two saves, the steps since the last save are saved then."""
    monkeypatch.setattr("echolab.training.callbacks.step_sync.POLL_SECONDS", 0.0)
    run = tmp_path / "run"
    rank_interrupted.act_at("validation", 2, (run / "STOP").touch)
    every = Intervals(log_every=1, save_every=3, val_every=2)
    result, rows = rank_interrupted.train(tmp_path, intervals=every)
    assert (result.step, result.reason, result.unsaved) == (2, "stop", False)
    assert saved_steps(run / "checkpoints") == [2] and not (run / "STOP").exists()
    assert not any("val/loss" in row for row in rows)
    message = capfd.readouterr().err
    assert "validation at step 2 was cut short (stop)" in message
    result, rows = rank_interrupted.train(tmp_path, intervals=every)
    assert result.done and [row["step"] for row in rows if "val/loss" in row] == [STEPS]


def test_a_restart_for_memory_waits_for_the_next_step(tmp_path: Path) -> None:
    """Otherwise a check at the end, which needs memory too, would never finish."""
    result, rows = rank_interrupted.train(tmp_path, max_host_memory_gb=1e-3)
    while not result.done:
        assert (result.reason, result.unsaved) == ("memory", False)
        result, rows = rank_interrupted.train(tmp_path, max_host_memory_gb=1e-3)
    assert [row["step"] for row in rows if "parity/difference" in row] == [STEPS]


class Full(Exception):
    """The error that a log raises."""


@pytest.mark.parametrize("at", [1, 2, STEPS - 1, STEPS])
def test_a_failing_log_loses_no_step(tmp_path: Path, at: int) -> None:
    """The checkpoint exists before the log is written, and a save in progress is published."""

    def log(step: int, values: dict[str, float]) -> None:
        if step == STEPS:
            assert saved_steps(tmp_path / "run/checkpoints")[0] == STEPS
        if step == at:
            raise Full

    with pytest.raises(Full):
        rank_interrupted.train(
            tmp_path, log_metrics=log, intervals=Intervals(log_every=1, save_every=2)
        )
    saved = saved_steps(tmp_path / "run/checkpoints")
    assert saved[0] == min(at + 1, STEPS)
    shutil.copytree(tmp_path / "run/checkpoints", tmp_path / "kept")
    result, _ = rank_interrupted.train(tmp_path, intervals=Intervals(log_every=1, save_every=2))
    assert result.done and result.step == STEPS
