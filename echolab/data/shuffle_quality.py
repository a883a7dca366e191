"""How well an epoch's order shuffles, and how much it leaves for a reader to hold."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import chi2

from echolab.data.shuffle import BLOCK

BINS = 20  # parts of the epoch, for the test of uniformity


class Shuffling(NamedTuple):
    """Measures of one order of all samples."""

    adjacency: float  # share of samples that still stand before their neighbour on disk
    moved: float  # mean distance from the place on disk, in epochs; 1/3 for a perfect shuffle
    shards: float  # mean number of different shards among 100 samples in a row
    open_blocks: int  # most blocks that were begun and not finished: what a reader comes back to


def shuffling(
    samples_by_shard: Sequence[int], order: np.ndarray, *, block: int = BLOCK
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


def uniformity(orders: Sequence[np.ndarray], *, block: int = BLOCK) -> float | None:
    """How likely epochs are to look at least so uneven by chance; below 0.001 something is wrong.

    The chi-square test of where the samples of the first tenth stand, one of each block, since
    those of a block stand together.  `orders` are epochs, [samples] each; None where they are too
    few to tell.
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
    """The most blocks of which some samples were met and others not yet."""
    _, number = np.unique(np.stack([shard, part]), axis=1, return_inverse=True)
    begun = np.full(number.max() + 1, len(where))
    np.minimum.at(begun, number, where)
    ended = np.zeros(number.max() + 1, dtype=np.int64)
    np.maximum.at(ended, number, where)
    change = np.bincount(begun, minlength=len(where) + 1)
    change -= np.bincount(ended + 1, minlength=len(where) + 1)
    return int(change.cumsum().max())
