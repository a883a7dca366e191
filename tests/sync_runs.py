"""Drawn talkers and runs that train SyncNet on them, shared by tests; also one rank of a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_prep.draw import draw_dataset
from data_prep.options import DrawOptions
from echolab.data.shard_reader import ShardDataset, open_dataset
from echolab.diffusion.phases import PHDA, ModalityDropout
from echolab.metrics.sync_clips import measure_cepstra
from echolab.metrics.sync_training import SyncContrast, standardize, sync_network
from echolab.tasks.curriculum import Curriculum, Stage
from echolab.training.config import Intervals
from echolab.training.datamodule import ValData
from echolab.training.engine.machine import Machine
from echolab.training.fit import FitResult, TrainConfig, fit
from echolab.training.module import Optim
from echolab.training.schedule import Epoch, Schedule

SMALL = {"network": "SyncNetDemo", "embed_dim": 32, "frames": 17}
PUBLISHED = {"network": "SyncNet", "embed_dim": 1024, "frames": 12}


def talkers(folder: Path, count: int, *, first: int = 0, frames: int = 25) -> ShardDataset:
    """Draw a raw dataset, or return the one that exists."""
    if not (folder / "dataset.json").exists():
        options = DrawOptions(folder, num_clips=count, first=first, frames=frames, seed=3)
        draw_dataset(options, lambda done: None)
    return open_dataset(folder)


def train(
    root: Path, steps: int, architecture: dict[str, Any] | None = None, **changes: Any
) -> tuple[FitResult, list[dict[str, Any]]]:
    """Train in `root`/run on `root`/clips; return the result and the logged rows."""
    rows: list[dict[str, Any]] = []
    architecture = architecture or SMALL
    clips = talkers(root / "clips", 12)
    net = sync_network(architecture, 0)
    standardize(net, *measure_cepstra(clips))
    settings: dict[str, Any] = {
        "run_dir": root / "run",
        "clips": [clips],
        "schedule": Schedule([Epoch("sync", steps, 2e-3)], warmup=5),
        "curriculum": Curriculum([Stage(1, {"i2v": 1.0})]),
        "objectives": {"sync": SyncContrast()},
        "phases": ModalityDropout(PHDA),
        "batch_size": 8,
        "optim": Optim(betas=(0.9, 0.99), ema_decay=0.9),
        "log_metrics": lambda step, values: rows.append({"step": step, **values}),
    }
    return fit(TrainConfig(net, architecture, **{**settings, **changes})), rows


def main(words: Sequence[str]) -> None:
    """Train as one of two ranks: `ROOT OUT NETWORK`; rank 0 writes its rows."""
    torch.set_num_threads(1)
    root, out = Path(words[0]), Path(words[1])
    small = words[2] == "small"
    _, rows = train(
        root, 3, SMALL if small else PUBLISHED, run_dir=out, **how(root, small),
        machine=Machine("ddp", devices=2),
    )  # fmt: skip
    if rows:
        (out / "rows.json").write_text(json.dumps(rows))


def how(root: Path, small: bool) -> dict[str, Any]:
    """Return the settings of the runs with one and two ranks, which compare the same clips."""
    held = ValData(talkers(root / "held", 5, first=500), num_clips=5, batch_size=3)
    return {
        "batch_size": 8 if small else 4,
        "micro_batch_size": 4 if small else 2,
        "val_data": held,
        "intervals": Intervals(log_every=1, save_every=0, val_every=3, replica_check_every=1),
        # eps: a gradient of 1e-9 that is rounding alone must not become a full step.
        "optim": Optim(eps=1e-4, ema_decay=0.9),
    }
