"""Choose the samples of each global batch: mix datasets by weight, bucket by clip size.

A *stream* is one dataset, repeated infinitely.  A *bucket* groups the streams whose clips have the
same size; a global batch comes from one bucket, so that it can be stacked.  Several small clips use
the slot of one large clip, so that all batches have about the same number of tokens and take about
the same time.  The content of a batch is a function of its index: fixed before the first step, and
the same for any number of ranks, workers and micro-batches.

The order of one epoch depends only on (fingerprint, seed, epoch); its only state are integers.
Samples are stored in shards, and reading neighbors is cheap; so blocks of neighbors are shuffled,
then every sample moves a bounded distance.  Any range of the order can be computed separately, and
there is no state per sample, so memory grows with the number of shards and blocks alone.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

import numpy as np

from echolab.errors import ConfigError, DataError

ORDER_VERSION = 1  # a run can resume only with the version of the order that it started with
BLOCK_SIZE, BUFFER_SIZE = 32, 1024  # samples

LastBatch = Literal["carry", "drop", "pad"]
LAST_BATCH_MODES = ("carry", "drop", "pad")
Size = tuple[int, int, int]  # frames, height, width of the latents

CIRCLE = 1 << 64  # a full circle, as an integer
GOLDEN = 0x9E3779B97F4A7C15  # CIRCLE / golden ratio, odd


# The order of one epoch


def random_bits(count: int, *parts: object, first: int = 0) -> np.ndarray:
    """Return uint64 [count] from index `first` on of the random stream that `parts` seed.

    Use raw bits: numpy guarantees that they are stable across versions, unlike Generator methods.
    """
    digest = blake2b("/".join(map(str, parts)).encode(), digest_size=16).digest()
    source = np.random.PCG64(int.from_bytes(digest, "little"))
    return source.advance(first).random_raw(count)


class EpochOrder:
    """The order of the samples in one epoch; samples are numbered shard after shard.

    A sample's *index* is its place after the block shuffle; its *position* is its place after the
    bounded shuffle, which moves each sample by less than `buffer_size`.
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
        del bits  # limit memory for datasets of 10^8 samples
        # The last block of each shard may be smaller than the others.
        sizes = np.full(count, block_size, dtype=np.int32)
        nonempty = samples > 0
        sizes[self._first_block[1:][nonempty] - 1] = (samples - (blocks - 1) * block_size)[nonempty]
        self._first_index = np.zeros(count + 1, dtype=np.int64)  # [blocks + 1]
        np.cumsum(sizes[self._blocks], out=self._first_index[1:])

    def __len__(self) -> int:
        return int(self._first_sample[-1])

    def indices(self, first: int, stop: int) -> np.ndarray:
        """Return the indices of the samples at positions [first, stop) of the epoch.

        The sort key of index i lies in [i, i + buffer_size).  So all indices below
        first - 2 buffer_size come before position `first`, and all indices from
        stop + 2 buffer_size on come after position `stop`: sorting the indices in between suffices.
        """
        # Compute keys only for indices near the range.
        low = max(0, first - 2 * self.buffer_size)
        high = min(len(self), stop + 2 * self.buffer_size)
        # The top 53 bits convert exactly to a double in [0, 1).
        bits = random_bits(high - low, *self.seed_parts, "samples", first=low)
        keys = np.arange(low, high) + self.buffer_size * ((bits >> 11) * 2.0**-53)
        return low + np.argsort(keys, kind="stable")[first - low : stop - low]

    def samples(self, indices: np.ndarray) -> np.ndarray:
        """Return the sample at each index, int64."""
        # Find the shuffled block of each index, its shard, and its start in that shard.
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


# Batches over all epochs and datasets


class Source(NamedTuple):
    """The properties of one dataset that the sampler needs."""

    name: str  # for messages
    fingerprint: str
    samples_by_shard: Sequence[int] | np.ndarray
    size: Size = (1, 1, 1)
    weight: float | None = None  # relative sampling weight; None: the number of samples
    order_name: str = ""  # seeds the order; "": the fingerprint

    @property
    def order_seed(self) -> str:
        """Return the name that seeds the order; it may persist when the dataset is re-encoded."""
        return self.order_name or self.fingerprint

    @property
    def samples(self) -> int:
        """Return the number of samples."""
        return int(np.sum(self.samples_by_shard, dtype=np.int64))


