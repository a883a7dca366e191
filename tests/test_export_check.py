"""Samples of the trained model equal those of its export, under every strategy."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
from forked import ForkServer
from rank_export_check import HELD, SIGMAS, TASKS, broken
from safetensors.torch import save_file

from echolab.errors import ConfigError, DiskFullError, ParityError, StorageError
from echolab.training.callbacks.export_check import REPORT, TOLERANCE, Parity, passed_before
from echolab.training.config import Intervals
from echolab.training.datamodule import ValData
from echolab.training.fit import FitResult, Machine

RANKS = {"single": 1, "ddp": 2, "zero1": 2, "zero2": 2, "zero3": 2}
FAULTS = ("swap of averages", "perturbed", "names")


class Gate:
    """Starts `rank_export_check.main` over the clips of `data`."""

    def __init__(self, server: ForkServer, data: Path) -> None:
        self.server, self.data = server, data

    def __call__(self, strategy: str, out: Path, **options: Any) -> list[dict[str, Any]]:
        """Return the results of each rank."""
        out.mkdir(exist_ok=True)
        world = RANKS[strategy]
        arguments = {
            "folder": str(self.data),
            "strategy": strategy,
            "devices": world,
            "out": str(out),
        }
        self.server.run("rank_export_check:main", world=world, arguments={**arguments, **options})
        return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Gate:
    """Write the clips, before ranks could do so at once."""
    folder = tmp_path_factory.mktemp("gate")
    runs.write_clips(folder / "clips", 7)
    runs.write_pairs(folder / "pairs", 5)
    runs.write_clips(folder / "held", HELD, 50)
    save_file(tiny.net(trained=True).state_dict(), folder / "base.safetensors")
    return Gate(fork_server, folder)


@pytest.fixture(scope="module")
def alone(gate: Gate) -> dict[str, Any]:
    """Return the results of one process."""
    return gate("single", gate.data / "single")[0]


def check(result: dict[str, Any]) -> None:
    """Assert that the right export passes, and no wrong one does."""
    assert result["nothing"]["difference"] <= result["nothing"]["bound"] == TOLERANCE
    for how in FAULTS:
        assert "differ by" in result[how] and "at most 1.00e-04 in fp32; check" in result[how]
        assert "\n" not in result[how]
    assert result["unchanged"]


def test_one_process_checks_its_export(alone: dict[str, Any]) -> None:
    check(alone)
    for how in ("nothing", *FAULTS):
        report = alone[f"{how}/report"]
        assert report["passed"] == (how == "nothing") and set(report["by_task"]) == set(TASKS)
        largest = max(report["by_task"].values())
        assert largest < TOLERANCE / 2 if how == "nothing" else largest > 2 * TOLERANCE
    names = {"loss", *(f"error/{task}" for task in TASKS), *(f"error/sigma_{s}" for s in SIGMAS)}
    assert set(alone["values"]) == {f"{kind}/{n}" for kind in ("val", "val_raw") for n in names}


def test_nothing_is_left_of_the_export(alone: dict[str, Any], gate: Gate) -> None:
    left = {path.name for path in (gate.data / "single").iterdir()}
    assert "parity.json" in left and not [name for name in left if "export" in name]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_every_strategy_checks_its_export(
    gate: Gate, alone: dict[str, Any], tmp_path: Path, strategy: str
) -> None:
    result = gate(strategy, tmp_path / "out")
    for rank in result:
        check(rank)
        assert rank["values"] == result[0]["values"]
        # 5 clips on 2 ranks: none is left out, none counts twice
        assert rank["values"] == pytest.approx(alone["values"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "zero3"])
def test_bf16_has_a_measured_bound(gate: Gate, tmp_path: Path, strategy: str) -> None:
    for rank in gate(strategy, tmp_path / "out", precision="bf16-mixed"):
        assert TOLERANCE < rank["nothing"]["bound"] < 0.1
        assert rank["nothing"]["difference"] <= rank["nothing"]["bound"] / 2
        assert "in bf16; check" in rank["swap of averages"]
        assert "in bf16; check" in rank["names"]
        assert rank["unchanged"]


def test_adapters_are_merged_before_the_comparison(gate: Gate, tmp_path: Path) -> None:
    result = gate("single", tmp_path / "out", lora=True)[0]
    assert 0 < result["nothing"]["difference"] <= TOLERANCE
    assert "differ by" in result["swap of averages"] and "differ by" in result["names"]
    assert result["unchanged"]


def test_the_report_belongs_to_one_checkpoint(tmp_path: Path) -> None:
    one, other = tmp_path / "step-000001", tmp_path / "step-000002"
    assert passed_before(tmp_path, one) is None
    for passed in (True, False):
        (tmp_path / REPORT).write_text(json.dumps({"checkpoint": one.name, "passed": passed}))
        assert passed_before(tmp_path, one) is passed
        assert passed_before(tmp_path, other) is None
    (tmp_path / REPORT).write_text("{")
    assert passed_before(tmp_path, one) is None


def test_nan_does_not_pass() -> None:
    assert not Parity(float("nan"), TOLERANCE).passed
    assert not Parity(0.0, float("nan")).passed
    assert Parity(0.0, TOLERANCE).passed


def trained(folder: Path, plan: Any, **changes: Any) -> tuple[FitResult, list[dict[str, Any]]]:
    """Train a run with the export check at its end."""
    return runs.train(folder, plan, verify_export=True, net=tiny.net(trained=True), **changes)


KILLED = ("saving", "validating", "sampling", "exporting", "reporting")


def end(folder: str, strategy: str, killed: str) -> int:
    """Train two steps in a rank that kills itself at one moment of its end ("": it does not)."""
    from echolab.training.callbacks import export_check, validation
    from echolab.training.callbacks.checkpoints import Checkpoints

    def die(*given: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    write = export_check.write_atomic
    module, name, action = {
        "saving": (Checkpoints, "publish", die),
        "validating": (validation, "validate", die),
        "sampling": (export_check, "sample", die),
        "exporting": (export_check, "write_original", die),
        "reporting": (
            export_check,
            "write_atomic",
            lambda *given, **named: (write(*given, **named), die()),
        ),
        "": (export_check, "STEPS", export_check.STEPS),
    }[killed]
    setattr(module, name, action)
    devices = RANKS[strategy]
    held_out = ValData(runs.write_clips(Path(folder) / "held", 2, 50), num_clips=2, batch_size=1)
    plan, machine = (
        runs.schedule(("sft", 2)),
        Machine(strategy, devices=devices, zero3_shard_small=True),
    )
    result, rows = trained(
        Path(folder), plan, machine=machine, val_data=held_out, phases=runs.PHASES,
        intervals=Intervals(log_every=1, save_every=100, val_every=100),
    )  # fmt: skip
    print(json.dumps([result.step, result.done, [sorted(row) for row in rows]]))
    return 0


@pytest.mark.parametrize(
    ("strategy", "killed"),
    [*(("single", killed) for killed in KILLED), ("zero2", "exporting"), ("zero3", "sampling")],
)
def test_a_kill_at_the_end_of_a_run_repeats_no_step(
    fork_server: ForkServer, gate: Gate, tmp_path: Path, strategy: str, killed: str
) -> None:
    """One checkpoint is kept; only the check is repeated."""
    shutil.copytree(gate.data / "clips", tmp_path / "clips")
    shutil.copytree(gate.data / "pairs", tmp_path / "pairs")
    runs.write_clips(tmp_path / "held", 2, 50)
    arguments = {"folder": str(tmp_path), "strategy": strategy}
    first = fork_server.start(
        "test_export_check:end", world=RANKS[strategy], arguments={**arguments, "killed": killed}
    )
    while -signal.SIGKILL not in first.codes():
        assert set(first.codes()) <= {None, -signal.SIGKILL}, first.outputs()
        time.sleep(0.05)
    first.signal(signal.SIGKILL)
    first.wait()
    saved = {path.name: runs.tensors_of(path) for path in (tmp_path / "run/checkpoints").glob("s*")}
    again = fork_server.run(
        "test_export_check:end", world=RANKS[strategy], arguments={**arguments, "killed": ""}
    )
    step, done, rows = json.loads(again.output(0).splitlines()[-1])
    assert (step, done) == (2, True) and passed_before(
        tmp_path / "run", tmp_path / "run/checkpoints/step-000002"
    )
    if killed == "saving":  # nothing was published
        assert saved == {} and "train/loss" in rows[0]
        return
    assert list(saved) == ["step-000002"]
    assert not any("train/loss" in row for row in rows), rows
    if killed == "reporting":
        assert rows == []
    else:
        assert any("val/loss" in row for row in rows)
        assert any("parity/difference" in row for row in rows)
        assert "the check is repeated" in again.output(0)
    after = tmp_path / "run/checkpoints/step-000002"
    assert runs.tensors_of(after) == saved["step-000002"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(28, "No space left on device"), DiskFullError),
        (OSError(116, "Stale file handle"), StorageError),
        (StorageError("x: could not be written"), StorageError),
        (ConfigError("x"), ParityError),
    ],
)
def test_a_full_disk_is_no_verdict_on_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    def fail(*given: Any, **named: Any) -> None:
        raise error

    with monkeypatch.context() as patch, pytest.raises(kind, match="cannot be compared"):
        patch.setattr("echolab.training.callbacks.export_check.write_original", fail)
        trained(tmp_path, runs.schedule(("sft", 2)), intervals=Intervals(save_every=0))
    assert trained(tmp_path, runs.schedule(("sft", 2)), intervals=Intervals(save_every=0))[0].done


def test_a_run_is_done_only_after_the_export_check(tmp_path: Path) -> None:
    plan = runs.schedule(("sft", 4), lr=1e-2)
    settings: dict[str, Any] = {
        "intervals": Intervals(save_every=2),
        "optim": runs.Optim(ema_decay=0.9),
    }
    for how in ("swap of averages", "perturbed", "names"):
        with broken(how), pytest.raises(ParityError, match="differ by"):
            trained(tmp_path, plan, **settings)  # and so it does when it is started again
        assert passed_before(tmp_path / "run", tmp_path / "run/checkpoints/step-000004") is False
    (tmp_path / "run" / REPORT).unlink()  # killed between the last save and the gate
    result, rows = trained(tmp_path, plan, **settings)
    assert result.done and rows[-1]["parity/difference"] <= rows[-1]["parity/bound"] == TOLERANCE
    weights = runs.tensors_of(tmp_path / "run/checkpoints/step-000004")
    again, more = trained(tmp_path, plan, **settings)
    assert again.done and more == []  # what was let pass is not done again
    assert runs.tensors_of(tmp_path / "run/checkpoints/step-000004") == weights
    unbroken, _ = runs.train(tmp_path, plan, run_dir=tmp_path / "other", **settings)
    assert unbroken.done and runs.tensors_of(tmp_path / "other/checkpoints/step-000004") == weights
