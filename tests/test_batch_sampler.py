"""Mixing, buckets and last batches: pure functions of the batch's index that keep their
promises.
"""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echolab.data.batch_sampler import (
    BatchSampler,
    DrawnSample,
    Interleaver,
    ShuffleConfig,
    Source,
    floor_sum,
)
from echolab.errors import ConfigError

WEIGHTS = st.lists(st.sampled_from([0, 0.1, 1, 2, 3.5]), min_size=1, max_size=5).filter(sum)
SIZES = [(2, 4, 4), (2, 4, 6), (3, 8, 8), (5, 4, 4)]


@given(st.integers(0, 50), st.integers(1, 90), st.integers(0, 200), st.integers(0, 200))
def test_the_sum_of_floors_equals_the_direct_sum(
    count: int, modulus: int, slope: int, offset: int
) -> None:
    expected = sum((slope * i + offset) // modulus for i in range(count))
    assert floor_sum(count, modulus, slope, offset) == expected


@given(WEIGHTS, st.integers(0, 3), st.integers(0, 400), st.integers(0, 60))
def test_earlier_batches_are_counted_without_iterating(
    weights: list[float], seed: int, first: int, more: int
) -> None:
    mixing = Interleaver(weights, seed)
    members = mixing.members(0, first + more)
    assert members[first:].tolist() == mixing.members(first, first + more).tolist()
    assert np.bincount(members[:first], minlength=len(weights)).tolist() == mixing.counts(first)


@given(WEIGHTS, st.integers(0, 3), st.integers(0, 10**12))
def test_every_dataset_has_its_share_at_every_step(
    weights: list[float], seed: int, position: int
) -> None:
    counts = Interleaver(weights, seed).counts(position)
    assert sum(counts) == position
    for count, weight in zip(counts, weights, strict=True):
        share = position * weight / sum(weights)
        assert abs(count - share) < 2 * np.log(position + 2) + 2 and (weight or not count)


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [float("nan"), 1], [float("inf")]])
def test_meaningless_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="need one 0 or more for each dataset"):
        Interleaver(weights)


SOURCES = st.lists(
    st.builds(
        Source,
        name=st.just("d"),
        fingerprint=st.text("abc", min_size=1, max_size=4),
        samples_by_shard=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any),
        size=st.sampled_from(SIZES),
        weight=st.none(),
    ),
    min_size=1,
    max_size=4,
)


def counted(plan: BatchSampler, batches: int) -> list[Counter[tuple[int, int]]]:
    """Count for each dataset how often each (epoch, sample) came."""
    counts: list[Counter[tuple[int, int]]] = [Counter() for _ in plan.sources]
    for number in range(batches):
        for drawn in plan.batch(number):
            if drawn.loss_weight:
                counts[drawn.source][drawn.epoch, drawn.sample] += 1
    return counts


def check_exact(plan: BatchSampler, batches: int, left_out: dict[int, int] | None = None) -> None:
    """Assert that no sample comes twice an epoch, and none is missing in a completed epoch."""
    for number, seen in enumerate(counted(plan, batches)):
        samples = plan.sources[number].samples
        assert set(seen.values()) <= {1}
        by_epoch = Counter(epoch for epoch, _ in seen)
        for epoch in range(max(by_epoch, default=0)):
            assert by_epoch[epoch] == samples - (left_out or {}).get(number, 0)
        if not left_out:  # k times or k + 1 times
            times = Counter(sample for _, sample in seen)
            assert (
                max(times.values(), default=0) - min((times[i] for i in range(samples)), default=0)
                <= 1
            )


@given(SOURCES, st.integers(1, 8), st.integers(0, 2))
def test_every_sample_comes_once_an_epoch(sources: list[Source], batch: int, seed: int) -> None:
    check_exact(BatchSampler(sources, batch_size=batch, seed=seed), 30)


@given(SOURCES, st.integers(1, 6), st.data())
def test_batches_have_one_size_and_about_as_many_tokens(
    sources: list[Source], batch: int, data: st.DataObject
) -> None:
    largest = max(int(np.prod(source.size)) for source in sources)
    budget = data.draw(st.none() | st.integers(largest, 4 * largest))
    plan = BatchSampler(
        sources, batch_size=batch, seed=0, shuffle=ShuffleConfig(token_budget=budget)
    )
    for number in range(20):
        clips = plan.batch(number)
        sizes = {plan.sources[clip.source].size for clip in clips}
        assert len(sizes) == 1 and len(clips) % batch == 0
        tokens = len(clips) * int(np.prod(sizes.pop()))
        # Full but for less than half: one more clip to a place would be too many.
        assert (budget or largest) * batch / 2 < tokens <= (budget or largest) * batch


def test_datasets_are_mixed_by_weight() -> None:
    sources = [Source("a", "a", [50], SIZES[0], 3.0), Source("b", "b", [500], SIZES[0], 1.0)]
    plan = BatchSampler(sources, batch_size=8, seed=0)
    for count in (1, 10, 100):
        seen = Counter(clip.source for i in range(count) for clip in plan.batch(i))
        assert seen[0] == pytest.approx(6 * count, abs=5)
    check_exact(plan, 100)


def test_sizes_are_mixed_by_their_numbers_of_clips() -> None:
    # Four small clips stand in the place of one large one: batches of them come a quarter as often.
    sources = [Source("a", "a", [400], (4, 4, 4)), Source("b", "b", [400], (4, 8, 8))]
    plan = BatchSampler(sources, batch_size=2, seed=0)
    batches = [plan.batch(i) for i in range(250)]
    assert {len(clips) for clips in batches} == {2, 8}
    seen = Counter(clip.source for clips in batches for clip in clips)
    assert seen[0] == pytest.approx(400, abs=16) and seen[1] == pytest.approx(400, abs=8)


