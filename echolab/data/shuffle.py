"""Shuffle an epoch as a pure function of (fingerprint, seed, epoch), with integers as all state.

Samples lie in shards, and reads are cheap when they are near each other; so blocks of neighbors are
put in random order, then every sample moves a bounded way.  Any part of the order can be computed
by itself: nothing is kept for each sample, so that 10^8 samples cost no more memory than their
shards and blocks do.
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

VERSION = 1  # of the order; a run resumes only in the version that it began in
BLOCK_SIZE, BUFFER_SIZE = 32, 1024  # samples


def random_bits(count: int, *parts: object, first: int = 0) -> np.ndarray:
    """Return [count] uint64 from index `first` of the random stream that `parts` name.

    Raw bits: numpy promises these, but not what its Generators make of them.
    """
    digest = blake2b("/".join(map(str, parts)).encode(), digest_size=16).digest()
    source = np.random.PCG64(int.from_bytes(digest, "little"))
    return source.advance(first).random_raw(count)


class EpochOrder:
    """The order of the samples in one epoch; samples are numbered shard after shard.

    A sample's *index* is where the shuffle of blocks puts it; its *position* is where the bounded
    shuffle then moves it, less than `buffer_size` away.
    """

    def __init__(
        self,
        samples_by_shard: Sequence[int] | np.ndarray,
        fingerprint: str,
        *,
        seed: int,
        epoch: int,
        block_size: int = BLOCK_SIZE,
        buffer_size: int = BUFFER_SIZE,
    ) -> None:
        samples = np.asarray(samples_by_shard, dtype=np.int64).reshape(-1)  # [shards]
        blocks = -(-samples // block_size)  # [shards]
        self.block_size, self.buffer_size = block_size, buffer_size
        self.seed_parts = (fingerprint, seed, epoch)
        self._first_sample = np.concatenate([[0], samples.cumsum()])  # [shards + 1]
        self._first_block = np.concatenate([[0], blocks.cumsum()])  # [shards + 1]
        # Shuffle the blocks.
        count = int(self._first_block[-1])
        bits = random_bits(count, *self.seed_parts, "blocks")
        self._blocks = np.argsort(bits, kind="stable").astype(np.uint32)  # [blocks]
        del bits  # at 10^8 samples every array of this length counts
        # The last block of each shard may be smaller than the others.
        sizes = np.full(count, block_size, dtype=np.int32)
        nonempty = samples > 0
        sizes[self._first_block[1:][nonempty] - 1] = (samples - (blocks - 1) * block_size)[nonempty]
        self._first_index = np.zeros(count + 1, dtype=np.int64)  # of each block
        np.cumsum(sizes[self._blocks], out=self._first_index[1:])

    def __len__(self) -> int:
        return int(self._first_sample[-1])

    def indices(self, first: int, stop: int) -> np.ndarray:
        """Return the indices of the samples at positions [first, stop) of the epoch.

        An index i moves to a position below i + buffer_size.  So no index below
        first - 2 buffer_size comes after one that ends up at `first` or later, and none from
        stop + 2 buffer_size on comes before one that ends up below `stop`: sorting what lies
        between is enough.
        """
        # Only indices near the range can end up in it: compute keys for these alone.
        low = max(0, first - 2 * self.buffer_size)
        high = min(len(self), stop + 2 * self.buffer_size)
        # The top 53 bits make a double in [0, 1) exactly.
        bits = random_bits(high - low, *self.seed_parts, "samples", first=low)
        keys = np.arange(low, high) + self.buffer_size * ((bits >> 11) * 2.0**-53)
        return low + np.argsort(keys, kind="stable")[first - low : stop - low]

    def samples(self, indices: np.ndarray) -> np.ndarray:
        """Return the sample at each index, int64."""
        # The shuffled block that holds each index, its shard, and its start in that shard.
        slots = np.searchsorted(self._first_index, indices, side="right") - 1
        blocks = self._blocks[slots].astype(np.int64)
        shards = np.searchsorted(self._first_block, blocks, side="right") - 1
        within = (blocks - self._first_block[shards]) * self.block_size
        return self._first_sample[shards] + within + indices - self._first_index[slots]


def epoch_order(
    samples_by_shard: Sequence[int] | np.ndarray,
    fingerprint: str,
    *,
    seed: int,
    epoch: int,
    block_size: int = BLOCK_SIZE,
    buffer_size: int = BUFFER_SIZE,
) -> np.ndarray:
    """Return the order of one epoch: sample indices [samples], each exactly once."""
    order = EpochOrder(
        samples_by_shard,
        fingerprint,
        seed=seed,
        epoch=epoch,
        block_size=block_size,
        buffer_size=buffer_size,
    )
    return order.samples(order.indices(0, len(order)))
