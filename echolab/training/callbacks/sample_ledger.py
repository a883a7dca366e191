"""The sample ledger: the samples and the noise that each optimizer step trained on."""

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

from echolab.data.batch_sampler import BatchSampler
from echolab.data.ledger import (
    LEDGER,
    Attempt,
    LedgerWriter,
    Row,
    SkippedBatch,
    next_attempt,
    read_skipped,
    write_skipped,
)
from echolab.data.train_dataset import MicroBatch
from echolab.training import distributed
from echolab.training.callbacks.callback import Callback, RunState
from echolab.training.datamodule import ShardDataModule, TrainData
from echolab.training.schedule import Skip
from echolab.types import Draws


def noise_hashes(draws: Draws) -> list[str]:
    """Return a hash (16 hex digits) of each clip's noise, noise level and uniforms.  [B]"""
    parts = [part.detach().cpu() for part in (draws.noise, draws.sigmas, draws.uniforms)]
    return [
        blake2b(b"".join(part[i].numpy().tobytes() for part in parts), digest_size=8).hexdigest()
        for i in range(len(draws.sigmas))
    ]


def datasets_of(plan: BatchSampler) -> list[dict[str, object]]:
    """Return the datasets as the audit opens them: local folders by absolute path."""
    return [
        {**dataset, "folder": str(Path(dataset["folder"]).resolve())}
        if Path(dataset["folder"]).is_dir()
        else dataset
        for dataset in plan.datasets()
    ]


def left_out(train_data: TrainData, skips: Iterable[Skip]) -> Iterator[SkippedBatch]:
    """Yield the samples of the batches in `skips`, each batch once."""
    # A dict removes duplicates of overlapping skips and keeps the order.
    batches = {(s.kind, b): None for s in skips for b in range(s.first, s.stop)}
    for kind, batch in batches:
        mixture = train_data.clips if kind == "sft" else train_data.pairs
        if mixture is None:
            continue
        samples = [item for item in mixture.sampler.batch(batch) if item.loss_weight]
        yield SkippedBatch(
            kind,
            batch,
            sources=[item.source for item in samples],
            epochs=[item.epoch for item in samples],
            keys=[mixture.datasets[item.source].keys[item.sample] for item in samples],
        )


class SampleLedger(Callback):
    """Collects the micro-batches of a step and writes them after the optimizer step."""

    def __init__(self, run_dir: Path, data: ShardDataModule) -> None:
        self.folder, self.data = run_dir / LEDGER, data
        self._items: list[tuple[MicroBatch, list[str]]] = []
        self._writer: LedgerWriter | None = None

    def on_start(self, state: RunState) -> None:
        """Begin a new attempt in the ledger; collective."""
        train_data = self.data.train_data
        # Rank 0 lists the folder and chooses the number of the attempt.
        number = next_attempt(self.folder) if distributed.rank() == 0 else 0
        attempt = Attempt(
            attempt=distributed.from_first(number),
            world=distributed.world() // train_data.sequence_parallel,
            first_step=state.step,
            clips=datasets_of(train_data.clips.sampler),
            pairs=datasets_of(train_data.pairs.sampler) if train_data.pairs else [],
        )
        # Only one of the ranks that share a clip writes.
        writer = self.data.writer
        self._items = []
        self._writer = None if writer is None else LedgerWriter(self.folder, attempt, writer)
        # Rank 0 lists the batches that rollbacks skip, each once.
        if distributed.rank() == 0:
            known = {(batch.kind, batch.batch) for batch in read_skipped(self.folder)}
            skipped = left_out(train_data, state.schedule.skipped)
            write_skipped(self.folder, (b for b in skipped if (b.kind, b.batch) not in known))
        state.module.on_draws = self.add

    def on_rollback(self, state: RunState) -> None:
        """Begin a new attempt, by which the audit detects that steps were undone."""
        self.on_start(state)

    def add(self, item: MicroBatch, draws: Draws) -> None:
        """Add a micro-batch that was trained on, unless it only pads a short batch."""
        if self._writer and item.loss_weight:
            self._items.append((item, noise_hashes(draws)))

    def after_step(self, state: RunState) -> None:
        """Write the samples of the step."""
        # Clear the items even without a writer, so that the list does not grow.
        items, self._items = self._items, []
        if self._writer:
            row = Row(
                state.step - 1,  # the ledger counts steps from 0
                state.kind,
                sources=[source for item, _ in items for source in item.sources],
                epochs=[epoch for item, _ in items for epoch in item.epochs],
                keys=[key for item, _ in items for key in item.batch.keys],
                noise=[noise for _, hashes in items for noise in hashes],
            )
            self._writer.write(row)

    def on_end(self, state: RunState) -> None:
        """Write the rows that could not be written right after their steps."""
        if self._writer:
            self._writer.close()
