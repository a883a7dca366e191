"""Micro-batches are functions of their index; ranks and workers only split them differently."""

import json
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import save
from torch.utils.data import DataLoader

from echolab.data.collate import position_weight
from echolab.data.shard_reader import ShardDataset, open_dataset
from echolab.data.shard_writer import ShardWriter
from echolab.data.train_dataset import MicroBatch, TrainDataset, build_mixture
from echolab.errors import ConfigError, DataError
from echolab.types import Batch, PreferencePair

PLAN = runs.schedule(("sft", 4), ("dpo", 3), ("ndpo", 2), ("sft", 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def batches(folder: Path, *, world: int = 1, rank: int = 0, accumulation: int = 1) -> TrainDataset:
    return TrainDataset(
        build_mixture(
            [runs.write_clips(folder / "clips", 7)], kind="encoded", batch_size=4, seed=3
        ),
        build_mixture(
            [runs.write_pairs(folder / "pairs", 5)], kind="preference", batch_size=4, seed=3
        ),
        step_plan=PLAN.place,
        curriculum=runs.curriculum(),
        batch_size=4,
        accumulation=accumulation,
        seed=3,
        steps=PLAN.steps,
        rank=rank,
        world=world,
    )


def seen(items: list[MicroBatch]) -> list[tuple[int, str, str, int]]:
    """Return (epoch, key, task, step) of every clip, in order."""
    return [
        (epoch, key, task, item.step)
        for item in items
        for epoch, key, task in zip(item.epochs, item.batch.keys, item.batch.tasks, strict=True)
    ]


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (1, 4), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_only_split_the_global_batch(
    folder: Path, world: int, accumulation: int
) -> None:
    expected = batches(folder)
    parts = [
        batches(folder, world=world, rank=rank, accumulation=accumulation) for rank in range(world)
    ]
    for step in range(PLAN.steps):
        of_step = range(step * accumulation, (step + 1) * accumulation)
        assert seen([expected[step]]) == seen([part[i] for part in parts for i in of_step])


def test_each_epoch_of_a_dataset_has_every_clip_once(folder: Path) -> None:
    expected = batches(folder)
    clips = seen([expected[i] for i in (0, 1, 2, 3, 9, 10)])
    first_pass = [key for epoch, key, _, _ in clips if epoch == 0]
    second_pass = [key for epoch, key, _, _ in clips if epoch == 1]
    assert len(first_pass) == 7 == len(set(first_pass)) and len(set(second_pass)) == 7
    pairs = seen([expected[i] for i in range(4, 9)])  # dpo and ndpo share one sequence
    assert sorted(epoch for epoch, *_ in pairs) == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    assert len({(epoch, key) for epoch, key, *_ in pairs}) == 20


def test_the_number_of_workers_does_not_change_batches(folder: Path) -> None:
    expected = batches(folder)
    loader = DataLoader(expected, batch_size=None, sampler=range(2, 9), num_workers=2)
    for i, item in zip(range(2, 9), loader, strict=True):
        again = expected[i]
        assert seen([item]) == seen([again])
        assert all(
            torch.equal(a, b)
            for a, b in zip(item.batch.conditions, again.batch.conditions, strict=True)
        )


def test_a_kind_of_epoch_gives_its_kind_of_batch(folder: Path) -> None:
    expected = batches(folder)
    assert isinstance(expected[0].batch, Batch) and isinstance(expected[4].batch, PreferencePair)
    negative = expected[7]
    assert negative.kind == "ndpo" and isinstance(negative.batch, Batch)
    pair = expected._read_pairs("dpo", expected.global_batch(7))
    assert isinstance(pair, PreferencePair)
    assert negative.batch.keys == pair.keys
    assert torch.equal(negative.batch.latents, pair.rejected)


def test_text_to_video_gets_no_image(folder: Path) -> None:
    first = batches(folder)[0].batch  # the curriculum starts with t2v alone
    assert first.tasks == ["t2v"] * 4
    assert not first.conditions.known.any() and not first.conditions.known_latents.any()
    assert not first.conditions.image.any() and first.conditions.text.any()


def test_known_positions_weigh_less_and_the_mean_weight_is_one() -> None:
    known = torch.zeros(4, 3, 2, 2)
    known[:, 0] = 1
    weight = position_weight(torch.ones(1, 3, 2, 2), known, 0.1)
    assert weight.mean().item() == pytest.approx(1)
    assert (weight[:, 0] / weight[:, 1]).flatten().tolist() == pytest.approx([0.1] * 4)


def write(folder: Path, **changes: torch.Tensor) -> ShardDataset:
    with ShardWriter(folder, kind="encoded") as writer:
        for i in range(2):
            tensors = runs.clip_tensors(i) | (changes if i else {})
            kept = {name: t for name, t in tensors.items() if t.numel()}
            about = json.dumps({}).encode()
            writer.write(f"clip-{i}", {"safetensors": save(kept), "json": about})
    return open_dataset(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": torch.zeros(0)}, ["clip-1", "'text'", "encode"]),
        ({"text": torch.zeros(9, 10)}, ["clip-1", "text [9, 10]", "[5, 10]", "encode"]),
        ({"latents": torch.zeros(4, 2, 4, 6)}, ["clip-1", "[4, 2, 4, 6]", "encode"]),
    ],
)
def test_a_bad_sample_is_named(
    tmp_path: Path, change: dict[str, torch.Tensor], words: list[str]
) -> None:
    clips = build_mixture([write(tmp_path / "bad", **change)], kind="encoded", batch_size=2, seed=0)
    items = TrainDataset(
        clips, None, step_plan=PLAN.place, curriculum=runs.curriculum(),
        batch_size=2, accumulation=1, seed=0, steps=PLAN.steps,
    )  # fmt: skip
    with pytest.raises(DataError) as error:
        items[0]
    assert all(word in str(error.value) for word in words)


def test_an_indivisible_batch_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size=4: not a multiple of 3 ranks"):
        batches(folder, world=3)
