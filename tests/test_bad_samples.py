"""Bad samples: the first stops the run, or the first beyond the budget; every one is recorded."""

import json
import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from fault_server import serving, status
from hypothesis import given, settings
from hypothesis import strategies as st

from echolab.data.bad_samples import TolerantReader, max_bad_samples, read_quarantine
from echolab.data.download import FetchError, RetryPolicy
from echolab.data.shard_reader import ShardDataset, open_dataset
from echolab.data.shard_writer import ShardWriter
from echolab.data.train_dataset import StepPlan, TrainDataset, build_mixture
from echolab.errors import ConfigError, DataError
from echolab.tasks.curriculum import Curriculum, hard_to_easy
from echolab.training.config import Intervals

PER_SHARD, SHARDS = 20, 5
COUNT = PER_SHARD * SHARDS


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    folder = tmp_path_factory.mktemp("dataset")
    with ShardWriter(folder, kind="encoded", samples_per_shard=PER_SHARD) as writer:
        for i in range(COUNT):
            members = {"json": json.dumps({"number": i}).encode(), "safetensors": b""}
            writer.write(f"clip-{i:03d}", members)
    return open_dataset(folder)


def corrupted(dataset: ShardDataset, bad: set[int]) -> ShardDataset:
    """Return a copy of the dataset with damage in some samples."""
    assert isinstance(dataset.folder, Path)
    folder = dataset.folder.with_name(f"bad-{abs(hash(frozenset(bad)))}")
    folder.mkdir(exist_ok=True)
    for path in dataset.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for i in bad:
        sample = dataset.sample(i)
        with (folder / sample.shard).open("r+b") as file:
            file.seek(sample.members["json"][0])
            file.write(b"#")
    return open_dataset(folder)


def number(dataset: ShardDataset, i: int) -> int:
    return int(json.loads(dataset.read(i)["json"])["number"])


def test_without_a_budget_the_first_bad_sample_stops_the_run(
    dataset: ShardDataset, tmp_path: Path
) -> None:
    bad = corrupted(dataset, {3})
    reader = TolerantReader(bad)
    assert reader.read(2, lambda j: number(bad, j)) == 2
    with pytest.raises(DataError, match="sample clip-003"):
        reader.read(3, lambda j: number(bad, j))


def test_the_budget_is_not_rounded_up() -> None:
    assert [
        max_bad_samples(700, 0.01),
        max_bad_samples(1000, 0.001),
        max_bad_samples(1, 0.001),
    ] == [7, 1, 1]
    assert [max_bad_samples(1001, 0.001), max_bad_samples(1000, 0.0), max_bad_samples(0, 0.5)] == [
        2,
        0,
        0,
    ]


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_budget_is_a_fraction_of_the_samples(
    dataset: ShardDataset, tmp_path: Path, share: float
) -> None:
    with pytest.raises(ConfigError, match="max_bad_fraction"):
        TolerantReader(dataset, max_bad_fraction=share, quarantine=tmp_path / "q")
    with pytest.raises(ConfigError, match="max_bad_fraction"):
        TolerantReader(dataset, max_bad_fraction=0.1)


