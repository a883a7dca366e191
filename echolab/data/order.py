"""The order of an epoch, a pure function of (fingerprint, seed, epoch): integers are all its state.

Samples lie in shards, and reads are cheap when they are near each other; so blocks of neighbours
are put in random order, then every sample moves a bounded way.
"""

from hashlib import blake2b

import numpy as np


def _random_bits(count: int, *parts: object) -> np.ndarray:
    """[count] uint64.  Raw bits: numpy promises these, not what its Generators make of them."""
    digest = blake2b("/".join(map(str, parts)).encode(), digest_size=16).digest()
    return np.random.PCG64(int.from_bytes(digest, "little")).random_raw(count)


def _blocks(samples_by_shard: list[int], block: int) -> list[tuple[int, int]]:
    """(first, past the last) of each run of neighbours; no run crosses shards."""
    found, shard_start = [], 0
    for samples in samples_by_shard:
        shard_end = shard_start + samples
        found += [
            (start, min(start + block, shard_end)) for start in range(shard_start, shard_end, block)
        ]
        shard_start = shard_end
    return found


def epoch_order(
    samples_by_shard: list[int],
    fingerprint: str,
    *,
    seed: int,
    epoch: int,
    block: int = 32,
    buffer: int = 1024,
) -> np.ndarray:
    """Sample indices [samples], each exactly once; samples are numbered shard after shard.

    No sample stands more than `buffer` places from where the shuffled blocks put it, so a reader
    holds at most so many.  Depends on nothing but its arguments.
    """
    blocks = _blocks(samples_by_shard, block)
    order = np.argsort(_random_bits(len(blocks), fingerprint, seed, epoch, "blocks"), kind="stable")
    indices = np.concatenate([np.arange(*blocks[i]) for i in order] or [np.arange(0)])
    # The top 53 bits make a double in [0, 1) exactly.
    uniform = (_random_bits(len(indices), fingerprint, seed, epoch, "samples") >> 11) * 2.0**-53
    return indices[np.argsort(np.arange(len(indices)) + buffer * uniform, kind="stable")]
