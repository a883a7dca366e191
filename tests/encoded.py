"""Encoded and preference clips of the size that `model=demo` takes, tiny in time and space."""

import json
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from echolab.config.folders import architecture_of
from echolab.data.shard_writer import ShardWriter
from echolab.tasks.table import KNOWN_TASKS

ARCHITECTURE = architecture_of("demo")
CHANNELS, LATENT_FRAMES, SIDE = 16, 2, 4
FRAMES = 4 * (LATENT_FRAMES - 1) + 1

# `echolab train` on these: a small network, few steps, nothing sent to wandb unless requested.
SETTINGS = (
    "debug=cpu", "model.dim=64", "model.ffn_dim=64", "model.num_layers=1",
    "objective.sft_weight=0.5", "save_every=2", "optim.lr=1e-3",
)  # fmt: skip


def plan(*epochs: tuple[str, int]) -> str:
    """Return the override of a schedule."""
    return f"schedule.epochs=[{','.join(f'{{kind:{k},steps:{n}}}' for k, n in epochs)}]"


def tensors(seed: int) -> dict[str, Tensor]:
    """Return the tensors of one random encoded clip."""
    generator = torch.Generator().manual_seed(seed)
    shape = (CHANNELS, LATENT_FRAMES, SIDE, SIDE)
    sizes = {
        "text": (4, ARCHITECTURE["text_dim"]),
        "image": (3, ARCHITECTURE["image_dim"]),
        "audio": (2 * FRAMES, ARCHITECTURE["audio_dim"]),
        "latents": shape,
        **{f"known_latents.{task}": shape for task in KNOWN_TASKS},
    }
    made = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    made |= {f"known.{task}": torch.zeros(4, *shape[1:]) for task in KNOWN_TASKS}
    return made | {"face": torch.ones(SIDE * SIDE // 4), "weight": torch.ones(1, *shape[1:])}


def write(folder: Path, count: int = 6) -> tuple[Path, Path]:
    """Write `folder`/clips and `folder`/pairs, and return their paths."""
    kept = ("text", "image", "audio", "face", "weight")
    with ShardWriter(folder / "clips", kind="encoded") as clips:
        for i in range(count):
            clips.write(f"clip-{i}", {"safetensors": save(tensors(i)), "json": b"{}"})
    with ShardWriter(folder / "pairs", kind="preference") as pairs:
        for i in range(count):
            one = tensors(i)
            pair = {name: one[name] for name in kept}
            pair |= {"known": one["known.i2v"], "known_latents": one["known_latents.i2v"]}
            pair |= {"chosen": one["latents"], "rejected": tensors(i + 50)["latents"]}
            about = json.dumps({"task": "i2v"}).encode()
            pairs.write(f"pair-{i}", {"safetensors": save(pair), "json": about})
    return folder / "clips", folder / "pairs"
