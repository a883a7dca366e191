"""Keeps the ledger while training: what each optimizer step trained on, and under which noise."""

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

from echolab.data.batch_sampler import Plan
from echolab.data.ledger import (
    Attempt,
    LedgerWriter,
    LeftOut,
    Row,
    next_attempt,
    read_left_out,
    write_left_out,
)
from echolab.data.train_dataset import MicroBatch
from echolab.training import distributed
from echolab.training.datamodule import Feed, ShardDataModule
from echolab.training.schedule import Skip
from echolab.types import Draws


def noise_hashes(draws: Draws) -> list[str]:
    """16 hexadecimal digits a clip: of its noise, its noise level and its uniforms.  [B]"""
    told = [part.detach().cpu() for part in (draws.noise, draws.sigmas, draws.uniforms)]
    return [
        blake2b(b"".join(part[i].numpy().tobytes() for part in told), digest_size=8).hexdigest()
        for i in range(len(draws.sigmas))
    ]


def datasets_of(plan: Plan) -> list[dict[str, object]]:
    """As the audit will look for them: a folder here by its whole path."""
    return [
        {**told, "folder": str(Path(told["folder"]).resolve())}
        if Path(told["folder"]).is_dir()
        else told
        for told in plan.datasets()
    ]


def left_out(feed: Feed, skips: Iterable[Skip]) -> Iterator[LeftOut]:
    """What the batches of `skips` hold, each batch once."""
    batches = {(s.kind, b): None for s in skips for b in range(s.first, s.stop)}
    for kind, batch in batches:
        stock = feed.clips if kind == "sft" else feed.pairs
        if stock is None:
            continue
        drawn = [one for one in stock.plan.batch(batch) if one.share]
        yield LeftOut(
            kind,
            batch,
            sources=[one.source for one in drawn],
            epochs=[one.epoch for one in drawn],
            keys=[stock.datasets[one.source].keys[one.sample] for one in drawn],
        )


class StepLedger:
    """Gathers the micro-batches of a step, and writes them once the optimizer has used them."""

    def __init__(
        self, folder: Path, data: ShardDataModule, first_step: int, skipped: Iterable[Skip] = ()
    ) -> None:
        """Begins an attempt; collective.  `skipped` is the schedule's."""
        feed = data.feed
        number = distributed.from_first(next_attempt(folder) if distributed.rank() == 0 else 0)
        attempt = Attempt(
            attempt=number,
            world=distributed.world() // feed.sequence_parallel,
            first_step=first_step,
            clips=datasets_of(feed.clips.plan),
            pairs=datasets_of(feed.pairs.plan) if feed.pairs else [],
        )
        self._items: list[tuple[MicroBatch, list[str]]] = []
        self._writer = None if data.writer is None else LedgerWriter(folder, attempt, data.writer)
        if distributed.rank() == 0:
            known = {(batch.kind, batch.batch) for batch in read_left_out(folder)}
            news = (b for b in left_out(feed, skipped) if (b.kind, b.batch) not in known)
            write_left_out(folder, news)

    def add(self, item: MicroBatch, draws: Draws) -> None:
        """A micro-batch that was trained on; one that only filled up is none."""
        if self._writer and item.share:
            self._items.append((item, noise_hashes(draws)))

    def commit(self, step: int, kind: str) -> None:
        """The optimizer has made step `step`."""
        items, self._items = self._items, []
        if self._writer:
            row = Row(
                step,
                kind,
                sources=[source for item, _ in items for source in item.sources],
                epochs=[epoch for item, _ in items for epoch in item.epochs],
                keys=[key for item, _ in items for key in item.batch.keys],
                noise=[noise for _, hashes in items for noise in hashes],
            )
            self._writer.write(row)

    def close(self) -> None:
        """Write the rows that could not be written when their steps were made."""
        if self._writer:
            self._writer.close()