@pytest.mark.parametrize("samples", [[7], [3, 0, 9], [8]])
def test_the_last_partial_batch_is_carried_dropped_or_padded(samples: list[int]) -> None:
    total, batch = sum(samples), 4

    def plan(remainder: str) -> BatchSampler:
        order = ShuffleConfig(last_batch=remainder)  # type: ignore[arg-type]
        return BatchSampler([Source("a", "a", samples)], batch_size=batch, seed=0, shuffle=order)

    check_exact(plan("carry"), 12)
    batches = total // batch
    dropping = plan("drop")
    check_exact(dropping, 12, {0: total - batches * batch})
    assert [c.epoch for i in range(2 * batches) for c in dropping.batch(i)] == [0] * (
        batches * batch
    ) + [1] * (batches * batch)
    assert dropping.progress(2 * batches) == [(2, 2 * (total - batches * batch))]
    padding, of_epoch = plan("pad"), -(-total // batch)
    check_exact(padding, 12)
    for number in range(12):
        clips = padding.batch(number)
        real = total - (of_epoch - 1) * batch if number % of_epoch == of_epoch - 1 else batch
        shares = sorted(clip.loss_weight for clip in clips)
        assert shares == pytest.approx([0.0] * (batch - real) + [batch / real] * real)


@pytest.mark.parametrize(
    ("sources", "order", "words"),
    [
        (
            [("a", [3], 1), ("b", [3], 1)],
            ShuffleConfig(last_batch="drop"),
            "a, b are mixed in one batch",
        ),
        ([("a", [3], None)], ShuffleConfig(last_batch="drop"), "less than one global batch of 4"),
        ([("a", [3], None)], ShuffleConfig(last_batch="keep"), "data.last_batch=keep"),  # type: ignore[arg-type]
        ([("a", [3], None)], ShuffleConfig(shuffle_block_size=0), "data.shuffle_block_size=0"),
        (
            [("a", [3], None)],
            ShuffleConfig(token_budget=5),
            "token_budget=5: the largest clips have 32",
        ),
        ([("a", [3], 1), ("b", [3], None)], ShuffleConfig(), "one for each dataset, or none"),
    ],
)
def test_an_impossible_plan_is_refused(
    sources: list[tuple[str, list[int], float | None]], order: ShuffleConfig, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        BatchSampler(
            [Source(name, name, shards, SIZES[0], weight) for name, shards, weight in sources],
            batch_size=4,
            seed=0,
            shuffle=order,
        )


def test_a_dataset_of_weight_zero_is_not_read() -> None:
    sources = [Source("a", "a", [50], SIZES[0], 1.0), Source("b", "b", [50], SIZES[1], 0.0)]
    plan = BatchSampler(sources, batch_size=4, seed=0)
    assert {clip.source for i in range(20) for clip in plan.batch(i)} == {0}
    assert plan.progress(20)[1] == (0, 0)


@pytest.mark.parametrize("size", [SIZES[0], SIZES[2]])
def test_every_rank_reads_every_shard_of_every_dataset(size: tuple[int, int, int]) -> None:
    sources = [Source("a", "a", [10] * 8, SIZES[0]), Source("b", "b", [10] * 8, size)]
    plan, ranks = BatchSampler(sources, batch_size=16, seed=0), 4
    met: list[set[tuple[int, int]]] = [set() for _ in range(ranks)]
    for number in range(80):
        clips = plan.batch(number)
        own = len(clips) // ranks
        for rank in range(ranks):
            part = clips[rank * own : (rank + 1) * own]
            met[rank] |= {(clip.source, clip.sample // 10) for clip in part}
    assert all(len(shards) == 16 for shards in met)


SHARDS_OF_MANY, RANKS, WORKERS, A_RANK = 2000, 1024, 8, 8


def test_a_thousand_ranks_of_eight_workers_all_read_neighbors() -> None:
    # One dataset of two million samples, 8 clips a rank and step, cut as TrainDataset cuts it.
    source = Source("a", "a", [1000] * SHARDS_OF_MANY)
    plan = BatchSampler([source], batch_size=RANKS * A_RANK, seed=0)
    shards_of_rank: list[set[int]] = [set() for _ in range(RANKS)]
    reads_of_worker = np.zeros((RANKS, WORKERS), dtype=int)
    near = adjacent = reads = 0
    for step in range(2 * WORKERS):
        samples = np.array([clip.sample for clip in plan.batch(step)]).reshape(RANKS, A_RANK)
        reads_of_worker[:, step % WORKERS] += A_RANK  # loaders deal steps out in turn
        same_block = np.diff(samples // 1000 * 32 + samples % 1000 // 32, axis=1) == 0
        ahead = np.diff(samples, axis=1)
        near += int((same_block & (ahead > 0)).sum())
        adjacent += int((ahead == 1).sum())
        reads += ahead.size
        for rank, own in enumerate(samples // 1000):
            shards_of_rank[rank] |= set(own.tolist())
    assert (reads_of_worker == 2 * A_RANK).all()  # none waits while another works
    assert adjacent / reads > 0.9 and near / reads > 0.95
    met = [len(shards) for shards in shards_of_rank]
    assert min(met) >= 16  # another shard nearly each step: no rank keeps to a part of the data


def test_a_sampled_clip_is_identified_by_integers() -> None:
    clip = BatchSampler([Source("a", "a", [5])], batch_size=2, seed=0).batch(3)[0]
    assert isinstance(clip, DrawnSample) and all(type(value) is int for value in clip[:3])
