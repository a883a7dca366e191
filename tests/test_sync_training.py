"""Training of SyncNet: loss and accuracies by hand, learning, resume, ranks, export, refusals."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import sync_runs
import torch
from forked import ForkServer
from torch import nn

from echolab.config.check import check
from echolab.config.compose import compose
from echolab.config.networks import export_sync
from echolab.data.shard_reader import ShardDataset, open_dataset
from echolab.data.shard_writer import ShardWriter
from echolab.errors import ConfigError, DataError
from echolab.fitting import load_net
from echolab.metrics.demo_networks import SyncNetDemo, contrastive_loss
from echolab.metrics.networks.syncnet import SyncNet
from echolab.metrics.sync_clips import HELD_OUT, check_talkers, read_talker
from echolab.metrics.sync_training import (
    clip_losses,
    embed_talkers,
    shift_accuracies,
    sync_network,
    with_half_squares,
)
from echolab.tracking.report import assign_colors, curve_sections
from echolab.training.checkpoints.checkpoint import open_checkpoint
from echolab.training.config import Intervals
from echolab.training.datamodule import ValData
from echolab.training.engine.ema import Ema
from echolab.training.engine.master_weights import Masters, masters_of

HERE = Path(__file__).parent
EVERY = Intervals(log_every=1, save_every=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with drawn talkers, which all runs of this file read."""
    folder = tmp_path_factory.mktemp("sync")
    sync_runs.talkers(folder / "clips", 12)
    sync_runs.talkers(folder / "held", 5, first=500)
    return folder


def units(*shape: int, seed: int = 0) -> torch.Tensor:
    vectors = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=-1)


# -- loss and accuracy -----------------------------------------------------------------------------


def test_the_loss_of_two_clips_of_three_windows_by_hand() -> None:
    lips, audio, scale = units(2, 3, 4), units(2, 3, 4, seed=1), 3.0
    a, b = lips.double().numpy(), audio.double().numpy()

    def entropy(logits: np.ndarray, target: int) -> float:
        return math.log(sum(math.exp(v) for v in logits)) - float(logits[target])

    # Within each clip, both directions; across clips, the first window of each.
    within = sum(
        entropy(scale * a[clip, i] @ b[clip].T, i) + entropy(scale * b[clip, i] @ a[clip].T, i)
        for clip in range(2)
        for i in range(3)
    ) / 6  # fmt: skip
    across = sum(
        entropy(scale * a[clip, 0] @ b[:, 0].T, clip)
        + entropy(scale * b[clip, 0] @ a[:, 0].T, clip)
        for clip in range(2)
    ) / 2  # fmt: skip
    loss = contrastive_loss(lips, audio, torch.tensor(scale))
    assert float(loss) == pytest.approx(within + across, rel=1e-5)
    # The held-out loss of a clip is the part within it.
    losses = clip_losses(lips, audio, torch.tensor(scale))
    assert float(losses.mean()) == pytest.approx(within, rel=1e-5)
    alone = clip_losses(lips[1:], audio[1:], torch.tensor(scale))
    assert float(losses[1]) == pytest.approx(float(alone[0]), rel=1e-6)


def test_products_of_syncnets_vectors_are_minus_half_squared_distances() -> None:
    lips, audio = 9 * units(1, 4, 6), 7 * units(1, 5, 6, seed=1)
    products = with_half_squares(lips, first=True) @ with_half_squares(audio, first=False).mT
    torch.testing.assert_close(products, -torch.cdist(lips, audio).square() / 2)


def test_accuracies_by_shift_of_planted_vectors() -> None:
    windows = torch.eye(8)[None]
    assert shift_accuracies(windows, windows)[0].tolist() == [1.0, 1.0, 1.0, 1.0]
    # Audio that is one frame late: another window is always closer, and by shift 1 it is the true
    # one in one direction, a tie in the other.
    late = windows.roll(1, 1)
    first, one, two, five = shift_accuracies(windows, late)[0].tolist()
    assert first == 0.0 and two == five == 0.5
    assert one == pytest.approx(0.5 * 7 / 14), "7 losses against the later audio, 7 ties"
    # Constant vectors: ties everywhere.
    same = torch.ones(1, 8, 3)
    assert shift_accuracies(same, same)[0].tolist() == [0.5] * 4
    assert shift_accuracies(windows[:, :4], windows[:, :4])[0].isnan().tolist()[1:] == [
        False, False, True,
    ]  # fmt: skip


# -- reading ---------------------------------------------------------------------------------------


def test_spans_are_a_function_of_seed_epoch_and_key(root: Path) -> None:
    dataset = sync_runs.talkers(root / "clips", 12)

    def read(epoch: int, seed: int = 0) -> torch.Tensor:
        talker = read_talker(dataset, 1, epoch, architecture=sync_runs.SMALL, seed=seed)
        assert talker.crops.shape == (17, 3, 24, 32) and talker.cepstra.shape == (67, 13)
        return talker.crops

    assert torch.equal(read(4), read(4))
    assert not torch.equal(read(4), read(5)) and not torch.equal(read(4), read(4, seed=1))
    assert torch.equal(read(HELD_OUT), read(HELD_OUT, seed=1))