class ShuffleConfig(NamedTuple):
    """The shuffle settings; a run can resume only with the values that it started with."""

    shuffle_block_size: int = BLOCK_SIZE  # neighbors in a shard that are shuffled as one block
    shuffle_buffer: int = BUFFER_SIZE  # maximum distance that a sample then moves
    last_batch: LastBatch = "carry"  # handling of an incomplete batch at the end of an epoch
    token_budget: int | None = None  # latent positions per slot; None: those of the largest clip

    def check(self) -> None:
        """Raise ConfigError for a value out of range."""
        if self.shuffle_block_size < 1 or self.shuffle_buffer < 0:
            raise ConfigError(
                f"data.shuffle_block_size={self.shuffle_block_size}, "
                f"data.shuffle_buffer={self.shuffle_buffer}: need 1 or more, and 0 or more"
            )
        if self.last_batch not in LAST_BATCH_MODES:
            raise ConfigError(
                f"data.last_batch={self.last_batch}: unknown; one of {', '.join(LAST_BATCH_MODES)}"
            )


DEFAULT_SHUFFLE = ShuffleConfig()


class DrawnSample(NamedTuple):
    """One clip of a global batch."""

    source: int  # index of the dataset
    epoch: int  # epoch of that dataset, from 0
    sample: int
    loss_weight: float = 1.0  # 0 for a clip that only pads the batch


def floor_sum(count: int, modulus: int, slope: int, offset: int) -> int:
    """Return the sum of (slope * i + offset) // modulus over i in [0, count).

    The recursion is that of Euclid's algorithm.
    """
    total = 0
    # Each iteration extracts the integer parts of slope and offset, and halves the numbers or more.
    while count:
        quotient, slope = divmod(slope, modulus)
        total += count * (count - 1) // 2 * quotient
        quotient, offset = divmod(offset, modulus)
        total += count * quotient
        # The remaining sum counts lattice points below a line: swap the axes.
        top = slope * count + offset
        count, offset = divmod(top, modulus)
        modulus, slope = slope, modulus
    return total


class Interleaver:
    """Choose between members by weight, as a pure function of the position.

    Position p maps to the point frac(start + p * golden ratio) of [0, 1), and each member owns an
    interval as long as its relative weight.  Such points are evenly spread, so at every position
    every member has been chosen in proportion to its weight, up to a few positions.  The number of
    the first p points that fall into an interval is a sum of floors, computed in some hundred
    steps for any p.  All arithmetic uses integers, so it is the same on every machine.  A member
    of weight 0 is never chosen.
    """

    def __init__(self, weights: Sequence[float], *parts: object) -> None:
        """Seed with `parts`; raise ConfigError unless all weights are >= 0 and one is > 0."""
        if not weights or not all(0 <= w < float("inf") for w in weights) or not sum(weights):
            raise ConfigError(
                f"weights {list(weights)}: need one 0 or more for each dataset, and one above 0"
            )
        # Each member owns an interval of the circle, as long as its relative weight.
        total = sum(weights)
        # The last member with a weight absorbs the rounding error.
        last = max(i for i, weight in enumerate(weights) if weight)
        self._bounds = [0]
        for i, weight in enumerate(weights):
            end = self._bounds[-1] + round(weight / total * CIRCLE)
            self._bounds.append(min(end, CIRCLE) if i < last else CIRCLE)
        self._start = int(random_bits(1, *parts, "mixing")[0])

    def counts(self, position: int) -> list[int]:
        """Return how many of the first `position` positions are assigned to each member."""

        def below(bound: int) -> int:
            """Count points in [0, bound): they do not wrap when CIRCLE - bound is added."""
            wraps = floor_sum(position, CIRCLE, GOLDEN, self._start + CIRCLE - bound)
            return position - (wraps - floor_sum(position, CIRCLE, GOLDEN, self._start))

        # Points below the end of a member's interval minus points below its start.
        counts = [below(bound) for bound in self._bounds]
        return [after - before for before, after in zip(counts, counts[1:], strict=False)]

    def members(self, first: int, stop: int) -> np.ndarray:
        """Return the members at positions [first, stop), int64."""
        # uint64 overflow wraps around the circle.
        steps = np.arange(first, stop, dtype=np.uint64)
        points = steps * np.uint64(GOLDEN) + np.uint64(self._start)
        inner = [bound for bound in self._bounds[1:] if bound < CIRCLE]
        return np.searchsorted(np.array(inner, dtype=np.uint64), points, side="right")


