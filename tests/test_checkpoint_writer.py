"""Saves in the background: complete or absent, the same bytes from every rank, and clear errors."""

import json
import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import saved
import torch
from forked import ForkServer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from echolab.errors import CheckpointError, SaveError
from echolab.training.checkpoints import writer
from echolab.training.checkpoints.checkpoint import (
    folder_of,
    latest_valid,
    open_checkpoint,
    saved_steps,
)
from echolab.training.checkpoints.retention import Retention
from echolab.training.checkpoints.shard_plan import ITEM, layout
from echolab.training.checkpoints.writer import CheckpointWriter

SHAPES = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=8),
    st.lists(st.integers(1, 9), max_size=3).map(tuple),
    min_size=1,
    max_size=12,
)


@given(SHAPES, st.integers(1, 5), st.integers(4, 4000), st.integers(1, 3))
def test_every_tensor_is_in_one_file_of_each_part(
    shapes: Mapping[str, tuple[int, ...]], world: int, shard_bytes: int, parts: int
) -> None:
    named = ["master", "ema", "ema-0.5"][:parts]
    files = layout(shapes, named, world=world, shard_bytes=shard_bytes)
    sizes = {name: int(torch.Size(dims).numel()) for name, dims in shapes.items()}
    for part in named:
        own = [file for file in files if file.part == part]
        assert [name for file in own for name in file.starts] == list(shapes)
        for file in own:
            ends = [start + sizes[name] for name, start in file.starts.items()]
            assert [*file.starts.values(), file.numel] == [0, *ends]
    assert len({file.name for file in files}) == len(files)
    assert {file.writer for file in files} <= set(range(world)) and files[0].writer == 0
    total = ITEM * parts * sum(sizes.values())
    assert len({file.writer for file in files}) <= max(1, total // shard_bytes)


def test_large_networks_are_written_by_all_ranks_equally() -> None:
    shapes = {f"blocks.{i}.weight": (1536, 8960) for i in range(94)}  # 1.3 B values
    files = layout(shapes, ["master", "exp_avg", "exp_avg_sq", "ema"], world=8, shard_bytes=1 << 30)
    shares = [sum(f.numel for f in files if f.writer == rank) for rank in range(8)]
    assert max(shares) < 1.1 * min(shares)
    small = layout({"a": (9, 9)}, ["master", "ema"], world=8, shard_bytes=1 << 30)
    assert [file.writer for file in small] == [0, 0]


@given(SHAPES)
def test_safetensors_reads_the_header(
    tmp_path_factory: pytest.TempPathFactory, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    (file,) = layout(shapes, ["ema"], world=1, shard_bytes=1 << 30)
    values = torch.arange(file.numel, dtype=torch.float32)
    path = tmp_path_factory.mktemp("header") / file.name
    writer.write_file(path, [file.header(shapes), memoryview(values.numpy()).cast("B")])  # type: ignore[arg-type]
    result = load_file(path)
    assert {name: tuple(tensor.shape) for name, tensor in result.items()} == dict(shapes)
    for name, start in file.starts.items():
        assert torch.equal(result[name].flatten(), values[start : start + result[name].numel()])


def test_training_continues_while_a_save_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = saved.Saver(tmp_path)
    gate, real = threading.Event(), writer.write_file

    def slow(*given: Any) -> Any:
        assert gate.wait(60)
        return real(*given)

    monkeypatch.setattr(writer, "write_file", slow)
    assert not saver.writer.pending and not saver.writer.written() and saver.writer.finish() is None
    saver.become(1)
    saver.writer.begin(saved.state(1, saver.ema))
    assert saver.writer.pending and not saver.writer.written()
    saver.become(2)  # the network learns on
    assert saved_steps(tmp_path) == []
    gate.set()
    path = saver.writer.finish()
    assert path == tmp_path / "step-000001" and not saver.writer.pending
    saved.check(open_checkpoint(path))
    assert saver.writer.seconds > 0
    saver.save(2)  # the same memory again
    saved.check(open_checkpoint(tmp_path / "step-000002"))


def test_a_second_save_finishes_the_first(tmp_path: Path) -> None:
    saver = saved.Saver(tmp_path)
    for step in (1, 2):
        saver.become(step)
        saver.writer.begin(saved.state(step, saver.ema))
    saver.writer.finish()
    assert saved_steps(tmp_path) == [2, 1]
    for step in (1, 2):
        saved.check(open_checkpoint(folder_of(tmp_path, step)))


def test_the_size_of_files_is_bounded(tmp_path: Path) -> None:
    saver = saved.Saver(tmp_path, more=(), shard_bytes=4096)
    path = saver.save(1)
    trained = sum(p.numel() for p in saver.net.parameters() if p.requires_grad)
    size = sum(file.stat().st_size for file in path.iterdir())
    assert 16 * trained <= size <= 1.05 * 16 * trained + 2**20
    manifest = json.loads((path / "manifest.json").read_bytes())
    assert manifest["tied"] == {"again.weight": "first.weight"}
    assert "base" not in manifest["parameters"]  # frozen: it is no part of the checkpoint
    assert sum(torch.Size(dims).numel() for dims in manifest["parameters"].values()) == trained


def test_a_trained_parameter_without_an_optimizer_is_refused(tmp_path: Path) -> None:
    saver = saved.Saver(tmp_path)
    saver.masters.optimizer.param_groups[0]["params"].pop()
    saver.masters.__dict__.pop("pieces")
    with pytest.raises(CheckpointError, match="wide.weight: 2107 values are trained, .* 0 of them"):
        CheckpointWriter(tmp_path, saver.masters, saver.ema, keep=saved.keep_all)


def test_leftovers_of_killed_saves_are_removed_and_a_replaced_checkpoint_is_restored(
    tmp_path: Path,
) -> None:
    saved.Saver(tmp_path).save(3)
    (tmp_path / ".partial-step-000009").mkdir()
    (tmp_path / ".partial-step-000009/ema-00001-of-00001.safetensors").write_bytes(b"half")
    (tmp_path / "step-000003").rename(tmp_path / ".replaced-step-000003")
    saved.Saver(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]
    saved.Saver(tmp_path).save(3)  # in the place of the first
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]
    saved.check(open_checkpoint(tmp_path / "step-000003"))


# -- what stays -------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from(["valid", "damaged", "kept", "kept damaged"]), max_size=7),
    st.integers(0, 3),
)
def test_at_least_two_valid_checkpoints_are_kept(
    tmp_path_factory: pytest.TempPathFactory, before: list[str], newest: int
) -> None:
    folder = tmp_path_factory.mktemp("retention")
    for step, kind in enumerate(before):
        saved.Saver(folder).save(step)
        if "damaged" in kind:
            file = next(folder_of(folder, step).glob("exp_avg-*"))
            file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    kept = {step for step, kind in enumerate(before) if "kept" in kind}
    last = len(before)
    saver = saved.Saver(folder, keep=kept.__contains__, newest=newest)
    saver.save(last)
    valid = [last, *(s for s in range(last - 1, -1, -1) if "damaged" not in before[s])]
    left = saved_steps(folder)
    oldest = valid[: max(newest, 2)][-1]  # of those that must stay
    assert len(valid) > 1 or left == [last, *range(last - 1, -1, -1)]
    expected = {step for step in range(last + 1) if step >= oldest or step in kept}
    assert set(left) == (expected if len(valid) >= max(newest, 2) else set(range(last + 1)))


