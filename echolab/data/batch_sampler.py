"""Which samples each global batch holds: datasets by weight, sizes apart, remainders told.

A *stream* is one dataset gone through again and again.  A *bucket* is the streams whose clips have
one size; a global batch comes from one bucket, so that it stacks, and small clips share the place
of a large one, so that every batch holds about as many tokens and takes about as long.  All of it
is a function of the batch's number: planned before the first step, the same for any number of
ranks, workers and micro-batches.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from echolab.data.mixture import Mixing
from echolab.data.shuffle import BLOCK, BUFFER, VERSION, EpochOrder, random_bits
from echolab.errors import ConfigError, DataError

Remainder = Literal["carry", "drop", "pad"]
REMAINDERS = ("carry", "drop", "pad")
Size = tuple[int, int, int]  # frames, height, width of the latents


class Source(NamedTuple):
    """What a plan knows of a dataset."""

    name: str  # for messages
    fingerprint: str
    samples_by_shard: Sequence[int] | np.ndarray
    size: Size = (1, 1, 1)
    weight: float | None = None  # share of all clips; None: the number of its samples
    order_name: str = ""  # what the order depends on; "": the fingerprint

    @property
    def named(self) -> str:
        """Return what the order of its samples depends on: data encoded again may keep theirs."""
        return self.order_name or self.fingerprint

    @property
    def samples(self) -> int:
        """How many there are."""
        return int(np.sum(self.samples_by_shard, dtype=np.int64))


class Order(NamedTuple):
    """How samples are put in order; a run goes on only with the order that it began with."""

    block: int = BLOCK  # neighbours in a shard that stay together when blocks are shuffled
    buffer: int = BUFFER  # how many places the shuffle above them moves a sample at most
    remainder: Remainder = "carry"  # of an epoch that global batches do not divide
    token_budget: int | None = None  # latent places a clip's place holds; None: the largest clip's

    def check(self) -> None:
        """ConfigError for what cannot be."""
        if self.block < 1 or self.buffer < 0:
            raise ConfigError(
                f"data.shuffle_block_size={self.block}, data.shuffle_buffer={self.buffer}: "
                "need 1 or more, and 0 or more"
            )
        if self.remainder not in REMAINDERS:
            raise ConfigError(
                f"data.last_batch={self.remainder}: unknown; one of {', '.join(REMAINDERS)}"
            )


ORDER = Order()


class Drawn(NamedTuple):
    """One clip of a global batch."""

    source: int  # number of the dataset
    epoch: int  # how often that dataset was gone through before
    sample: int
    share: float = 1.0  # of its error; 0 where it only fills up the batch


class Stream:
    """One dataset without end: position p is in epoch p div span, `span` positions an epoch."""

    def __init__(self, number: int, source: Source, order: Order, seed: int, batch: int) -> None:
        """`batch` is the clips of a global batch; raises DataError, ConfigError for too few."""
        self.number, self.source, self.order, self.seed = number, source, order, seed
        self.samples = source.samples
        if not self.samples:
            raise DataError(f"{source.name}: holds no sample; nothing to train on")
        whole = {"carry": self.samples, "drop": self.samples // batch * batch}
        self.span = whole.get(order.remainder, -(-self.samples // batch) * batch)
        if not self.span:
            raise ConfigError(
                f"data.last_batch=drop: {source.name} has {self.samples} samples, less than one "
                f"global batch of {batch}; take carry or pad"
            )
        self._orders: dict[int, EpochOrder] = {}

    def epoch(self, number: int) -> EpochOrder:
        """The order of an epoch; the two used last are kept."""
        if number not in self._orders:
            last = list(self._orders.items())[-1:]
            self._orders = dict(last)
            self._orders[number] = EpochOrder(
                self.source.samples_by_shard,
                self.source.named,
                seed=self.seed,
                epoch=number,
                block=self.order.block,
                buffer=self.order.buffer,
            )
        return self._orders[number]

    def take(self, first: int, stop: int) -> list[Drawn]:
        """The clips at positions [first, stop), by epoch, then as they lie on disk's way.

        Ranks cut a batch by place; sorted so, a rank reads neighbours.
        """
        found: list[Drawn] = []
        while first < stop:
            epoch, offset = divmod(first, self.span)
            end = min(self.span, offset + stop - first)
            order = self.epoch(epoch)
            turns = np.sort(order.turns(offset, min(end, self.samples)))
            samples = order.samples(turns).tolist()
            found += [Drawn(self.number, epoch, sample) for sample in samples]
            if end > self.samples:
                filling = Drawn(self.number, epoch, samples[0], 0.0)
                found += [filling] * (end - max(offset, self.samples))
            first += end - offset
        return found


class Bucket:
    """The streams of one size."""

    def __init__(
        self, sources: dict[int, Source], order: Order, seed: int, batch_size: int, together: int
    ) -> None:
        """`together` clips of this size share the place of one clip of the batch."""
        if len(sources) > 1 and order.remainder != "carry":
            names = ", ".join(source.name for source in sources.values())
            raise ConfigError(
                f"data.last_batch={order.remainder}: {names} are mixed in one batch, whose epochs "
                "end apart; take carry, or put them into one folder"
            )
        self.together, self.batch, self.seed = together, batch_size * together, seed
        self.streams = [Stream(i, s, order, seed, self.batch) for i, s in sources.items()]
        self.weight = sum(weights_of(list(sources.values())))
        # Named by what is in it: another bucket beside it changes nothing here.
        self.name = "+".join(source.named for source in sources.values())
        self._mixing = Mixing(weights_of(list(sources.values())), self.name, seed)

    def places(self, number: int) -> list[tuple[Stream, int, int]]:
        """The positions [first, stop) of each stream that batch `number` takes."""
        first, stop = number * self.batch, (number + 1) * self.batch
        starts, stops = self._mixing.before(first), self._mixing.before(stop)
        return list(zip(self.streams, starts, stops, strict=True))

    def take(self, number: int) -> list[Drawn]:
        """Batch `number` of this bucket."""
        clips = [clip for s, first, stop in self.places(number) for clip in s.take(first, stop)]
        real = sum(clip.share > 0 for clip in clips)
        if real < len(clips):  # the mean over the whole batch is then that over the real ones
            clips = [clip._replace(share=clip.share * len(clips) / real) for clip in clips]
        # Turned by chance, so that no rank always gets the first datasets or the oldest blocks.
        turn = int(random_bits(1, self.name, self.seed, "turn", first=number)[0] % len(clips))
        return clips[turn:] + clips[:turn]


def weights_of(sources: Sequence[Source]) -> list[float]:
    """Given weights, or the numbers of samples; ConfigError for a mixture of both."""
    given = [source.weight for source in sources if source.weight is not None]
    if given and len(given) < len(sources):
        raise ConfigError("data.clip_weights: give one for each dataset, or none")
    return given or [float(source.samples) for source in sources]


def places_of(sources: Sequence[Source], order: Order) -> int:
    """The latent places that a clip's place in a batch holds."""
    largest = max(int(np.prod(source.size)) for source in sources)
    budget = order.token_budget or largest
    if budget < largest:
        raise ConfigError(
            f"data.token_budget={budget}: the largest clips have {largest} latent places; "
            "give at least that, or null"
        )
    return budget


