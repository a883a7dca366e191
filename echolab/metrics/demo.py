"""Scores by the small demo networks; their names end in `_demo`, since they are stand-ins.

Sync and mouth opening are measured in one lip box per clip, that of the reference image, because a
generated head may move differently from the true head.  FID and FVD compare with clips of the
training set, so the held-out ground truth has scores above zero.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from echolab.data.media import decode_mp4
from echolab.data.shard_reader import open_dataset
from echolab.encoders.files import sha256_of
from echolab.errors import DataError
from echolab.fitting import load_net
from echolab.metrics.card import Card
from echolab.metrics.demo_networks import ClipFeatures, FrameFeatures, SyncNetDemo, crop_lips
from echolab.metrics.frechet import distance_interval, frechet_distance, frechet_of_weights
from echolab.metrics.metric import Score, VideoClip, VideoMetric, mean_score
from echolab.metrics.mfcc import mfcc
from echolab.metrics.setup import Setup
from echolab.metrics.sync import Sync, sync_score, unpadded_distances

MAX_SHIFT = 8  # frames; the original's 15 would leave only 5 of the 20 windows of one second
BATCH = 16  # clips
SYNC, FRAMES, CLIPS = "sync_evaluator", "frames", "clips"  # names of the networks' files
FRAME_STEP = 4  # FID uses every fourth frame, since neighboring frames are nearly equal
REAL_PER_CLIP = 4  # real clips for each scored clip
DRAWS = 200  # resamples of a Frechet distance
NO_AUDIO, NO_LIPS, SHORT = "no audio", "no lip box", "too short for the largest shift"


def network_file(name: str) -> str:
    """Return the file name of a fitted demo network."""
    return f"{name}.safetensors"


def float_pixels(frames: Tensor) -> Tensor:
    """Return frames uint8 [T, 3, Y, X] as a batch [1, 3, T, Y, X] in [-1, 1]."""
    return frames.transpose(0, 1)[None].float() / 127.5 - 1


# -- lip sync --------------------------------------------------------------------------------------


@torch.no_grad()
def sync_of(net: SyncNetDemo, pixels: Tensor, boxes: Tensor, cepstra: Tensor) -> list[Sync]:
    """Return the sync scores of clips [B, 3, T, Y, X] in [-1, 1] and audio, at lip boxes [B, 4].

    Raise DataError for clips that are too short.
    """
    lips = net.embed_lips(crop_lips(pixels, boxes))
    audio = net.embed_audio(cepstra)
    windows = min(lips.shape[1], audio.shape[1])
    if windows <= MAX_SHIFT:
        raise DataError(
            f"clips of {pixels.shape[2]} frames have {windows} windows of sync, need more than "
            f"{MAX_SHIFT}; prepare them with frames=17 or more"
        )
    lips, audio = lips[:, :windows], audio[:, :windows]
    return [
        sync_score(unpadded_distances(clip_lips, clip_audio, MAX_SHIFT), windows)
        for clip_lips, clip_audio in zip(lips, audio, strict=True)
    ]


class SyncDemo(VideoMetric):
    """Sync-C and Sync-D of a small SyncNet, without padding: `sync_c_demo`, `sync_d_demo`."""

    reasons = (NO_AUDIO, NO_LIPS, SHORT)

    def __init__(self, num_clips: int, net: SyncNetDemo, weights: str = "random") -> None:
        """Score with `net`, whose file has the sha256 `weights`."""
        super().__init__(num_clips)
        self.net, self.weights = net, weights
        self.add_table("rows", 2)  # confidence, distance

    rows: Tensor

    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Store confidence and distance of the clip."""
        if clip.samples is None or not len(clip.samples):
            return NO_AUDIO
        if clip.lips is None or not bool(clip.lips[0].isfinite().all()):
            return NO_LIPS
        # 640 samples and four columns of cepstra belong to each frame; a window has five frames.
        frames = min(len(clip.frames), len(clip.samples) // 640)
        if frames - 5 <= MAX_SHIFT:
            return SHORT
        cepstra = torch.from_numpy(mfcc(np.asarray(clip.samples.cpu())))[None]
        # Score without padding, which increases the confidence of clips this short.
        (sync,) = sync_of(self.net, float_pixels(clip.frames), clip.lips[:1], cepstra)
        self.rows[index] = torch.tensor([sync.confidence, sync.distance], dtype=torch.float64)
        return ""

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the means over clips."""
        confidence, distance = self.rows[scored].unbind(1)
        return {"sync_c_demo": mean_score(confidence), "sync_d_demo": mean_score(distance)}

    def cards(self) -> dict[str, Card]:
        """Return the cards of both scores."""
        formulas = {
            "sync_c_demo": "median minus minimum over shifts of the mean embedding distance",
            "sync_d_demo": "minimum over shifts of the mean embedding distance",
        }
        return {
            name: Card(
                metric=name,
                definition=f"{formula}; mean over clips; SyncNet (Chung and Zisserman 2016)",
                preprocessing="lip box of frame 1 x 1.3 to 32 x 24 pixels, MFCC of int16 audio",
                network="SyncNetDemo",
                weights=self.weights,
                license="fitted by echolab",
                settings={"max_shift": MAX_SHIFT, "padding": "none"},
            )
            for name, formula in formulas.items()
        }


# -- Frechet distances -----------------------------------------------------------------------------


@torch.no_grad()
def features_of(frame: FrameFeatures, clip: ClipFeatures, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return features of every fourth frame and of each clip, for [N, 3, T, Y, X] in [-1, 1]."""
    frames, clips = [], []
    for part in pixels.split(BATCH):
        frames.append(frame(part[:, :, ::4].transpose(1, 2).flatten(0, 1)))
        clips.append(clip(part))
    return torch.cat(frames), torch.cat(clips)


class FrechetDemo(VideoMetric):
    """A Frechet distance of demo features to those of real clips: `fid_demo` or `fvd_demo`."""

    def __init__(
        self,
        num_clips: int,
        net: FrameFeatures | ClipFeatures,
        real: Tensor,
        *,
        frames: int,
        weights: str = "random",
        real_set: str = "",
    ) -> None:
        """Compare with the features `real` [M, D] of the clips `real_set`, a fingerprint.

        Clips to score have `frames` frames.
        """
        super().__init__(num_clips)
        self.net, self.real, self.weights, self.real_set = net, real, weights, real_set
        self.of_frames = isinstance(net, FrameFeatures)
        self.name = "fid_demo" if self.of_frames else "fvd_demo"
        self.per_clip = -(-frames // FRAME_STEP) if self.of_frames else 1
        self.add_table("features", self.per_clip, real.shape[1])

    features: Tensor

    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Store the features of every fourth frame, or of the clip."""
        # One clip is one batch, so that rounding does not depend on other clips.
        pixels = float_pixels(clip.frames)
        if self.of_frames:
            pixels = pixels[0, :, ::FRAME_STEP].transpose(0, 1)
        self.features[index] = self.net(pixels).double()
        return ""

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the distance; NaN for a single clip, since a covariance needs two samples."""
        rows = self.features[scored]  # [N, per_clip, D]
        if rows.shape[0] < 2:
            return {self.name: Score(float("nan"), flags={"fewer than two clips": 1})}
        # The networks compute in fp32; the distance converts to fp64.
        value = frechet_distance(rows.flatten(0, 1).float(), self.real)
        distance = frechet_of_weights(rows, self.real[:, None])
        low, high = distance_interval(distance, len(rows), draws=DRAWS)
        return {self.name: Score(value, low, high)}

    def cards(self) -> dict[str, Card]:
        """Return the card of the distance."""
        subject = f"every {FRAME_STEP}th frame" if self.of_frames else "the entire clip"
        return {
            self.name: Card(
                metric=self.name,
                definition="Frechet distance of Gaussians, unbiased covariance, root-free",
                preprocessing=f"{subject} in [-1, 1], not resized",
                network=type(self.net).__name__,
                weights=self.weights,
                license="fitted by echolab",
                settings={"real_samples": len(self.real), "real_clips": self.real_set},
            )
        }


# -- the functions that a configuration names ------------------------------------------------------


def sync(setup: Setup, *, network: str = SYNC) -> VideoMetric:
    """Build Sync-C and Sync-D with a demo SyncNet of the setup's networks."""
    path = setup.file(network_file(network))
    return SyncDemo(setup.num_clips, load_net(path, SyncNetDemo), sha256_of([path]))


def fid(setup: Setup) -> VideoMetric:
    """Build the Frechet distance of frames."""
    return _frechet(setup, FRAMES, FrameFeatures, of_frames=True)


def fvd(setup: Setup) -> VideoMetric:
    """Build the Frechet distance of clips."""
    return _frechet(setup, CLIPS, ClipFeatures, of_frames=False)


def _frechet(
    setup: Setup, name: str, network: type[FrameFeatures] | type[ClipFeatures], *, of_frames: bool
) -> VideoMetric:
    """Build a Frechet distance to the real clips of the setup."""
    # Both distances share the pass over the real clips.
    path, dataset = setup.file(network_file(name)), setup.real_clips()
    features = real_features(path.parent, dataset, REAL_PER_CLIP * setup.num_clips)
    return FrechetDemo(
        setup.num_clips, load_net(path, network), features[0 if of_frames else 1],
        frames=setup.frames, weights=sha256_of([path]),
        real_set=open_dataset(dataset).fingerprint[:12],
    )  # fmt: skip


@lru_cache(maxsize=2)  # shared by FID and FVD, and by several evaluations in one process
def real_features(networks: Path, real: Path, num_clips: int) -> tuple[Tensor, Tensor]:
    """Return features of frames and of clips of the first clips of a raw dataset."""
    frame = load_net(networks / network_file(FRAMES), FrameFeatures)
    clip = load_net(networks / network_file(CLIPS), ClipFeatures)
    dataset = open_dataset(real)
    count = min(num_clips, len(dataset))
    frames: list[Tensor] = []
    clips: list[Tensor] = []
    for first in range(0, count, BATCH):
        # Decode batch by batch: all clips together would need gigabytes.
        indices = range(first, min(first + BATCH, count))
        pixels = _stacked([decode_mp4(dataset.read(i)["mp4"]) for i in indices])
        of_frames, of_clips = features_of(frame, clip, pixels)
        frames.append(of_frames)
        clips.append(of_clips)
    return torch.cat(frames), torch.cat(clips)


def _stacked(clips: Sequence[np.ndarray]) -> Tensor:
    """Return clips uint8 [T, Y, X, 3] as one batch [B, 3, T, Y, X] in [-1, 1]."""
    # All clips of a dataset have one size.
    pixels = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3)
    return pixels.float() / 127.5 - 1
