"""What evaluating and preference rounds share: the stand-in judges, and clips sampled for keys."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from echolab.data.collate import collate_clips, read_clip
from echolab.data.shard_reader import ShardDataset
from echolab.diffusion.guidance import Net
from echolab.diffusion.pipeline import generate
from echolab.encoders.demo_vae import CausalAutoencoder
from echolab.errors import DataError
from echolab.fitting import load_net, work_dtype
from echolab.metrics.demo_networks import ClipFeatures, FrameFeatures, SyncNetDemo
from echolab.metrics.scores import Judges, features_of
from echolab.types import Clips

BATCH = 32
AUTOENCODER, FRAMES, CLIPS = "autoencoder", "frames", "clips"
SYNC_JUDGE, SYNC_EVALUATOR = "sync_judge", "sync_evaluator"


class Sampling(NamedTuple):
    """How clips are generated."""

    steps: int = 12
    shift: float = 3.0
    audio_scale: float = 1.5
    seed: int = 0


def network_file(networks: Path, name: str) -> Path:
    """Where a fitted network of this name lies."""
    return networks / f"{name}.safetensors"


def load_autoencoder(networks: Path) -> CausalAutoencoder:
    return load_net(network_file(networks, AUTOENCODER), CausalAutoencoder)


def load_judges(networks: Path, real: Clips, sync: str = SYNC_EVALUATOR) -> Judges:
    """The evaluator's networks, and the features of real clips that FID and FVD compare with."""
    frame = load_net(network_file(networks, FRAMES), FrameFeatures)
    clip = load_net(network_file(networks, CLIPS), ClipFeatures)
    real_frames, real_clips = features_of(frame, clip, real.float_pixels())
    return Judges(
        load_net(network_file(networks, sync), SyncNetDemo), frame, clip, real_frames, real_clips
    )


@torch.no_grad()
def sample_pixels(
    net: Net,
    video: CausalAutoencoder,
    dataset: ShardDataset,
    numbers: range,
    task: str,
    sampling: Sampling,
    report: Callable[[int], None],
) -> Tensor:
    """Clips [N, 3, T, Y, X] in [-1, 1], generated for samples of an encoded dataset."""
    pixels = []
    for first in range(numbers.start, numbers.stop, BATCH):
        part = range(first, min(first + BATCH, numbers.stop))
        clips = collate_clips(dataset, [read_clip(dataset, i, task) for i in part])
        latents = generate(
            net, clips.conditions, clips.keys, steps=sampling.steps, shift=sampling.shift,
            audio_scale=sampling.audio_scale, seed=sampling.seed, dtype=work_dtype(),
        )  # fmt: skip
        pixels.append(video.decode(latents))
        report(part.stop - numbers.start)
    return torch.cat(pixels)


def check_same_clips(raw: Clips, encoded: ShardDataset) -> None:
    """DataError where a raw and an encoded dataset do not hold the same clips in one order."""
    if raw.keys != encoded.keys[: len(raw.keys)]:
        raise DataError(
            f"{encoded.folder}: its clips are not those of the raw dataset; encode that one again"
        )
