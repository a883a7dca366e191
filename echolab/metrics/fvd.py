"""FVD and KVD of clips, by the logits of I3D in the StyleGAN-V convention, or by VideoMAE.

FVD of I3D prefers clips of good frames over clips of good motion (Ge et al. 2024), therefore
features of VideoMAE are an option.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import VideoMAEConfig, VideoMAEModel

from echolab.encoders.files import from_folder, frozen
from echolab.errors import ConfigError
from echolab.metrics.card import Card
from echolab.metrics.feature_metric import NOT_FINITE, FeatureMetric
from echolab.metrics.metric import VideoClip
from echolab.metrics.networks.i3d import CLASSES, I3d, convert_i3d
from echolab.metrics.setup import Setup
from echolab.metrics.weights import (
    CPU,
    I3D,
    VIDEOMAE,
    Network,
    check_weights,
    random_network,
    released_network,
    weights_sha256,
)
from echolab.model_files import find_model_file

SIZE, FRAMES = 224, 16
FEATURES = ("i3d", "videomae")
ARCHITECTURE = "I3D of Kinetics-400, 400 logits"
VIDEOMAE_ARCHITECTURE = "VideoMAE, mean of the last hidden states"
TOO_SHORT = "fewer frames than the score needs"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIZE = "bilinear to 224 x 224 without antialiasing, half-pixel centers"


class VideoMAEFeatures(nn.Module):
    """VideoMAE as a network of video in [-1, 1] to one vector per clip."""

    def __init__(self, model: VideoMAEModel) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1, 1))

    mean: Tensor
    std: Tensor

    def forward(self, video: Tensor) -> Tensor:
        """Map video [B, 3, 16, 224, 224] in [-1, 1] to features [B, D]."""
        # The released processor normalizes with the statistics of ImageNet.
        normalized = ((video + 1) / 2 - self.mean) / self.std
        states: Tensor = self.model(normalized.transpose(1, 2)).last_hidden_state
        return states.mean(1)


def fvd_network(folder: Path | None = None) -> Network:
    """Return I3D with its released weights; raise MissingWeightsError or WeightsError."""
    return released_network(I3d(), I3D, folder, architecture=ARCHITECTURE, convert=convert_i3d)


def random_fvd_network(seed: int = 0) -> Network:
    """Return I3D with seeded random weights, for tests of the complete path."""
    return random_network(I3d(), ARCHITECTURE, seed)


def videomae_network(folder: Path | None = None) -> Network:
    """Return VideoMAE from its released folder; raise MissingWeightsError or WeightsError."""
    path = find_model_file(VIDEOMAE, folder)
    # The classifier's norm is not part of the model, and files of classifiers lack the model's.
    model = from_folder(
        VideoMAEModel, path, torch.float32, unused=("layernorm.weight", "layernorm.bias")
    )
    net = frozen(VideoMAEFeatures(model), CPU)
    return Network(net, VIDEOMAE_ARCHITECTURE, weights_sha256(path), VIDEOMAE.license)


def random_videomae_network(seed: int = 0, config: VideoMAEConfig | None = None) -> Network:
    """Return VideoMAE of base size, or of `config`, with seeded random weights."""
    # The constructor draws from the global generator, which must not notice.
    with torch.random.fork_rng(devices=[]):
        model = VideoMAEModel(config or VideoMAEConfig())
    return random_network(VideoMAEFeatures(model), VIDEOMAE_ARCHITECTURE, seed)


def prepare(frames: Tensor) -> Tensor:
    """Map frames [T, 3, Y, X] uint8 to video [1, 3, T, 224, 224] in [-1, 1]."""
    resized = functional.interpolate(
        frames.float(), (SIZE, SIZE), mode="bilinear", align_corners=False
    )
    return (resized / 127.5 - 1).transpose(0, 1)[None]


class FVD(FeatureMetric):
    """FVD and KVD of the first 16 frames of each clip, with the covariance of the population."""

    frechet, kernel = "fvd", "kvd"
    unbiased = False
    reasons = (NOT_FINITE, TOO_SHORT)

    def __init__(
        self,
        num_clips: int,
        network: Network,
        *,
        frames: int = FRAMES,
        stride: int = 1,
        counts: Sequence[int] = (),
        draws: int = 100,
        seed: int = 0,
    ) -> None:
        """Make tables; the network is I3D or VideoMAE, and names the scores."""
        net = network.net
        dim = net.model.config.hidden_size if isinstance(net, VideoMAEFeatures) else CLASSES
        super().__init__(num_clips, network, rows=1, dim=dim, counts=counts, draws=draws,
                         seed=seed)  # fmt: skip
        self.num_frames, self.stride = frames, stride
        # Distances in other features are other scores.
        if isinstance(net, VideoMAEFeatures):
            self.frechet, self.kernel = "fvd_videomae", "kvd_videomae"

    def problem(self, clip: VideoClip) -> str:
        """Return whether a clip has fewer frames than the score uses."""
        # A clip that is too short is never padded or looped.
        needed = (self.num_frames - 1) * self.stride + 1
        return TOO_SHORT if len(clip.frames) < needed else ""

    def clip_features(self, clip: VideoClip) -> Tensor:
        """Return features [1, D] of the first frames."""
        # Take the first frames, since a random start would change with every evaluation.
        frames = clip.frames[:: self.stride][: self.num_frames].to(self.features.device)
        features: Tensor = self.net(prepare(frames))
        return features

    def card(self) -> Card:
        """Return the card of FVD."""
        return Card(
            metric=self.frechet,
            definition=(
                "Frechet distance of Gaussian fits (Unterthiner et al. 2018) in the convention of "
                "StyleGAN-V, by nuclear norm"
            ),
            preprocessing=f"{RESIZE}; x / 127.5 - 1",
            settings={"frames": self.num_frames, "stride": self.stride, "start": 0},
        )


def fvd(
    setup: Setup,
    *,
    features: str = "i3d",
    frames: int = FRAMES,
    stride: int = 1,
    counts: Sequence[int] = (),
    draws: int = 100,
    real_per_clip: int = 4,
    weights: str = "released",
) -> FVD:
    """Build FVD and KVD against `real_per_clip` real clips for each clip of the setup.

    `features` is `i3d`, or `videomae` with scores of other names.  `weights` is `released`, or
    `random` to test the path without the released file.  Raise ConfigError for other values.
    """
    check_weights(weights)
    if features not in FEATURES:
        raise ConfigError(f"features={features}: unknown; use one of {', '.join(FEATURES)}")
    if weights == "released":
        build = fvd_network if features == "i3d" else videomae_network
        network = build(setup.networks)
    else:
        network = random_fvd_network() if features == "i3d" else random_videomae_network()
    metric = FVD(setup.num_clips, network, frames=frames, stride=stride, counts=counts,
                 draws=draws)  # fmt: skip
    metric.compare_with(setup.real_clips(), real_per_clip * setup.num_clips)
    return metric
