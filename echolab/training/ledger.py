"""Keeps the ledger while training: what each optimizer step trained on, and under which noise."""

from hashlib import blake2b
from pathlib import Path

from echolab.data.ledger import Attempt, LedgerWriter, Row, next_attempt
from echolab.data.micro_batches import MicroBatch
from echolab.data.plan import Plan
from echolab.training import ranks
from echolab.training.datamodule import ShardDataModule
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


class StepLedger:
    """Gathers the micro-batches of a step, and writes them once the optimizer has used them."""

    def __init__(self, folder: Path, data: ShardDataModule, first_step: int) -> None:
        """Begins an attempt; collective."""
        feed = data.feed
        number = ranks.from_first(next_attempt(folder) if ranks.rank() == 0 else 0)
        attempt = Attempt(
            attempt=number,
            world=ranks.world() // feed.sequence_parallel,
            first_step=first_step,
            clips=datasets_of(feed.clips.plan),
            pairs=datasets_of(feed.pairs.plan) if feed.pairs else [],
        )
        self._items: list[tuple[MicroBatch, list[str]]] = []
        self._writer = None if data.writer is None else LedgerWriter(folder, attempt, data.writer)

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
