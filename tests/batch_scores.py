"""All demo scores of a batch of clips by plain functions: an oracle of the metrics by clip."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from echolab.metrics.demo import features_of, sync_of
from echolab.metrics.demo_networks import ClipFeatures, FrameFeatures, SyncNetDemo
from echolab.metrics.fidelity import PERFECT_PSNR
from echolab.metrics.frechet import frechet_distance
from echolab.metrics.motion import correlation, mouth_darkness
from echolab.types import Clips


class Judges(NamedTuple):
    """Networks that compute the scores, and the features of real clips for comparison."""

    sync: SyncNetDemo
    frame: FrameFeatures
    clip: ClipFeatures
    real_frames: Tensor  # [N, D]
    real_clips: Tensor  # [M, D]


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio [B] in dB of images [B, ...] in [-1, 1]."""
    error = (first - second).flatten(1).square().mean(1)
    return (10 * torch.log10(4 / error.clamp(min=1e-12))).clamp(max=PERFECT_PSNR)


def score_clips(judges: Judges, pixels: Tensor, truth: Clips, cepstra: Tensor) -> dict[str, float]:
    """Return all scores of clips [N, 3, T, Y, X] in [-1, 1], generated for the audio of `truth`.

    `cepstra` are the MFCCs of the audio that is played with each clip.
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