def test_both_networks_embed_as_many_windows_as_the_published_evaluation(root: Path) -> None:
    dataset = sync_runs.talkers(root / "clips", 12)
    for architecture, features in ((sync_runs.SMALL, 32), (sync_runs.PUBLISHED, 1026)):
        talker = read_talker(dataset, 0, HELD_OUT, architecture=architecture, seed=0)
        net = sync_network(architecture, 0).eval()
        pixels = talker.crops[None].float() / 127.5 - 1
        with torch.no_grad():
            lips, audio = embed_talkers(net, pixels, talker.cepstra[None])
        assert lips.shape == audio.shape == (1, architecture["frames"] - 5, features)


def write(folder: Path, members: dict[str, bytes]) -> ShardDataset:
    # As of another kind, which may lack members.
    with ShardWriter(folder, kind="partial", samples_per_shard=3) as writer:
        writer.write("talker", members)
    dataset = open_dataset(folder)
    dataset.kind = "raw"
    return dataset


def test_unusable_datasets_are_refused(tmp_path: Path, root: Path) -> None:
    intact = sync_runs.talkers(root / "clips", 12).read(0)
    long = {**sync_runs.SMALL, "frames": 26}
    with pytest.raises(DataError, match=r"has 25 frames, model\.frames=26; prepare longer"):
        check_talkers(sync_runs.talkers(root / "clips", 12), long)
    for n, name in enumerate(("flac", "tracks.npz")):
        lacking = write(tmp_path / f"{n}", {k: v for k, v in intact.items() if k != name})
        with pytest.raises(DataError, match=f"sample talker: has no {name}"):
            check_talkers(lacking, sync_runs.SMALL)
    short = sync_runs.talkers(tmp_path / "short", 1, frames=5).read(0)["flac"]
    with pytest.raises(DataError, match="3200 audio samples, 25 frames need 16000"):
        check_talkers(write(tmp_path / "a", {**intact, "flac": short}), sync_runs.SMALL)
    with pytest.raises(DataError, match="cannot be decoded"):
        check_talkers(write(tmp_path / "b", {**intact, "mp4": b"no video"}), sync_runs.SMALL)
    with pytest.raises(DataError, match="kind encoded, need raw"):
        check_talkers(runs.write_clips(tmp_path / "encoded", 1), sync_runs.SMALL)


# -- training --------------------------------------------------------------------------------------


def test_training_improves_the_accuracies_and_the_export_has_the_averaged_weights(
    root: Path, tmp_path: Path
) -> None:
    held = ValData(sync_runs.talkers(root / "held", 5, first=500), num_clips=5, batch_size=5)
    result, rows = sync_runs.train(
        root, 40, run_dir=tmp_path / "run", val_data=held,
        intervals=Intervals(log_every=10, save_every=0, val_every=5),
    )  # fmt: skip
    held_out = [row for row in rows if "val/loss" in row]
    assert [row["step"] for row in held_out] == list(range(5, 41, 5))
    first, last = held_out[0], held_out[-1]
    assert last["val/loss"] < 0.8 * first["val/loss"]
    assert last["val/accuracy/shift_0"] > first["val/accuracy/shift_0"] + 0.1
    assert last["val/accuracy/shift_5"] > 0.75 and last["val/accuracy/shift_1"] > 0.6
    trained = [row["train/sync_accuracy"] for row in rows if "train/loss" in row]
    assert trained[0] < trained[-1]
    assert not any(name.startswith("tasks/") for row in rows for name in row)
    # The exported network is read as those of the demo, and has the averaged weights.
    assert result.checkpoint
    checkpoint = open_checkpoint(result.checkpoint)
    file = export_sync(checkpoint, tmp_path / "net.safetensors")
    state = load_net(file, SyncNetDemo).state_dict()
    average = checkpoint.tensors("ema")
    assert state.keys() == average.keys() and "cepstra_mean" in state
    assert all(torch.equal(state[name], average[name]) for name in state)
    # The report shows one chart of the accuracies.
    page = curve_sections({"run": rows}, assign_colors(["run"]))
    assert "closer than ±5 frames" in page["Lip sync"] and "shift" not in page["Other metrics"]


def losses(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in rows]


