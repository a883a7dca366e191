"""Scores of a set of generated clips, one row of the score table.

Sync and mouth opening are measured in one lip box a clip, that of the reference image, because a
generated head need not move like the true one.  FID and FVD compare with clips of the training set,
so the held-out ground truth has scores above zero.
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
PERFECT_PSNR = 100.0  # dB, for equal images


class Judges(NamedTuple):
    """Networks that compute the scores, and the features of real clips to compare with."""

    sync: SyncNetDemo
    frame: FrameFeatures
    clip: ClipFeatures
    real_frames: Tensor  # [N, D]
    real_clips: Tensor  # [M, D]


def cepstra_of(clips: Clips) -> Tensor:
    """Return the cepstra [N, columns, 13] of clips."""
    return torch.from_numpy(np.stack([mfcc(samples.numpy()) for samples in clips.samples]))


@torch.no_grad()
def sync_of(net: SyncNetDemo, pixels: Tensor, boxes: Tensor, cepstra: Tensor) -> list[Sync]:
    """Return the sync of clips [B, 3, T, Y, X] in [-1, 1] with their audio, at lip boxes [B, 4].

    Raises DataError for clips that are too short.
    """
    lips = net.embed_lips(crop_lips(pixels, boxes))
    audio = net.embed_sound(cepstra)
    windows = min(lips.shape[1], audio.shape[1])
    if windows <= MAX_SHIFT:
        raise DataError(
            f"clips of {pixels.shape[2]} frames have {windows} windows of sync, need more than "
            f"{MAX_SHIFT}; prepare them with frames=17 or more"
        )
    return [
        sync_score(unpadded_distances(visual[:windows], sound[:windows], MAX_SHIFT), windows)
        for visual, sound in zip(lips, audio, strict=True)
    ]


@torch.no_grad()
def features_of(frame: FrameFeatures, clip: ClipFeatures, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features of every fourth frame, and of the clips [N, 3, T, Y, X] in [-1, 1]."""
    frames, clips = [], []
    for part in pixels.split(BATCH):
        frames.append(frame(part[:, :, ::4].transpose(1, 2).flatten(0, 1)))
        clips.append(clip(part))
    return torch.cat(frames), torch.cat(clips)


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, [B], of images [B, ...] in [-1, 1]."""
    error = (first - second).flatten(1).square().mean(1)
    return (10 * torch.log10(4 / error.clamp(min=1e-12))).clamp(max=PERFECT_PSNR)


def score_clips(judges: Judges, pixels: Tensor, truth: Clips, cepstra: Tensor) -> dict[str, float]:
    """Return all scores of clips [N, 3, T, Y, X] in [-1, 1], generated for the audio of `truth`.

    `cepstra` are those of the audio that is played with each clip.
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
        opening, target = mouth_darkness(pixels, boxes).numpy(), truth.visemes[..., 0].numpy()
        correlations = [correlation(a, b) for a, b in zip(opening, target, strict=True)]
        scores["mouth_corr"] = float(np.mean(correlations))
    return scores