class Plan:
    """Global batches by number, over all datasets of one kind."""

    def __init__(
        self, sources: Sequence[Source], *, batch_size: int, seed: int, order: Order = ORDER
    ) -> None:
        """`batch_size` counts places for clips of the largest size."""
        order.check()
        Mixing(weights_of(sources))  # refuses weights that say nothing
        self.sources, self.order = list(sources), order
        used = {i: source for i, source in enumerate(sources) if source.weight != 0}
        budget = places_of(list(used.values()), order)
        self.buckets = [
            Bucket(
                {i: source for i, source in used.items() if source.size == size},
                order, seed, batch_size, budget // int(np.prod(size)),
            )
            for size in sorted({source.size for source in used.values()})
        ]  # fmt: skip
        name = "+".join(bucket.name for bucket in self.buckets)
        self._mixing = Mixing([b.weight / b.together for b in self.buckets], name, seed)

    def bucket(self, number: int) -> tuple[Bucket, int]:
        """The bucket of global batch `number`, and how many of its batches came before."""
        which = int(self._mixing.members(number, number + 1)[0])
        return self.buckets[which], self._mixing.before(number)[which]

    def batch(self, number: int) -> list[Drawn]:
        """The clips of global batch `number`: batch_size, or as many times more as are small."""
        bucket, before = self.bucket(number)
        return bucket.take(before)

    def state(self) -> dict[str, Any]:
        """What the order depends on, as JSON: integers and names, whatever was trained on."""
        return {
            "version": VERSION,
            **self.order._asdict(),
            "datasets": [[s.named, list(s.size), s.weight] for s in self.sources],
        }

    def datasets(self) -> list[dict[str, Any]]:
        """What a ledger is audited against, as JSON."""
        spans = {s.number: s.span for bucket in self.buckets for s in bucket.streams}
        return [
            {
                "folder": source.name,
                "fingerprint": source.fingerprint,
                "order": source.named,
                "samples": source.samples,
                "span": spans.get(number, 0),
            }
            for number, source in enumerate(self.sources)
        ]

    def progress(self, batches: int) -> list[tuple[int, int]]:
        """(epochs gone through, samples left out so far) of each dataset after so many batches."""
        found = [(0, 0)] * len(self.sources)
        for bucket, done in zip(self.buckets, self._mixing.before(batches), strict=True):
            for stream, _, stop in bucket.places(done - 1) if done else []:
                epochs = stop // stream.span
                found[stream.number] = (epochs, epochs * max(0, stream.samples - stream.span))
        return found
