"""Clips and one-clip sets that the tests of metrics share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from echolab.metrics.metric import Score, VideoClip, VideoMetric
from echolab.vision.video_reader import VideoReader, probe

RATE = 16_000


def scores_of(metric: VideoMetric, *clips: VideoClip) -> dict[str, Score]:
    """Return the scores of a metric that was made for as many clips."""
    for index, clip in enumerate(clips):
        metric.update(index, clip)
    scores = metric.compute()
    assert set(scores) == set(metric.cards()), "each score has a card of its name"
    return scores


def flags_of(make: Callable[[int], VideoMetric], clip: VideoClip) -> set[str]:
    """Return why a clip has no score; check that its values are NaN."""
    scores = scores_of(make(1), clip)
    assert all(np.isnan(score.value) and score.clips == 0 for score in scores.values())
    return {reason for score in scores.values() for reason in score.flags}


def noise_frames(frames: int, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    """Return independent noise [T, 3, Y, X] uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (frames, 3, height, width), generator=generator, dtype=torch.uint8)


def constant_frames(levels: list[float], size: int = 64) -> Tensor:
    """Return gray frames [T, 3, size, size] uint8 of the given levels."""
    gray = torch.tensor(levels).round().to(torch.uint8)
    return gray[:, None, None, None].expand(-1, 3, size, size).contiguous()


def video_frames(path: Path, count: int, every: int = 1) -> Tensor:
    """Return `count` frames [T, 3, Y, X] of a video file from its start on."""
    probed = probe(path)
    indices = np.arange(0, count * every, every).clip(max=len(probed.times) - 1)
    images = VideoReader(probed, probed.width, probed.height).read(indices)
    return torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2).contiguous()
