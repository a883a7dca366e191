"""The order of an epoch, a pure function of (fingerprint, seed, epoch): integers are all its state.

Samples lie in shards, and reads are cheap when they are near each other; so blocks of neighbours
are put in random order, then every sample moves a bounded way.  Any part of the order is worked out
by itself: nothing is kept for each sample, so that 10^8 of them cost no more memory than 10^5
shards and their blocks do.
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

VERSION = 1  # of the order; a run goes on only in the version that it began in
BLOCK, BUFFER = 32, 1024  # samples


def random_bits(count: int, *parts: object, first: int = 0) -> np.ndarray:
    """[count] uint64, from number `first` of the stream that `parts` name.

    Raw bits: numpy promises these, not what its Generators make of them.
    """
    digest = blake2b("/".join(map(str, parts)).encode(), digest_size=16).digest()
    source = np.random.PCG64(int.from_bytes(digest, "little"))
    return source.advance(first).random_raw(count)


class EpochOrder:
    """Which sample stands where in one epoch; samples are numbered shard after shard.

    A sample's *turn* is its place after the blocks were shuffled; its *position* is where the
    bounded shuffle then puts it, less than `buffer` places away, so a reader holds at most so many.
    """

    def __init__(
        self,
        samples_by_shard: Sequence[int] | np.ndarray,
        fingerprint: str,
        *,
        seed: int,
        epoch: int,
        block: int = BLOCK,
        buffer: int = BUFFER,
    ) -> None:
        samples = np.asarray(samples_by_shard, dtype=np.int64).reshape(-1)  # [shards]
        blocks = -(-samples // block)  # [shards]
        self.block, self.buffer = block, buffer
        self.about = (fingerprint, seed, epoch)
        self._first_sample = np.concatenate([[0], samples.cumsum()])  # [shards + 1]
        self._first_block = np.concatenate([[0], blocks.cumsum()])  # [shards + 1]
        count = int(self._first_block[-1])
        bits = random_bits(count, *self.about, "blocks")
        self._blocks = np.argsort(bits, kind="stable").astype(np.uint32)  # [blocks]
        del bits  # at 10^8 samples every array of this length counts
        sizes = np.full(count, block, dtype=np.int32)
        full = samples > 0
        sizes[self._first_block[1:][full] - 1] = (samples - (blocks - 1) * block)[full]
        self._turns = np.zeros(count + 1, dtype=np.int64)  # the first turn of each block
        np.cumsum(sizes[self._blocks], out=self._turns[1:])

    def __len__(self) -> int:
        return int(self._first_sample[-1])

    def turns(self, first: int, stop: int) -> np.ndarray:
        """The turns that stand at positions [first, stop), which must lie in the epoch.

        A turn t moves to somewhere below t + buffer, so no turn below first - 2 buffer stands
        behind one that ends up at `first` or later, and none from stop + 2 buffer on stands before
        one that ends up below `stop`: sorting what lies between is sorting all.
        """
        low = max(0, first - 2 * self.buffer)
        high = min(len(self), stop + 2 * self.buffer)
        # The top 53 bits make a double in [0, 1) exactly.
        bits = random_bits(high - low, *self.about, "samples", first=low)
        keys = np.arange(low, high) + self.buffer * ((bits >> 11) * 2.0**-53)
        return low + np.argsort(keys, kind="stable")[first - low : stop - low]

    def samples(self, turns: np.ndarray) -> np.ndarray:
        """The sample of each turn, int64."""
        at = np.searchsorted(self._turns, turns, side="right") - 1
        blocks = self._blocks[at].astype(np.int64)
        shards = np.searchsorted(self._first_block, blocks, side="right") - 1
        inside = (blocks - self._first_block[shards]) * self.block + turns - self._turns[at]
        return self._first_sample[shards] + inside


def epoch_order(
    samples_by_shard: Sequence[int] | np.ndarray,
    fingerprint: str,
    *,
    seed: int,
    epoch: int,
    block: int = BLOCK,
    buffer: int = BUFFER,
) -> np.ndarray:
    """The whole epoch at once: sample indices [samples], each exactly once."""
    order = EpochOrder(
        samples_by_shard, fingerprint, seed=seed, epoch=epoch, block=block, buffer=buffer
    )
    return order.samples(order.turns(0, len(order)))
