"""The order of an epoch: every sample once, repeatable, local, and different each epoch."""

import tracemalloc
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, chisquare

from echolab.data.batch_sampler import BLOCK_SIZE, EpochOrder, epoch_order

BINS = 20  # parts of the epoch, for the test of uniformity


class Shuffling(NamedTuple):
    """Measures of one order of all samples."""

    adjacency: float  # share of samples that still stand before their neighbour on disk
    moved: float  # mean distance from the place on disk, in epochs; 1/3 for a perfect shuffle
    shards: float  # mean number of different shards among 100 samples in a row
    open_blocks: int  # most blocks that were begun and not finished: what a reader comes back to


def shuffling(
    samples_by_shard: Sequence[int], order: np.ndarray, *, block: int = BLOCK_SIZE
) -> Shuffling:
    """Measure `order` [samples], the samples of an epoch in the order they are met."""
    samples = len(order)
    if samples < 2:
        return Shuffling(1.0, 0.0, float(samples), samples)
    shard = np.repeat(np.arange(len(samples_by_shard)), samples_by_shard)  # [samples] of each id
    inside = np.arange(samples) - np.searchsorted(shard, shard)
    rows = [len(set(shard[order[i : i + 100]].tolist())) for i in range(0, samples, 100)]
    where = np.empty(samples, dtype=np.int64)
    where[order] = np.arange(samples)
    return Shuffling(
        adjacency=float(np.mean(np.diff(order) == 1)),
        moved=float(np.mean(np.abs(where - np.arange(samples))) / samples),
        shards=float(np.mean(rows)),
        open_blocks=_open_at_once(where, shard, inside // block),
    )


def uniformity(orders: Sequence[np.ndarray], *, block: int = BLOCK_SIZE) -> float | None:
    """Return how likely epochs are to be at least so uneven by chance; below 0.001 they are
    suspect. The chi-square test is over the positions of the samples of the first tenth, one
    of each block, since the samples of a block stay together. `orders` are epochs, [samples]
    each; return None if they are too few for a verdict.
    """
    samples = len(orders[0])
    watched = np.arange(0, max(1, samples // 10), block)
    expected = len(watched) * len(orders) / BINS
    if expected < 5 or samples < BINS:
        return None
    seen = np.zeros(BINS, dtype=np.int64)
    for order in orders:
        where = np.empty(samples, dtype=np.int64)
        where[order] = np.arange(samples)
        seen += np.bincount(where[watched] * BINS // samples, minlength=BINS)
    return float(chi2.sf(((seen - expected) ** 2 / expected).sum(), BINS - 1))


def _open_at_once(where: np.ndarray, shard: np.ndarray, part: np.ndarray) -> int:
    """Return the most blocks of which some samples were read and others not yet."""
    _, number = np.unique(np.stack([shard, part]), axis=1, return_inverse=True)
    begun = np.full(number.max() + 1, len(where))
    np.minimum.at(begun, number, where)
    ended = np.zeros(number.max() + 1, dtype=np.int64)
    np.maximum.at(ended, number, where)
    change = np.bincount(begun, minlength=len(where) + 1)
    change -= np.bincount(ended + 1, minlength=len(where) + 1)
    return int(change.cumsum().max())


SHARDS = st.lists(st.integers(0, 40), max_size=12)


@given(SHARDS, st.integers(0, 5), st.integers(0, 3), st.integers(1, 50), st.integers(0, 60))
def test_every_sample_comes_exactly_once(
    shards: list[int], seed: int, epoch: int, block: int, buffer: int
) -> None:
    order = epoch_order(shards, "f", seed=seed, epoch=epoch, block_size=block, buffer_size=buffer)
    assert sorted(order.tolist()) == list(range(sum(shards)))


def test_the_order_depends_on_fingerprint_seed_and_epoch_alone() -> None:
    def order(fingerprint: str = "f", seed: int = 1, epoch: int = 2) -> list[int]:
        return epoch_order([30, 40, 5], fingerprint, seed=seed, epoch=epoch).tolist()

    assert order() == order()
    others = [order("g"), order(seed=2), order(epoch=3)]
    assert all(other != order() for other in others)


def test_without_a_buffer_neighbors_stay_together() -> None:
    order = epoch_order([64, 64], "f", seed=0, epoch=0, block_size=8, buffer_size=0)
    assert (np.diff(order.reshape(-1, 8), axis=1) == 1).all()


def test_the_buffer_bounds_how_far_a_sample_moves() -> None:
    still = epoch_order([500], "f", seed=0, epoch=0, block_size=20, buffer_size=0)
    moved = epoch_order([500], "f", seed=0, epoch=0, block_size=20, buffer_size=30)
    position = {int(sample): at for at, sample in enumerate(still)}
    distance = [abs(position[int(sample)] - at) for at, sample in enumerate(moved)]
    assert 0 < max(distance) < 30


def test_the_order_is_that_of_existing_runs() -> None:
    # If this changes, a run that was stopped before the change meets other samples after it.
    assert epoch_order([3, 4], "f", seed=0, epoch=0, block_size=2).tolist() == [5, 6, 0, 3, 2, 1, 4]


@given(SHARDS, st.integers(1, 50), st.integers(0, 60), st.data())
def test_any_part_of_the_order_is_computed_independently(
    shards: list[int], block: int, buffer: int, data: st.DataObject
) -> None:
    order = EpochOrder(shards, "f", seed=1, epoch=2, block_size=block, buffer_size=buffer)
    full_order = epoch_order(shards, "f", seed=1, epoch=2, block_size=block, buffer_size=buffer)
    first = data.draw(st.integers(0, len(order)))
    stop = data.draw(st.integers(first, len(order)))
    indices = order.indices(first, stop)
    assert order.samples(indices).tolist() == full_order[first:stop].tolist()
    assert all(abs(int(index) - at) < max(1, buffer) for at, index in enumerate(indices, first))


IDS = 20_000
SHARDS_OF_IDS = [250] * 80


@pytest.fixture(scope="module")
def epochs() -> list[np.ndarray]:
    return [epoch_order(SHARDS_OF_IDS, "f", seed=7, epoch=epoch) for epoch in range(40)]


def test_neighbors_are_separated(epochs: list[np.ndarray]) -> None:
    assert all(shuffling(SHARDS_OF_IDS, order).adjacency < 0.02 for order in epochs)


def test_every_epoch_has_another_order(epochs: list[np.ndarray]) -> None:
    for one, other in combinations(epochs, 2):
        assert np.mean(one == other) < 0.01
        # Nor is one the other moved along, or turned around.
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.2


def test_every_sample_may_come_at_any_position(epochs: list[np.ndarray]) -> None:
    assert 0.001 < (uniformity(epochs) or 0)
    for block in (7, 320, 624):  # one sample's own places, over the epochs
        positions = [np.flatnonzero(order == 32 * block)[0] * 8 // IDS for order in epochs]
        assert chisquare(np.bincount(positions, minlength=8)).pvalue > 0.001
    # Blocks that stay in their half of the epoch are detected.
    halves = [
        np.concatenate([order[order < IDS // 2], order[order >= IDS // 2]]) for order in epochs
    ]
    assert (uniformity(halves) or 0) < 1e-6


@pytest.mark.parametrize("world", [1, 3, 8])
def test_every_rank_reads_every_shard(epochs: list[np.ndarray], world: int) -> None:
    of_ranks = [
        np.concatenate([order.reshape(-1, 16)[:, rank * 16 // world] for order in epochs])
        for rank in range(world)
    ]
    assert all(len(set((own // 250).tolist())) == len(SHARDS_OF_IDS) for own in of_ranks)


def test_the_measures_distinguish_a_bad_shuffle_from_a_good_one(epochs: list[np.ndarray]) -> None:
    still = shuffling(SHARDS_OF_IDS, np.arange(IDS))
    good = shuffling(SHARDS_OF_IDS, epochs[0])
    assert still == Shuffling(1.0, 0.0, still.shards, 1)
    assert good.moved == pytest.approx(1 / 3, abs=0.05)
    assert good.shards > 10 * still.shards
    # What must be read again or held: the blocks that the shuffle above them reaches.
    assert good.open_blocks <= 2 * 1024 // 32 + 2


def test_planning_100_million_samples_takes_little_memory() -> None:
    shards = np.full(100_000, 1000, dtype=np.int64)
    tracemalloc.start()
    order = EpochOrder(shards, "f", seed=0, epoch=0)
    part = order.samples(order.indices(1_000_000, 1_000_064))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6 and len(order) == 10**8
    assert len(set(part.tolist())) == 64 and 0 <= part.min() and part.max() < 10**8