@settings(max_examples=25, deadline=None)
@given(
    bad=st.sets(st.integers(0, COUNT - 1), max_size=12),
    budget=st.sampled_from([0.01, 0.04, 0.1]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_run_stops_exactly_when_the_budget_is_exceeded(
    dataset: ShardDataset,
    tmp_path_factory: pytest.TempPathFactory,
    bad: set[int],
    budget: float,
    seed: int,
) -> None:
    path = tmp_path_factory.mktemp("run") / "quarantine.jsonl"
    damaged = corrupted(dataset, bad)
    reader = TolerantReader(damaged, max_bad_fraction=budget, quarantine=path)
    met: list[int] = []  # bad samples, in the order they are met

    def read(j: int) -> int:
        if j in bad and j not in met:
            met.append(j)
        return number(damaged, j)

    def exceeded() -> bool:
        shards = Counter(j // PER_SHARD for j in met)
        return len(met) > max_bad_samples(COUNT, budget) or any(
            count > max_bad_samples(PER_SHARD, budget) for count in shards.values()
        )

    for i in np.random.default_rng(seed).permutation(COUNT).tolist():
        try:
            j = reader.read(i, read)
        except DataError as error:
            assert exceeded() and "max_bad_fraction" in str(error) and "\n" not in str(error)
            break
        assert not exceeded() and j not in bad
        # A pure function of the data: the next good sample, for any reader and any earlier reads.
        assert j == next(k % COUNT for k in range(i, i + COUNT) if k % COUNT not in bad)
    else:
        assert set(met) == bad
    entries = read_quarantine(path)
    assert [entry["key"] for entry in entries] == [f"clip-{j:03d}" for j in met]
    for entry, j in zip(entries, met, strict=True):
        sample = dataset.sample(j)
        assert (entry["shard"], entry["offset"]) == (sample.shard, sample.members["json"][0])
        assert f"sample clip-{j:03d}, byte {entry['offset']}" in entry["reason"]


def part(folder: Path, path: Path, numbers: list[int]) -> None:
    dataset = open_dataset(folder)
    reader = TolerantReader(dataset, max_bad_fraction=0.1, quarantine=path)
    for i in numbers:
        reader.read(i, lambda j: number(dataset, j))


def test_ranks_share_one_budget(dataset: ShardDataset, tmp_path: Path) -> None:
    bad = set(range(0, COUNT, 10))  # two of each shard: just what 0.1 allows
    damaged = corrupted(dataset, bad)
    assert isinstance(damaged.folder, Path)
    path = tmp_path / "quarantine.jsonl"
    context = multiprocessing.get_context("fork")
    # Every rank meets every bad sample: each is counted once.
    ranks = [
        context.Process(target=part, args=(damaged.folder, path, [*range(r, COUNT), *range(r)]))
        for r in range(3)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert sorted(e["key"] for e in read_quarantine(path)) == [f"clip-{i:03d}" for i in sorted(bad)]
    assert len(path.read_text().splitlines()) == len(bad)


def test_a_partial_line_of_a_killed_process_is_skipped(
    dataset: ShardDataset, tmp_path: Path
) -> None:
    path, damaged = tmp_path / "quarantine.jsonl", corrupted(dataset, {3, 50})
    reader = TolerantReader(damaged, max_bad_fraction=0.1, quarantine=path)
    reader.read(3, lambda j: number(damaged, j))
    with path.open("a") as file:
        file.write('{"dataset": "x", "ke')
    reader.read(50, lambda j: number(damaged, j))
    assert [entry["key"] for entry in read_quarantine(path)] == ["clip-003", "clip-050"]


def test_an_unreachable_server_is_not_a_bad_sample(dataset: ShardDataset, tmp_path: Path) -> None:
    assert isinstance(dataset.folder, Path)
    with serving(dataset.folder) as server:
        server.always["encoded-000001.tar"] = status(500)
        there = open_dataset(
            server.url,
            cache_dir=tmp_path / "cache",
            retry_policy=RetryPolicy(2, 0.2, 2.0, 0.001, 0.001),
        )
        reader = TolerantReader(there, max_bad_fraction=0.5, quarantine=tmp_path / "q")
        assert reader.read(3, lambda j: number(there, j)) == 3
        with pytest.raises(FetchError, match="HTTP 500"):
            reader.read(25, lambda j: number(there, j))
    assert not (tmp_path / "q").exists()


def test_a_dataset_without_a_good_sample_is_an_error(dataset: ShardDataset, tmp_path: Path) -> None:
    damaged = corrupted(dataset, {3})
    reader = TolerantReader(
        damaged, max_bad_fraction=0.5, quarantine=tmp_path / "q", substitutes=lambda i: [i]
    )
    with pytest.raises(DataError, match="no good substitute"):
        reader.read(3, lambda j: number(damaged, j))


def test_training_batches_skip_bad_clips(tmp_path: Path) -> None:
    encoded_clips, pairs = (
        runs.write_clips(tmp_path / "clips", 9),
        runs.write_pairs(tmp_path / "pairs", 4),
    )
    sample = encoded_clips.sample(4)
    with (tmp_path / "clips" / sample.shard).open("r+b") as file:
        file.seek(sample.members["safetensors"][0] + 5000)
        file.write(b"damaged")

    def keys(world: int, **tolerance: Any) -> list[str]:
        """Return the keys of two epochs, over all ranks."""
        clips = build_mixture([encoded_clips], kind="encoded", batch_size=2, seed=1, **tolerance)
        other = build_mixture([pairs], kind="preference", batch_size=2, seed=1, **tolerance)
        ranks = [
            TrainDataset(
                clips, other, step_plan=lambda step: StepPlan("sft", step),
                curriculum=Curriculum(hard_to_easy(4)), batch_size=2, accumulation=1, seed=1,
                steps=9, rank=rank, world=world,
            )
            for rank in range(world)
        ]  # fmt: skip
        return [key for step in range(9) for rank in ranks for key in rank[step].batch.keys]

    path = tmp_path / "run" / "quarantine.jsonl"
    with pytest.raises(DataError, match="sample clip-004, byte"):
        keys(1)
    met = keys(1, max_bad_fraction=0.1, quarantine=path)
    assert met == keys(2, max_bad_fraction=0.1, quarantine=path)
    expected = {key: 2 for key in encoded_clips.keys if key != "clip-004"} | {"clip-005": 4}
    assert Counter(met) == expected
    assert [entry["key"] for entry in read_quarantine(path)] == ["clip-004"]


def test_a_run_counts_its_skipped_samples(tmp_path: Path) -> None:
    for write, count in ((runs.write_clips, 7), (runs.write_pairs, 5)):
        clips = write(tmp_path / write.__name__.removeprefix("write_"), count)
        sample = clips.sample(0)
        with (tmp_path / clips.folder / sample.shard).open("r+b") as file:
            file.seek(sample.members["safetensors"][0] + 5000)
            file.write(b"damaged")
    plan = runs.schedule(("sft", 2), ("dpo", 2))
    with pytest.raises(DataError, match="sample clip-000, byte"):
        runs.train(tmp_path, plan)
    _, rows = runs.train(tmp_path, plan, max_bad_fraction=0.3, intervals=Intervals(log_every=1))
    assert [row["data/skipped"] for row in rows if "train/loss" in row][-1] == 2
    entries = read_quarantine(tmp_path / "run" / "quarantine.jsonl")
    assert [entry["key"] for entry in entries] == ["clip-000", "pair-000"]
