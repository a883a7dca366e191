"""Damage anywhere in a checkpoint is detected, and the run resumes from the previous one."""

import json
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import runs
import saved
import tiny
import torch
from forked import ForkServer

from echolab.cli.__main__ import main as echolab
from echolab.errors import CheckpointError
from echolab.training.checkpoints.checkpoint import (
    folder_of,
    latest_valid,
    open_checkpoint,
    open_verified,
)
from echolab.training.config import Intervals


class Tiny(saved.Saver):
    """A network so small that each byte of its checkpoints can be damaged in turn."""

    def become(self, step: int) -> None:
        for tensor in self.masters.local:
            tensor.fill_(float(step))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write two checkpoints; tests damage the newer one."""
    monkeypatch.setattr(saved, "net", lambda: torch.nn.Linear(2, 1))
    saver = Tiny(tmp_path, more=())
    for step in (1, 2):
        saver.save(step)
    return tmp_path


def taken(folder: Path) -> int:
    """Return the step to resume from, and check that only the newer checkpoint is refused, in a
    line.
    """
    checkpoint, rejected = latest_valid(folder)
    assert checkpoint is not None
    if checkpoint.step == 1:
        assert len(rejected) == 1 and "step-000002" in rejected[0] and "\n" not in rejected[0]
    return checkpoint.step


def test_any_flipped_byte_is_detected(folder: Path) -> None:
    chance = random.Random(3)
    for path in sorted(folder_of(folder, 2).iterdir()):
        complete = path.read_bytes()
        for at in range(len(complete)):
            flip = 1 << chance.randrange(8) if at % 2 else chance.randrange(1, 256)
            path.write_bytes(complete[:at] + bytes([complete[at] ^ flip]) + complete[at + 1 :])
            assert taken(folder) == 1, f"byte {at} of {path.name} flipped by {flip}"
        path.write_bytes(complete)
    assert taken(folder) == 2


def test_any_cut_longer_missing_or_exchanged_file_is_detected(folder: Path) -> None:
    files = sorted(folder_of(folder, 2).iterdir())
    for path in files:
        complete = path.read_bytes()
        contents: list[bytes] = [complete[:at] for at in range(0, len(complete), 37)]
        contents += [complete[:-1], complete + b"\0", bytes(len(complete))]
        contents += [folder_of(folder, 1).joinpath(path.name).read_bytes()]
        contents += [other.read_bytes() for other in files if other != path]
        for content in contents:
            if content != complete:
                path.write_bytes(content)
                assert taken(folder) == 1
        path.unlink()
        assert taken(folder) == 1
        path.mkdir()
        assert taken(folder) == 1
        path.rmdir()
        path.write_bytes(complete)
    assert taken(folder) == 2


def test_a_renamed_checkpoint_does_not_count_as_another_step(folder: Path) -> None:
    shutil.copytree(folder_of(folder, 1), folder_of(folder, 7))
    checkpoint, rejected = latest_valid(folder)
    assert checkpoint and checkpoint.step == 2
    assert rejected == [f"{folder_of(folder, 7)}: is the checkpoint of step 1, not of its name"]


def test_older_formats_are_refused_with_an_explanation(folder: Path) -> None:
    manifest = folder_of(folder, 2) / "manifest.json"
    manifest.write_text(json.dumps({"format": 1, "files": {}}))
    with pytest.raises(CheckpointError, match="format 1, this program reads 2.*version of echolab"):
        open_checkpoint(folder_of(folder, 2))
    assert taken(folder) == 1


def test_files_outside_the_checkpoint_are_never_read(folder: Path) -> None:
    """They are not read even if the manifest's own digest fits."""
    from echolab.training.checkpoints.manifest import serialize

    path = folder_of(folder, 2) / "manifest.json"
    content = json.loads(path.read_bytes())
    content.pop("sha256")
    for name in ("../step-000001/state.json", "/etc/passwd", "state.json\n", "a/b.safetensors"):
        report = {**content["files"], name: {"bytes": 1, "sha256": ""}}
        path.write_bytes(serialize({**content, "files": report}))
        with pytest.raises(CheckpointError, match="files that are of no checkpoint"):
            open_checkpoint(path.parent)


