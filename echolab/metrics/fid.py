"""FID and KID of frames, by FID-Inception.

Frames are resized as pytorch-fid does, or as clean-fid does with `preprocessing="clean"`; the two
differ by several points, so the card says which.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from echolab.errors import ConfigError
from echolab.metrics.card import Card
from echolab.metrics.feature_metric import NOT_FINITE, FeatureMetric
from echolab.metrics.metric import VideoClip
from echolab.metrics.networks.inception import FEATURES, SIZE, FidInception
from echolab.metrics.setup import Setup
from echolab.metrics.weights import (
    INCEPTION,
    Network,
    check_weights,
    random_network,
    released_network,
)

ARCHITECTURE = "FID-Inception 2015-12-05, 2048 pooled features"
TOO_SHORT = "fewer frames than the score needs"
PREPROCESSING = {
    "pytorch-fid": "bilinear to 299 x 299 without antialiasing, half-pixel centers; x / 127.5 - 1",
    "clean": "PIL bicubic to 299 x 299 per channel in fp32, clipped to 0 .. 255; (x - 128) / 128",
}


def fid_network(folder: Path | None = None) -> Network:
    """Return FID-Inception with its released weights; raise MissingWeightsError or WeightsError."""
    return released_network(FidInception(), INCEPTION, folder, architecture=ARCHITECTURE)


def random_fid_network(seed: int = 0) -> Network:
    """Return FID-Inception with seeded random weights, for tests of the complete path."""
    return random_network(FidInception(), ARCHITECTURE, seed)


def prepare(frames: Tensor) -> Tensor:
    """Map frames [T, 3, Y, X] uint8 to [T, 3, 299, 299] in [-1, 1], as pytorch-fid does."""
    scaled = frames.float() / 255
    resized = functional.interpolate(scaled, (SIZE, SIZE), mode="bilinear", align_corners=False)
    return 2 * resized - 1


def prepare_clean(frames: Tensor) -> Tensor:
    """Map frames [T, 3, Y, X] uint8 to [T, 3, 299, 299] in [-1, 1], as clean-fid does."""
    # PIL's filter widens with the scale, so that reduction does not alias.
    channels = frames.cpu().numpy().astype(np.float32).reshape(-1, *frames.shape[-2:])
    resized = [
        np.asarray(Image.fromarray(channel).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        for channel in channels
    ]
    stacked = torch.from_numpy(np.stack(resized)).view(len(frames), 3, SIZE, SIZE)
    return ((stacked.clamp(0, 255) - 128) / 128).to(frames.device)


def spread_frames(total: int, count: int) -> list[int]:
    """Return `count` evenly spaced indices of `total` frames, with the first and the last."""
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


class FID(FeatureMetric):
    """FID and KID of evenly spaced frames, by default eight per clip."""

    frechet, kernel = "fid", "kid"
    unbiased = True
    reasons = (NOT_FINITE, TOO_SHORT)

    def __init__(
        self,
        num_clips: int,
        network: Network,
        *,
        preprocessing: str = "pytorch-fid",
        frames_per_clip: int = 8,
        counts: Sequence[int] = (),
        draws: int = 100,
        seed: int = 0,
    ) -> None:
        """Make tables; raise ConfigError for an unknown preprocessing."""
        if preprocessing not in PREPROCESSING:
            raise ConfigError(
                f"preprocessing={preprocessing}: unknown; use one of {', '.join(PREPROCESSING)}"
            )
        super().__init__(num_clips, network, rows=frames_per_clip, dim=FEATURES, counts=counts,
                         draws=draws, seed=seed)  # fmt: skip
        self.preprocessing = preprocessing

    def problem(self, clip: VideoClip) -> str:
        """Return whether a clip has fewer frames than the score uses."""
        # Repeated frames would count as several.
        return TOO_SHORT if len(clip.frames) < self.rows else ""

    def clip_features(self, clip: VideoClip) -> Tensor:
        """Return features [rows, 2048] of evenly spaced frames."""
        # Select before moving: most frames are not needed.
        frames = clip.frames[spread_frames(len(clip.frames), self.rows)].to(self.features.device)
        images = prepare(frames) if self.preprocessing == "pytorch-fid" else prepare_clean(frames)
        features: Tensor = self.net(images)
        return features

    def card(self) -> Card:
        """Return the card of FID."""
        return Card(
            metric=self.frechet,
            definition="Frechet distance of Gaussian fits (Heusel et al. 2017), by nuclear norm",
            preprocessing=PREPROCESSING[self.preprocessing],
            settings={"frames": "evenly spaced, with the first and the last"},
        )


def fid(
    setup: Setup,
    *,
    preprocessing: str = "pytorch-fid",
    frames_per_clip: int = 8,
    counts: Sequence[int] = (),
    draws: int = 100,
    real_per_clip: int = 4,
    weights: str = "released",
) -> FID:
    """Build FID and KID against `real_per_clip` real clips for each clip of the setup.

    `weights` is `released`, or `random` to test the path without the released file.
    """
    check_weights(weights)
    network = fid_network(setup.networks) if weights == "released" else random_fid_network()
    metric = FID(setup.num_clips, network, preprocessing=preprocessing,
                 frames_per_clip=frames_per_clip, counts=counts, draws=draws)  # fmt: skip
    metric.compare_with(setup.real_clips(), real_per_clip * setup.num_clips)
    return metric
