"""Small encoded and preference datasets, and a run over them, shared by the tests of training."""

import json
from pathlib import Path
from typing import Any

import tiny
from safetensors.torch import save
from torch import Tensor

from echolab.data.shard_reader import ShardDataset, open_dataset
from echolab.data.shard_writer import ShardWriter
from echolab.diffusion.objectives import NegativePreference, Preference, Supervised
from echolab.diffusion.phases import PHDA, ModalityDropout
from echolab.models.frozen import Frozen
from echolab.tasks.curriculum import Curriculum, hard_to_easy
from echolab.tasks.table import TASKS
from echolab.training.fit import FitResult, TrainConfig, fit
from echolab.training.module import Optim
from echolab.training.schedule import Epoch, Schedule

__all__ = ["Optim", "Preference", "Supervised"]

ARCHITECTURE = dict(tiny.SIZES)
PHASES = ModalityDropout(PHDA)


def clip_tensors(seed: int) -> dict[str, Tensor]:
    """Return one encoded clip, random, with the tensors that each task needs."""
    batch = tiny.batch(1, seed)
    known = batch.conditions._asdict()
    tensors = {name: known[name][0] for name in ("text", "image", "audio", "face")}
    tensors |= {"latents": batch.latents[0], "weight": batch.weight[0]}
    for task in TASKS:
        if task != "t2v":
            tensors[f"known.{task}"] = known["known"][0].clone()
            tensors[f"known_latents.{task}"] = known["known_latents"][0].clone()
    return tensors


def write_clips(folder: Path, count: int, first: int = 0) -> ShardDataset:
    """Write an encoded dataset, or return the one that exists."""
    if not (folder / "dataset.json").exists():
        with ShardWriter(folder, kind="encoded", samples_per_shard=3) as writer:
            for i in range(first, first + count):
                members = {"safetensors": save(clip_tensors(i)), "json": b'{"caption": ""}'}
                writer.write(f"clip-{i:03d}", members)
    return open_dataset(folder)


def write_pairs(folder: Path, count: int) -> ShardDataset:
    """Write a preference dataset, or return the one that exists."""
    if not (folder / "dataset.json").exists():
        with ShardWriter(folder, kind="preference", samples_per_shard=4) as writer:
            for i in range(count):
                tensors = clip_tensors(100 + i)
                kept = ("text", "image", "audio", "face", "weight")
                pair = {name: tensors[name] for name in kept}
                pair |= {"known": tensors["known.i2v"]}
                pair |= {"known_latents": tensors["known_latents.i2v"]}
                pair |= {"chosen": tensors["latents"], "rejected": tiny.latents(1, 300 + i)[0]}
                about = json.dumps({"task": "i2v", "scores": {}}).encode()
                writer.write(f"pair-{i:03d}", {"safetensors": save(pair), "json": about})
    return open_dataset(folder)


def schedule(*epochs: tuple[str, int], lr: float = 3e-3) -> Schedule:
    """Return epochs of (kind, steps) at one learning rate."""
    return Schedule([Epoch(kind, steps, lr) for kind, steps in epochs], warmup=2)


def curriculum() -> Curriculum:
    """Return a curriculum quick enough to show all tasks in a few steps."""
    return Curriculum(hard_to_easy(1), ema_decay=0.3, min_prob=0.02)


def train(root: Path, plan: Schedule, **changes: Any) -> tuple[FitResult, list[dict[str, Any]]]:
    """Train in `root`/run over `root`/clips and pairs; return the result and the rows it logged."""
    rows: list[dict[str, Any]] = []
    reference = Frozen(tiny.net())
    settings: dict[str, Any] = {
        "run_dir": root / "run",
        "clips": [write_clips(root / "clips", 7)],
        "pairs": [write_pairs(root / "pairs", 5)],
        "schedule": plan,
        "curriculum": curriculum(),
        "reference": reference,
        "objectives": {
            "sft": Supervised(PHASES),
            "ndpo": NegativePreference(PHASES, reference, 100.0, 0.2),
            "dpo": Preference(
                PHASES, reference, 100.0, sft_weight=0.5, target_grad_factor=0.2,
            ),
        },
        "batch_size": 4,
        "log_metrics": lambda step, values: rows.append({"step": step, **values}),
    }  # fmt: skip
    net = changes.pop("net", None) or tiny.net(trained=True)
    result = fit(TrainConfig(net, ARCHITECTURE, **{**settings, **changes}))
    return result, rows


def tensors_of(path: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a checkpoint that holds tensors."""
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors"))}