def test_a_killed_run_resumes_bit_equal(root: Path, tmp_path: Path) -> None:
    unbroken, rows = sync_runs.train(root, 5, run_dir=tmp_path / "a", intervals=EVERY)
    program = (
        "import os, sys, signal; sys.path.insert(0, sys.argv[1]); import sync_runs\n"
        "from pathlib import Path; from echolab.training.config import Intervals\n"
        "kill = lambda step, steps: step == 3 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "sync_runs.train(Path(sys.argv[2]), 5, run_dir=Path(sys.argv[3]), on_step=kill,\n"
        "    intervals=Intervals(log_every=1, save_every=2))\n"
    )
    words = [sys.executable, "-c", program, str(HERE), str(root), str(tmp_path / "b")]
    assert subprocess.run(words, timeout=600).returncode == -signal.SIGKILL
    resumed, late = sync_runs.train(root, 5, run_dir=tmp_path / "b", intervals=EVERY, num_workers=1)
    assert losses(late) == losses(rows)[2:]
    assert unbroken.checkpoint and resumed.checkpoint
    assert runs.tensors_of(unbroken.checkpoint) == runs.tensors_of(resumed.checkpoint)


def test_running_statistics_are_in_every_part_of_a_checkpoint(tmp_path: Path) -> None:
    def network(seed: int) -> tuple[nn.Module, Masters, Ema]:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        return net, masters_of(net, optimizer), Ema(0.5)

    net, masters, ema = network(0)
    assert list(masters.buffers) == ["1.running_mean", "1.running_var"]
    masters.prepare()
    ema.start(masters)
    net(torch.randn(8, 3)).square().sum().backward()
    masters.optimizer.step()
    ema.update(masters)
    before, average = net[1].running_var.clone(), ema.flats["ema"][-1].clone()
    assert not torch.equal(before, torch.ones(4)) and not torch.equal(before, average)
    # Applied for validation, and restored bit for bit afterwards.
    with ema.applied(masters):
        assert torch.equal(net[1].running_var, average)
    assert torch.equal(net[1].running_var, before)
    tensors = {
        part: {n: masters.full_tensor(n, masters.flats(part)).clone() for n in masters.shapes}
        for part in ("master", "exp_avg")
    }
    # Another network takes all of it.
    other, restored, _ = network(1)
    restored.prepare()
    for part, values in tensors.items():
        restored.fill(restored.flats(part), values)
    restored.show(restored.local)
    for name, value in net.state_dict().items():
        counts = name.endswith("num_batches_tracked")
        assert counts or torch.equal(value, other.state_dict()[name]), name


@pytest.mark.slow
def test_batch_norm_is_saved_averaged_resumed_and_exported(root: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"architecture": sync_runs.PUBLISHED, "batch_size": 2}
    unbroken, _ = sync_runs.train(root, 3, run_dir=tmp_path / "a", **how)

    def interrupt(step: int, steps: int) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    first, _ = sync_runs.train(root, 3, run_dir=tmp_path / "b", on_step=interrupt, **how)
    assert not first.done and first.step == 2
    second, _ = sync_runs.train(root, 3, run_dir=tmp_path / "b", **how)
    assert unbroken.checkpoint and second.checkpoint
    assert runs.tensors_of(unbroken.checkpoint) == runs.tensors_of(second.checkpoint)
    # Running statistics have moved, and the average lies between their start and their end.
    checkpoint = open_checkpoint(unbroken.checkpoint)
    name = "netcnnlip.1.running_var"
    master, average = checkpoint.tensors("master")[name], checkpoint.tensors("ema")[name]
    assert (master - 1).abs().max() > 1e-3 and not torch.equal(master, average)
    net = load_net(export_sync(checkpoint, tmp_path / "net.safetensors"), SyncNet)
    assert torch.equal(net.state_dict()[name], average)


@pytest.mark.parametrize("network", ["small", pytest.param("published", marks=pytest.mark.slow)])
def test_two_ranks_equal_one_process(
    root: Path, tmp_path: Path, network: str, fork_server: ForkServer
) -> None:
    words = [str(root), str(tmp_path / "two"), network]
    fork_server.run("sync_runs:main", world=2, arguments={"words": words})
    rows = json.loads((tmp_path / "two/rows.json").read_text())
    small = network == "small"
    architecture = sync_runs.SMALL if small else sync_runs.PUBLISHED
    _, alone = sync_runs.train(
        root, 3, architecture, run_dir=tmp_path / "one", **sync_runs.how(root, small)
    )
    for row, expected in zip(rows, alone, strict=True):
        names = [n for n in expected if n.startswith(("train/", "val/loss", "val/accuracy"))]
        # Batch norm: each rank's statistics are those of its own clips, and their mean is kept.
        names = names if small else [n for n in names if n.startswith("train/")]
        assert {n: row[n] for n in names} == pytest.approx(
            {n: expected[n] for n in names}, rel=1e-4, abs=1e-6
        )


# -- settings --------------------------------------------------------------------------------------


def settings(*words: str) -> dict[str, Any]:
    return check(compose(["experiment=demo_syncnet", *words]))


def test_the_experiments_are_valid_and_others_are_refused() -> None:
    assert settings()["model"]["network"] == "SyncNetDemo"
    published = compose(["experiment=syncnet", "data.clips=x"])
    assert published["model"]["network"] == "SyncNet"
    for words, message in (
        (["trainer.strategy=zero2", "trainer.devices=2"], "trainer.strategy=zero2: SyncNet cannot"),
        (["verify_export=true"], "verify_export=true: SyncNet cannot"),
        (["schedule.epochs=[{kind: sft, steps: 2}]"], "this model cannot; use sync epochs"),
        (["model.frames=4"], "model.frames=4: must be a whole number, at least 12"),
        (["model.heads=4"], "model.heads"),
        (["model=demo"], "use model=syncnet"),
    ):
        with pytest.raises(ConfigError) as caught:
            settings(*words)
        assert message in str(caught.value)