class Stream:
    """One infinitely repeated dataset: position p is in epoch p // span, `span` positions each."""

    def __init__(
        self, index: int, source: Source, shuffle: ShuffleConfig, seed: int, batch: int
    ) -> None:
        """Lay out epochs for global batches of `batch` clips; raise DataError or ConfigError."""
        self.index, self.source, self.shuffle, self.seed = index, source, shuffle, seed
        self.samples = source.samples
        if not self.samples:
            raise DataError(f"{source.name}: holds no sample; nothing to train on")
        # Positions per epoch: all samples, or their number rounded down or up to full batches.
        spans = {"carry": self.samples, "drop": self.samples // batch * batch}
        self.span = spans.get(shuffle.last_batch, -(-self.samples // batch) * batch)
        if not self.span:
            raise ConfigError(
                f"data.last_batch=drop: {source.name} has {self.samples} samples, less than one "
                f"global batch of {batch}; use carry or pad"
            )
        self._orders: dict[int, EpochOrder] = {}

    def order(self, epoch: int) -> EpochOrder:
        """Return the order of an epoch; cache the last two."""
        if epoch not in self._orders:
            self._orders = dict(list(self._orders.items())[-1:])
            self._orders[epoch] = EpochOrder(
                self.source.samples_by_shard,
                self.source.order_seed,
                seed=self.seed,
                epoch=epoch,
                block_size=self.shuffle.shuffle_block_size,
                buffer_size=self.shuffle.shuffle_buffer,
            )
        return self._orders[epoch]

    def take(self, first: int, stop: int) -> list[DrawnSample]:
        """Return the clips at positions [first, stop), sorted by epoch, then by index.

        Each process reads a contiguous part of the batch; in this order it reads neighbors on disk.
        """
        drawn: list[DrawnSample] = []
        # A range may span several epochs: process it epoch by epoch.
        while first < stop:
            epoch, offset = divmod(first, self.span)
            end = min(self.span, offset + stop - first)
            order = self.order(epoch)
            indices = np.sort(order.indices(offset, min(end, self.samples)))
            samples = order.samples(indices).tolist()
            drawn += [DrawnSample(self.index, epoch, sample) for sample in samples]
            # Padding repeats a sample with weight 0, so that it has no gradient.
            if end > self.samples:
                padding = DrawnSample(self.index, epoch, samples[0], 0.0)
                drawn += [padding] * (end - max(offset, self.samples))
            first += end - offset
        return drawn


class Bucket:
    """The streams whose clips have the same size."""

    def __init__(
        self,
        sources: dict[int, Source],
        shuffle: ShuffleConfig,
        seed: int,
        batch_size: int,
        clips_per_slot: int,
    ) -> None:
        """Let `clips_per_slot` clips of this size use the slot of one clip of the largest size."""
        if len(sources) > 1 and shuffle.last_batch != "carry":
            names = ", ".join(source.name for source in sources.values())
            raise ConfigError(
                f"data.last_batch={shuffle.last_batch}: {names} are mixed in one batch, and their "
                "epochs end at different steps; use carry, or put them into one folder"
            )
        self.clips_per_slot, self.seed = clips_per_slot, seed
        self.batch = batch_size * clips_per_slot  # clips of a global batch
        self.streams = [Stream(i, s, shuffle, seed, self.batch) for i, s in sources.items()]
        weights = relative_weights(list(sources.values()))
        self.weight = sum(weights)
        # The name seeds the draws; it depends only on this bucket, so other buckets have no effect.
        self.name = "+".join(source.order_seed for source in sources.values())
        self._interleaver = Interleaver(weights, self.name, seed)

    def positions(self, index: int) -> list[tuple[Stream, int, int]]:
        """Return the positions [first, stop) of each stream that batch `index` consists of."""
        starts = self._interleaver.counts(index * self.batch)
        stops = self._interleaver.counts((index + 1) * self.batch)
        return list(zip(self.streams, starts, stops, strict=True))

    def take(self, index: int) -> list[DrawnSample]:
        """Return the clips of batch `index` of this bucket."""
        clips = [clip for s, first, stop in self.positions(index) for clip in s.take(first, stop)]
        # Rescale so that the mean over the batch equals the mean over the clips without padding.
        real = sum(clip.loss_weight > 0 for clip in clips)
        if real < len(clips):
            clips = [
                clip._replace(loss_weight=clip.loss_weight * len(clips) / real) for clip in clips
            ]
        # Rotate randomly, so that no process always gets the first datasets or the oldest blocks.
        bits = random_bits(1, self.name, self.seed, "turn", first=index)
        shift = int(bits[0] % len(clips))
        return clips[shift:] + clips[:shift]


def relative_weights(sources: Sequence[Source]) -> list[float]:
    """Return the weights, or the numbers of samples if none is set; raise ConfigError for a mix."""
    given = [source.weight for source in sources if source.weight is not None]
    if given and len(given) < len(sources):
        raise ConfigError("data.clip_weights: give one for each dataset, or none")
    return given or [float(source.samples) for source in sources]


def positions_per_slot(sources: Sequence[Source], shuffle: ShuffleConfig) -> int:
    """Return the number of latent positions per slot; raise ConfigError for a small budget."""
    largest = max(int(np.prod(source.size)) for source in sources)
    budget = shuffle.token_budget or largest
    if budget < largest:
        raise ConfigError(
            f"data.token_budget={budget}: the largest clips have {largest} latent positions; "
            "give at least that, or null"
        )
    return budget


class BatchSampler:
    """Returns global batches by index, over all datasets of one kind."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        batch_size: int,
        seed: int,
        shuffle: ShuffleConfig = DEFAULT_SHUFFLE,
    ) -> None:
        """Compose batches of `batch_size` slots; a slot fits one clip of the largest size."""
        shuffle.check()
        Interleaver(relative_weights(sources))  # raises ConfigError for bad weights
        self.sources, self.shuffle = list(sources), shuffle
        # A dataset of weight 0 is never sampled, so it must not affect the size of a slot.
        used = {i: source for i, source in enumerate(sources) if source.weight != 0}
        budget = positions_per_slot(list(used.values()), shuffle)
        self.buckets = [
            Bucket(
                {i: source for i, source in used.items() if source.size == size},
                shuffle, seed, batch_size, budget // int(np.prod(size)),
            )
            for size in sorted({source.size for source in used.values()})
        ]  # fmt: skip
        name = "+".join(bucket.name for bucket in self.buckets)
        # A bucket with n clips per slot is chosen n times less often.
        weights = [bucket.weight / bucket.clips_per_slot for bucket in self.buckets]
        self._interleaver = Interleaver(weights, name, seed)

    def bucket(self, index: int) -> tuple[Bucket, int]:
        """Return the bucket of global batch `index`, and how many earlier batches came from it."""
        member = int(self._interleaver.members(index, index + 1)[0])
        return self.buckets[member], self._interleaver.counts(index)[member]

    def batch(self, index: int) -> list[DrawnSample]:
        """Return the clips of global batch `index`: batch_size, or more if the clips are small."""
        bucket, before = self.bucket(index)
        return bucket.take(before)

    def state(self) -> dict[str, Any]:
        """Return all inputs of the order as JSON; the same at every step."""
        block_size, buffer_size, last_batch, token_budget = self.shuffle
        # Keep these keys if a setting is renamed: they are stored in checkpoints.
        return {
            "version": ORDER_VERSION,
            "block": block_size,
            "buffer": buffer_size,
            "remainder": last_batch,
            "token_budget": token_budget,
            "datasets": [[s.order_seed, list(s.size), s.weight] for s in self.sources],
        }

    def datasets(self) -> list[dict[str, Any]]:
        """Return the description of each dataset, as JSON, for the audit of a ledger."""
        spans = {s.index: s.span for bucket in self.buckets for s in bucket.streams}
        return [
            {
                "folder": source.name,
                "fingerprint": source.fingerprint,
                "order": source.order_seed,
                "samples": source.samples,
                "span": spans.get(index, 0),
            }
            for index, source in enumerate(self.sources)
        ]

    def progress(self, batches: int) -> list[tuple[int, int]]:
        """Return (finished epochs, dropped samples) of each dataset after `batches` batches."""
        # The end positions of each bucket's last batch give the progress of its streams.
        progress = [(0, 0)] * len(self.sources)
        for bucket, done in zip(self.buckets, self._interleaver.counts(batches), strict=True):
            for stream, _, stop in bucket.positions(done - 1) if done else []:
                epochs = stop // stream.span
                progress[stream.index] = (epochs, epochs * max(0, stream.samples - stream.span))
        return progress
