"""`echolab checkpoint`: its reports and exit codes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import saved
import torch

from echolab.cli.__main__ import main
from echolab.training.checkpoints.checkpoint import folder_of
from echolab.training.engine.master_weights import MASTER


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Save two checkpoints in a run folder."""
    saver = saved.Saver(tmp_path / "run/checkpoints")
    for step in (3, 4):
        saver.save(step)
    return tmp_path / "run"


def result_of(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["checkpoint", *map(str, words), "format=json"])
    return code, json.loads(capsys.readouterr().out)


def test_inspect_prints_the_saved_contents(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = folder_of(run / "checkpoints", 4)
    for path in (run, run / "checkpoints", newest):
        code, result = result_of(capsys, "inspect", path)
        assert code == 0 and result["path"] == str(newest) and result["step"] == 4
    assert list(result["parts"]) == ["ema", "ema-0.5", "exp_avg", "exp_avg_sq", MASTER]
    net = saved.net()
    trained = [p for p in net.parameters() if p.requires_grad]
    assert result["parameters"]["values"] == sum(p.numel() for p in trained)
    assert result["parameters"]["tensors"] == len(trained)
    assert result["bytes"] == sum(file.stat().st_size for file in newest.iterdir())
    assert result["ema"] == {"decay": 0.9, "more": [0.5], "widths": [], "updates": 4}
    assert result["schedule"] == {
        "epoch": 1, "epochs": 1, "kind": "sft", "within": 4, "epoch_steps": 10**6, "steps": 10**6,
    }  # fmt: skip
    assert main(["checkpoint", "inspect", str(run)]) == 0
    text = capsys.readouterr().out
    assert "step 4 of 1000000: epoch 1 of 1 (sft)" in text and "again.weight" not in text


def test_verify_prints_a_line_for_each_fault(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert result_of(capsys, "verify", run)[1]["faults"] == []
    newest = folder_of(run / "checkpoints", 4)
    (newest / "state.json").write_text("{}")
    next(newest.glob("ema-0.5-*")).unlink()
    assert main(["checkpoint", "verify", str(run)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "missing" in lines[0] and "state.json: 2 bytes" in lines[1]
    code, result = result_of(capsys, "verify", newest)
    assert code == 1 and not result["valid"] and result["faults"] == lines
    (newest / "manifest.json").unlink()
    code, result = result_of(capsys, "verify", run)
    assert code == 1 and "no complete checkpoint" in result["faults"][0]
    assert result_of(capsys, "verify", folder_of(run / "checkpoints", 3))[0] == 0


def test_diff_ignores_the_origin(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run / "checkpoints"
    other = saved.Saver(run.parent / "other", shard_bytes=4096)  # in more files
    other.become(4)
    other.writer.begin(saved.state(4, other.ema, origin={"world": 64, "masters": "other"}))
    other.writer.finish()
    code, result = result_of(capsys, "diff", a, run.parent / "other")
    assert code == 0 and result["same"] and result["origin"]["b"]["world"] == 64
    assert main(["checkpoint", "diff", str(a), str(run.parent / "other")]) == 0
    assert "world 64" in capsys.readouterr().out


def test_diff_reports_a_difference_of_one_bit(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = saved.Saver(run.parent / "other")
    other.become(4)
    weight = other.net.wide.weight.data
    weight.view(torch.int32)[2, 3] ^= 1
    other.masters.flats("exp_avg")[2].zero_()  # the first bias
    other.writer.begin(saved.state(4, other.ema, seed=3))
    other.writer.finish()
    code, result = result_of(capsys, "diff", run, run.parent / "other")
    assert code == 1 and not result["same"]
    moment, master = result["tensors"]
    assert (moment["part"], moment["name"], moment["different"]) == ("exp_avg", "first.bias", 7)
    assert moment["largest"] == 4.125
    assert (master["part"], master["name"]) == (MASTER, "wide.weight")
    assert (master["different"], master["of"], master["largest"]) == (1, 2107, 2**-21)
    assert result["state"] == [{"key": "seed", "b": 3}]
    assert main(["checkpoint", "diff", str(run), str(run.parent / "other")]) == 1
    text = capsys.readouterr().out
    assert "state seed: missing | 3" in text and "1 of 2,107 values differ, by up to" in text


def test_diff_reports_a_different_sign_of_zero(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("plus", 0.0), ("minus", -0.0)):
        saver = saved.Saver(run.parent / name)
        saver.become(1)
        saver.net.gain.data.fill_(value)
        saver.writer.begin(saved.state(1, saver.ema))
        saver.writer.finish()
    code, result = result_of(capsys, "diff", run.parent / "plus", run.parent / "minus")
    assert code == 1
    assert [(t["name"], t["different"], t["largest"]) for t in result["tensors"]] == [
        ("gain", 1, 0)
    ]


def test_a_folder_without_checkpoints_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "inspect", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}: no checkpoint there" in error and error.count("\n") == 1
    shutil.rmtree(tmp_path)
    assert main(["checkpoint", "look", "x"]) == 1
    assert "use inspect, verify, diff" in capsys.readouterr().err