def test_checkpoints_above_the_last_step_are_kept(tmp_path: Path) -> None:
    saver = saved.Saver(tmp_path)
    for step in (1, 2, 3, 8, 9):
        saver.save(step)
    Retention(tmp_path, lambda step: False).prune(3)
    assert saved_steps(tmp_path) == [9, 8, 3, 2]


# -- disks ------------------------------------------------------------------------------------


class Disk:
    """A disk with a given statvfs."""

    f_frsize, f_files = 512, 100

    def __init__(self, free: int, inodes: int) -> None:
        self.f_bavail, self.f_favail = free // self.f_frsize, inodes


def test_disk_space_is_checked_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = saved.Saver(tmp_path)
    saver.save(1)
    size = saver.writer.size
    real = os.statvfs
    for disk, words in [
        (Disk(size, 99), rf"needs [\d,]+ bytes, {size // 512 * 512:,} are free; make room"),
        (Disk(10 * size, 3), r"needs \d+ inodes, 3 are free; remove files"),
    ]:
        monkeypatch.setattr(writer.os, "statvfs", lambda path, here=disk: here)
        with pytest.raises(SaveError, match=words) as caught:
            saver.save(2)
        assert "\n" not in str(caught.value) and not saver.writer.pending
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    monkeypatch.setattr(writer.os, "statvfs", lambda path: Disk(int(1.5 * size), 99))
    with pytest.raises(SaveError, match="make room"):
        saver.writer.check_start()  # enough for one, not for two
    monkeypatch.setattr(writer.os, "statvfs", real)
    saver.writer.check_start()
    saver.save(2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("seen", [True, False], ids=["seen before", "fills meanwhile"])
def test_a_full_disk_loses_one_save(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, seen: bool
) -> None:
    saver = saved.Saver(small_disk)
    saver.save(1)
    ballast = small_disk / "ballast"
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    ballast.write_bytes(b"\0" * (free - 20_000))
    with monkeypatch.context() as patched:
        if not seen:  # another process takes the space between the check and the write
            patched.setattr(writer, "check_room", lambda *given: None)
        words = "a checkpoint needs .* are free" if seen else "No space left on device.*make room"
        with pytest.raises(CheckpointError, match=words) as caught:
            saver.save(2)
    assert "\n" not in str(caught.value)
    checkpoint, rejected = latest_valid(small_disk)
    assert checkpoint and checkpoint.step == 1 and not rejected
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast", "step-000001"]
    ballast.unlink()
    saver.save(2)
    saved.check(open_checkpoint(small_disk / "step-000002"))


# -- several ranks ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("at", "words"), [("write", "rank 1: this rank cannot"), ("memory", "")])
def test_a_failure_of_one_rank_is_raised_on_all(
    fork_server: ForkServer, tmp_path: Path, at: str, words: str
) -> None:
    """Its clock is off by decades too: no name depends on a clock."""
    arguments = {"out": str(tmp_path), "at": at}
    fork_server.run("saved:save_with_fault", world=2, arguments=arguments)
    report = {(tmp_path / f"report-{rank}").read_text() for rank in (0, 1)}
    assert len(report) == 1
    assert (words or "no host memory to save from (this rank cannot)") in report.pop()
    saw = {(tmp_path / f"saw-{rank}").read_text() for rank in (0, 1)}
    assert len(saw) == 1 and "is not the checkpoint that rank 0 opened" in saw.pop()
    checkpoint, rejected = latest_valid(tmp_path)
    assert checkpoint and checkpoint.step == 3 and not rejected
    assert saved_steps(tmp_path) == [3, 1]
    for step in (1, 3):
        saved.check(open_checkpoint(folder_of(tmp_path, step)))
