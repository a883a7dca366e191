"""A checkpoint on disk: complete fp32 tensors by name, verified byte by byte."""

import json
import shutil
from pathlib import Path

import pytest
import runs
import tiny
import torch

from echolab.errors import CheckpointError, ConfigError, EcholabError
from echolab.training.checkpoints.checkpoint import (
    PARTS,
    latest_valid,
    open_checkpoint,
    saved_steps,
)
from echolab.training.config import Intervals

EVERY = Intervals(log_every=1, save_every=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    runs.train(folder, runs.schedule(("sft", 6)), intervals=EVERY)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def test_every_tensor_is_complete_fp32_and_named(run: Path) -> None:
    checkpoint = open_checkpoint(run / "run/checkpoints/step-000006")
    shapes = {name: tuple(p.shape) for name, p in tiny.net().named_parameters()}
    for part in PARTS:
        tensors = checkpoint.tensors(part)
        assert {name: tuple(t.shape) for name, t in tensors.items()} == shapes
        assert all(t.dtype is torch.float32 for t in tensors.values())
    assert checkpoint.step == 6 and checkpoint.state["optimizer_updates"] == 6
    assert set(open_checkpoint(checkpoint.path).tensors("ema")) == set(shapes)


def test_old_checkpoints_are_removed_and_epoch_boundaries_stay(tmp_path: Path) -> None:
    plan = runs.schedule(("sft", 3), ("dpo", 3), ("sft", 6))
    runs.train(tmp_path, plan, intervals=Intervals(log_every=0, save_every=1))
    assert saved_steps(tmp_path / "run/checkpoints") == [12, 11, 6, 3]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "no manifest", "other state"])
@pytest.mark.parametrize("part", ["ema", "exp_avg"])
def test_a_damaged_checkpoint_is_skipped(run: Path, damage: str, part: str) -> None:
    folder = run / "run/checkpoints"
    file = folder / "step-000006" / f"{part}-00001-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "remove":
        file.unlink()
    elif damage == "no manifest":
        (folder / "step-000006/manifest.json").unlink()
    else:
        (folder / "step-000006/state.json").write_text("{}")
    checkpoint, rejected = latest_valid(folder)
    assert checkpoint and checkpoint.step == 4
    assert len(rejected) == 1 and "step-000006" in rejected[0]
    result, rows = runs.train(run, runs.schedule(("sft", 6)), intervals=EVERY)
    assert result.done and [row["step"] for row in rows] == [5, 6]


def test_a_checkpoint_of_another_network_is_refused(run: Path) -> None:
    wider = tiny.net(dim=72)
    with pytest.raises(CheckpointError, match="of another network: patch_embedding"):
        runs.train(run, runs.schedule(("sft", 8)), net=wider)
    path = run / "run/checkpoints/step-000006"
    with pytest.raises(CheckpointError, match="num_layers is 2 there, 3 here"):
        from echolab.training.checkpoints.checkpoint import check_architecture

        check_architecture(open_checkpoint(path), {**runs.ARCHITECTURE, "num_layers": 3})


def test_a_checkpoint_of_another_seed_or_schedule_is_refused(run: Path) -> None:
    with pytest.raises(EcholabError, match="seed was 0, now 1"):
        runs.train(run, runs.schedule(("sft", 8)), seed=1)
    with pytest.raises(ConfigError, match="what is still to come"):
        runs.train(run, runs.schedule(("dpo", 8)))


def test_a_failed_save_ends_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from echolab.training.checkpoints import writer

    def full(path: Path, contents: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(writer, "write_file", full)
    with pytest.raises(CheckpointError, match="No space left.*make room"):
        runs.train(tmp_path, runs.schedule(("sft", 2)))
    assert not any((tmp_path / "run/checkpoints").iterdir())


def test_the_state_is_plain_json(run: Path) -> None:
    state = open_checkpoint(run / "run/checkpoints/step-000006").state
    assert json.loads(json.dumps(state)) == state