def test_other_ranks_see_sizes_and_state_without_reading_tensors(folder: Path) -> None:
    path = folder_of(folder, 2)
    assert open_verified(path).digest == open_checkpoint(path).digest
    (path / "state.json").write_bytes((path / "state.json").read_bytes().replace(b"2", b"3"))
    with pytest.raises(CheckpointError, match="sha256"):
        open_verified(path)


# -- killed at any moment -------------------------------------------------------------------------

KILLS = 100


@pytest.mark.slow
def test_a_kill_at_any_moment_of_a_hundred_saves_leaves_a_valid_checkpoint(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    """The newest checkpoint is complete, and not older than the last one reported as published."""
    folder, report = tmp_path / "checkpoints", tmp_path / "report"
    chance, moments = random.Random(11), set()
    for number in range(KILLS):
        before = report.stat().st_size if report.exists() else 0
        arguments = {"folder": str(folder), "steps_file": str(report), "seed": number}
        process = fork_server.start("saved:save_for_ever", arguments=arguments)
        while not report.exists() or report.stat().st_size == before:
            assert process.codes() == [None], process.outputs()
            time.sleep(0.005)
        time.sleep(chance.random() * 0.15)
        process.signal(signal.SIGKILL)
        assert process.wait() == [-signal.SIGKILL]
        moments.add(_left(folder))
        published = saved.last_published(report)
        checkpoint, rejected = latest_valid(folder)
        assert not rejected, rejected
        assert (checkpoint.step if checkpoint else 0) >= published
        if checkpoint:
            saved.check(checkpoint)
    assert saved.last_published(report) > KILLS // 4  # they did save
    assert len(moments) > 3, moments  # and were killed at different moments of it


def _left(folder: Path) -> tuple[str, ...]:
    """Return how far a killed save got."""
    return tuple(sorted(p.name for one in folder.glob(".partial-*") for p in one.iterdir()))


# -- nothing is unpickled -------------------------------------------------------------------------

LOADED_BY_OTHERS = [
    "pytorch_model.bin", "model.pt", "last.ckpt", "checkpoint.ckpt", "optimizer.pt", "latest",
    "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt",
    "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "random_states_0.pkl", "scheduler.pt",
    "training_args.bin", "data.pkl", ".metadata", "__0_0.distcp", "hparams.yaml", "meta.pt",
]  # fmt: skip


class Malicious:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)


def test_a_planted_pickle_is_never_executed(tmp_path: Path) -> None:
    runs.train(tmp_path, runs.schedule(("sft", 2)), intervals=Intervals(log_every=1, save_every=1))
    run, marker = tmp_path / "run", tmp_path / "executed"
    checkpoints = run / "checkpoints"
    bait = pickle.dumps(Malicious(marker))
    zipped = tmp_path / "bait.pt"
    torch.save(Malicious(marker), zipped)
    newest, aside = checkpoints / "step-000002", tmp_path / "aside"
    shutil.copytree(newest, aside)
    for content in (bait, zipped.read_bytes()):
        for name in LOADED_BY_OTHERS:
            for target in (run, checkpoints, newest):
                (target / name).write_bytes(content)
        assert _used_by_all(newest) == 2  # such files are no part of the checkpoint and are ignored
        for name in sorted(path.name for path in aside.iterdir()):
            (newest / name).write_bytes(content)
            assert _used_by_all(newest) == 1, name
            shutil.copy(aside / name, newest / name)
    runs.train(tmp_path, runs.schedule(("sft", 3)), intervals=Intervals(log_every=1, save_every=1))
    assert not marker.exists()
    torch.load(zipped, weights_only=False)  # it would have worked
    assert marker.exists()


def _used_by_all(newest: Path) -> int:
    """Run every reader of checkpoints; return the step that a run would resume from."""
    checkpoints = newest.parent
    for words in ("inspect", "verify"):
        for path in (newest, checkpoints, checkpoints.parent):
            echolab(["checkpoint", words, str(path)])
    echolab(["checkpoint", "diff", str(newest), str(checkpoints / "step-000001")])
    with suppress(CheckpointError):
        net = tiny.net()
        net.load_state_dict(dict(open_checkpoint(newest).tensors("ema")))
    result, _ = latest_valid(checkpoints)
    assert result
    return result.step
