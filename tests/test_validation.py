"""Held-out loss: each clip once for any number of ranks, always the same noise, and no side
effects.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
from torch import nn

from echolab.data.shard_reader import ShardDataset
from echolab.diffusion.flow import interpolate, velocity_target
from echolab.diffusion.sigmas import draw_noise
from echolab.errors import ConfigError
from echolab.training.callbacks import validation
from echolab.training.callbacks.validation import FILLS_UP, Share, places_of, read_share, validate
from echolab.training.config import Intervals
from echolab.training.datamodule import ValData
from echolab.training.engine.ema import Ema
from echolab.training.engine.master_weights import MOMENTS, Masters, masters_of

CLIPS = 5
CPU = torch.device("cpu")
SIGMAS = (0.1, 0.5, 0.9)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    """Write random encoded clips."""
    return runs.write_clips(tmp_path_factory.mktemp("held") / "clips", CLIPS)


class Learner:
    """A network with dropout, its optimizer and average, and a step that draws from torch."""

    def __init__(self) -> None:
        self.net = tiny.net(trained=True)
        for block in self.net.blocks:
            block.ffn.append(nn.Dropout(0.2))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        self.masters: Masters = masters_of(self.net, self.optimizer)
        self.masters.prepare()
        self.ema = Ema(0.5)
        self.ema.start(self.masters)

    def step(self) -> float:
        batch = tiny.batch(2, seed=random.randrange(100))
        noise, level = torch.randn_like(batch.latents), torch.rand(2)
        noisy = interpolate(batch.latents, noise, level)
        velocity = self.net(noisy, level * 1000, batch.conditions)
        loss = (velocity - velocity_target(batch.latents, noise)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.ema.update(self.masters)
        return loss.item()

    def look(self, share: Share, **changes: Any) -> dict[str, float]:
        settings = {"seed": 3, "device": CPU, **changes}
        return dict(
            validate(self.net, self.ema, self.masters, share, runs.PHASES, SIGMAS, **settings)
        )

    def everything(self) -> Iterator[tuple[str, Any]]:
        """Return all state that training depends on."""
        for name, parameter in self.net.named_parameters():
            yield name, parameter.detach().clone()
            yield f"{name}.grad", None if parameter.grad is None else parameter.grad.clone()
            yield f"{name}.requires_grad", parameter.requires_grad
        for part in MOMENTS:
            for number, tensor in enumerate(self.masters.flats(part)):
                yield f"{part}/{number}", tensor.clone()
        for part, tensors in self.ema.flats.items():
            for number, tensor in enumerate(tensors):
                yield f"{part}/{number}", tensor.clone()
        for name, module in self.net.named_modules():
            yield f"{name}.training", module.training
        yield "torch", torch.get_rng_state()
        yield "numpy", np.random.get_state()[1].tolist()  # type: ignore[union-attr,index]
        yield "python", random.getstate()


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def seeded() -> Learner:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    return Learner()


def test_validation_restores_all_state(clips: ShardDataset) -> None:
    learner = seeded()
    learner.step()
    learner.net.text_embedding.eval()  # a part in eval mode, as if frozen
    learner.net.head.requires_grad_(False)
    before = dict(learner.everything())
    learner.look(read_share(ValData(clips)))
    after = dict(learner.everything())
    assert before.keys() == after.keys()
    assert [name for name in before if not same(before[name], after[name])] == []


def test_validation_restores_all_state_after_an_error(
    clips: ShardDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = seeded()
    learner.step()
    before = dict(learner.everything())

    def fail(*args: object, **kwargs: object) -> None:
        torch.rand(3), np.random.rand(3), random.random()
        raise RuntimeError("an error on the way")

    monkeypatch.setattr(validation, "held_out_errors", fail)
    with pytest.raises(RuntimeError, match="an error on the way"):
        learner.look(read_share(ValData(clips)))
    after = dict(learner.everything())
    assert [name for name in before if not same(before[name], after[name])] == []


def test_validation_does_not_change_training(clips: ShardDataset) -> None:
    plain = seeded()
    losses = [plain.step() for _ in range(4)]
    watched, share = seeded(), read_share(ValData(clips))
    seen = []
    for _ in range(4):
        seen.append(watched.step())
        watched.look(share)
    assert seen == losses and len(set(losses)) == 4


def by_hand(net: nn.Module, clips: ShardDataset, task: str, sigma: float, seed: int) -> list[float]:
    """Compute the definition clip by clip: noise of (seed, key), all conditions given, position
    by position.
    """
    values = []
    for i in range(len(clips)):
        batch = validation.collate_clips(clips, [validation.read_clip(clips, i, task)])
        noise = draw_noise(batch.keys, tiny.SHAPE, seed=seed, epoch=-1).noise
        level = torch.full((1,), sigma)
        given, weights = runs.PHASES(batch.conditions, 1000 * level, torch.zeros(1, 2))
        with torch.no_grad():
            velocity = net(interpolate(batch.latents, noise, level), 1000 * level, given, weights)
        squares = (velocity - velocity_target(batch.latents, noise)).square().mean(1, keepdim=True)
        values.append(float((squares * batch.weight).sum() / batch.weight.sum()))
    return values


def test_values_equal_the_means_of_the_definition(clips: ShardDataset) -> None:
    learner = seeded()
    for _ in range(3):
        learner.step()
    values = learner.look(read_share(ValData(clips, tasks=("i2v", "lip_sync"))))
    learner.net.eval()
    table = {
        (task, sigma): by_hand(learner.net, clips, task, sigma, seed=3)
        for task in ("i2v", "lip_sync")
        for sigma in SIGMAS
    }
    everything = [error for errors in table.values() for error in errors]
    assert values["val_raw/loss"] == pytest.approx(np.mean(everything), rel=1e-5)
    one = [error for (task, _), errors in table.items() if task == "lip_sync" for error in errors]
    assert values["val_raw/error/lip_sync"] == pytest.approx(np.mean(one), rel=1e-5)
    level = [error for (_, sigma), errors in table.items() if sigma == 0.5 for error in errors]
    assert values["val_raw/error/sigma_0.5"] == pytest.approx(np.mean(level), rel=1e-5)
    with learner.ema.applied(learner.masters):
        average = by_hand(learner.net, clips, "i2v", 0.9, seed=3)
        average += by_hand(learner.net, clips, "lip_sync", 0.9, seed=3)
    assert values["val/error/sigma_0.9"] == pytest.approx(np.mean(average), rel=1e-5)
    assert values["val/loss"] != pytest.approx(values["val_raw/loss"], rel=1e-3)
    names = {"loss", "error/i2v", "error/lip_sync", *(f"error/sigma_{s:g}" for s in SIGMAS)}
    assert set(values) == {f"{kind}/{name}" for kind in ("val", "val_raw") for name in names}


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
def test_every_clip_counts_once_and_all_ranks_do_equal_work(clips: ShardDataset, rows: int) -> None:
    shares = [read_share(ValData(clips, batch_size=2), row, rows) for row in range(rows)]
    counted = sorted(p for share in shares for _, ps in share.batches for p in ps if p != FILLS_UP)
    assert counted == list(range(2 * CLIPS))
    sizes = {tuple(len(batch.keys) for batch, _ in share.batches) for share in shares}
    assert len(sizes) == 1 and all(len(ps) > 0 for share in shares for _, ps in share.batches)
    assert [len(places_of(CLIPS, row, rows)) for row in range(rows)] == [-(-CLIPS // rows)] * rows


def over_ranks(
    learner: Learner, clips: ShardDataset, rows: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> dict[str, float]:
    """Return the results of all ranks of `rows`, one after the other in this process."""
    received: list[list[float]] = []
    monkeypatch.setattr(
        validation.distributed, "sums", lambda values: received.append(values) or values
    )
    for row in range(rows):
        learner.look(read_share(ValData(clips, batch_size=size), row, rows))
    total = [sum(parts) for parts in zip(*received, strict=True)]
    monkeypatch.setattr(validation.distributed, "sums", lambda values: total)
    return learner.look(read_share(ValData(clips, batch_size=size), 0, rows))


def test_values_do_not_depend_on_ranks_or_batches(
    clips: ShardDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = seeded()
    learner.step()
    complete = learner.look(read_share(ValData(clips, batch_size=1)))
    for rows in (2, 3, 7):  # 5 divides by none of them
        assert over_ranks(learner, clips, rows, 1, monkeypatch) == complete
        assert over_ranks(learner, clips, rows, 2, monkeypatch) == pytest.approx(complete, rel=1e-5)
    monkeypatch.undo()
    large = learner.look(read_share(ValData(clips, batch_size=16)))
    assert large == pytest.approx(complete, rel=1e-5)
    assert learner.look(read_share(ValData(clips, batch_size=1)), seed=4) != complete
    random.seed(99), torch.manual_seed(99)
    assert learner.look(read_share(ValData(clips, batch_size=1))) == complete


def test_ranks_that_share_a_clip_count_it_once(
    clips: ShardDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, received = seeded(), []
    monkeypatch.setattr(
        validation.distributed, "sums", lambda values: received.append(values) or values
    )
    learner.look(read_share(ValData(clips)), counts=False)
    assert set(received[0]) == {0.0}


def test_autocast_is_used_if_the_weights_are_fp32(clips: ShardDataset) -> None:
    learner, share = seeded(), read_share(ValData(clips))
    exact, rounded = learner.look(share), learner.look(share, dtype=torch.bfloat16)
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.05)
    assert validation.autocast_dtype(learner.net.bfloat16(), torch.bfloat16) == torch.float32


def test_an_empty_held_out_set_is_refused_with_an_explanation(clips: ShardDataset) -> None:
    with pytest.raises(ConfigError, match="data.val_num_clips=0; give at least one, or val_every"):
        read_share(ValData(clips, num_clips=0))


def test_a_limited_validation_takes_the_first_clips(clips: ShardDataset, tmp_path: Path) -> None:
    share = read_share(ValData(clips, num_clips=2, tasks=("i2v",)))
    assert share.clips == 2 and [b.keys for b, _ in share.batches] == [list(clips.keys[:2])]


def test_a_run_with_validation_equals_one_without(clips: ShardDataset, tmp_path: Path) -> None:
    plan, values = runs.schedule(("sft", 3), ("dpo", 2)), []
    for number, every in enumerate((0, 1)):
        held = {"val_data": ValData(clips), "phases": runs.PHASES} if every else {}
        result, rows = runs.train(
            tmp_path, plan, run_dir=tmp_path / str(number),
            intervals=Intervals(log_every=1, save_every=0, val_every=every), **held,
        )  # fmt: skip
        assert result.done and result.checkpoint
        losses = [row["train/loss"] for row in rows if "train/loss" in row]
        looks = sum("val_raw/loss" in row for row in rows)
        assert looks == 5 * every
        values.append((losses, runs.tensors_of(result.checkpoint)))
    assert values[0] == values[1] and len(values[0][0]) == 5
