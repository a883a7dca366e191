"""The score table's row for a set of generated clips.

Sync and mouth are measured inside one lip box a clip, that of the reference picture: a generated
head need not move as the true one did.  FID and FVD compare with clips of the training set, so the
held-out truth has a floor of its own above zero.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from echolab.errors import DataError
from echolab.metrics.demo_networks import (
    ClipFeatures,
    FrameFeatures,
    SyncNetDemo,
    correlation,
    crop_lips,
    mouth_darkness,
)
from echolab.metrics.frechet import frechet_distance
from echolab.metrics.mfcc import mfcc
from echolab.metrics.sync import Sync, sync_score, unpadded_distances
from echolab.types import Clips

MAX_SHIFT = 8  # frames; the original's 15 would leave 5 of a second's 20 windows
BATCH = 16
PERFECT_PSNR = 100.0  # dB, for pictures that are equal


class Judges(NamedTuple):
    """Networks that judge, and the features of real clips to compare with."""

    sync: SyncNetDemo
    frame: FrameFeatures
    clip: ClipFeatures
    real_frames: Tensor  # [N, D]
    real_clips: Tensor  # [M, D]


def cepstra_of(clips: Clips) -> Tensor:
    """Cepstra [N, columns, 13]."""
    return torch.from_numpy(np.stack([mfcc(samples.numpy()) for samples in clips.samples]))


@torch.no_grad()
def sync_of(net: SyncNetDemo, pixels: Tensor, boxes: Tensor, cepstra: Tensor) -> list[Sync]:
    """Sync of clips [B, 3, T, Y, X] in [-1, 1] with their sounds, at lip boxes [B, 4]."""
    seen = net.embed_lips(crop_lips(pixels, boxes))
    heard = net.embed_sound(cepstra)
    windows = min(seen.shape[1], heard.shape[1])
    if windows <= MAX_SHIFT:
        raise DataError(
            f"clips of {pixels.shape[2]} frames have {windows} windows of sync, need more than "
            f"{MAX_SHIFT}; prepare them with frames=17 or more"
        )
    return [
        sync_score(unpadded_distances(lips[:windows], sound[:windows], MAX_SHIFT), windows)
        for lips, sound in zip(seen, heard, strict=True)
    ]


@torch.no_grad()
def features_of(frame: FrameFeatures, clip: ClipFeatures, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features of every fourth frame, and of the clips [N, 3, T, Y, X] in [-1, 1]."""
    frames, clips = [], []
    for part in pixels.split(BATCH):
        frames.append(frame(part[:, :, ::4].transpose(1, 2).flatten(0, 1)))
        clips.append(clip(part))
    return torch.cat(frames), torch.cat(clips)


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal to noise in dB of pictures [B, ...] in [-1, 1], [B]."""
    error = (first - second).flatten(1).square().mean(1)
    return (10 * torch.log10(4 / error.clamp(min=1e-12))).clamp(max=PERFECT_PSNR)


def score_clips(judges: Judges, pixels: Tensor, truth: Clips, cepstra: Tensor) -> dict[str, float]:
    """All scores of clips [N, 3, T, Y, X] in [-1, 1], generated for the sounds of `truth`.

    `cepstra` are those of the sound that is played with each clip.
    """
    boxes = truth.lips[:, 0]
    syncs = sync_of(judges.sync, pixels, boxes, cepstra)
    frames, clips = features_of(judges.frame, judges.clip, pixels)
    scores = {
        "sync_c_demo": float(np.mean([sync.confidence for sync in syncs])),
        "sync_d_demo": float(np.mean([sync.distance for sync in syncs])),
        "fid_demo": frechet_distance(frames, judges.real_frames),
        "fvd_demo": frechet_distance(clips, judges.real_clips),
        "psnr_first_frame": float(psnr(pixels[:, :, 0], truth.float_pixels()[:, :, 0]).mean()),
    }
    if truth.visemes is not None:
        seen, true = mouth_darkness(pixels, boxes).numpy(), truth.visemes[..., 0].numpy()
        curves = [correlation(a, b) for a, b in zip(seen, true, strict=True)]
        scores["mouth_corr"] = float(np.mean(curves))
    return scores
