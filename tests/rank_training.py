"""One rank of a test with several:

`python rank_training.py FOLDER STRATEGY DEVICES OUT [key=value ...]`.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import lora_settings
import pytorch_lightning as pl
import runs

from echolab.training.checkpoints.writer import CheckpointWriter
from echolab.training.config import Intervals
from echolab.training.datamodule import ValData
from echolab.training.fit import Machine
from echolab.training.loop import TrainLoop


def save_what_was_loaded(to: Path) -> None:
    """Save every checkpoint again below `to` when a run resumes from it, before any step."""
    start = TrainLoop.on_train_start

    def and_save(self: TrainLoop, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        start(self, trainer, module)
        writer = CheckpointWriter(to, self.masters, self.ema, keep=lambda step: True)
        writer.begin(self.checkpoint_state())
        writer.finish()

    TrainLoop.on_train_start = and_save  # type: ignore[method-assign]


def main(words: Sequence[str]) -> None:
    """Train, and write the rows that rank 0 logged."""
    folder, strategy, devices, out = words[:4]
    options = dict(word.split("=") for word in words[4:])
    plan = runs.schedule(*json.loads(options.get("plan", "[]")))
    root = Path(folder)
    if "again" in options:
        save_what_was_loaded(Path(options["again"]))
    held = ValData(runs.write_clips(root / "held", 4, 50), 4, 2)
    result, rows = runs.train(
        root,
        plan,
        run_dir=Path(out),
        intervals=Intervals(log_every=1, save_every=0, val_every=3),
        val_data=held,
        phases=runs.PHASES,
        micro_batch_size=int(options.get("micro", 0)) or None,
        # eps: a gradient of 1e-9 that is rounding alone must not become a full step.
        optim=runs.Optim(max_grad_norm=0.5, eps=1e-4),
        machine=Machine(
            strategy,
            devices=int(devices),
            precision=options.get("precision", "32-true"),
            zero3_shard_small=options.get("small") != "no",
            activation_checkpointing=options.get("checkpointing", "none"),
            sequence_parallel=int(options.get("together", 1)),
        ),
        ref_model_sync_steps=int(options.get("sync", 0)),
        **(lora_settings.settings(options["lora"]) if "lora" in options else {}),
    )
    if rows:
        (Path(out) / "rows.json").write_text(json.dumps(rows))
        print(result)


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # all is written; threads of gloo may abort Python's shutdown
