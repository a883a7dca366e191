"""Motion of generated videos: amount, flicker, mouth movement in silence, and the mouth's timing.

Neither more nor less motion is better in itself: compare with the value of recorded videos.
"""

from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from echolab.encoders.files import sha256_of
from echolab.metrics.card import Card
from echolab.metrics.demo_networks import crop_lips
from echolab.metrics.metric import FPS, Score, VideoClip, VideoMetric, mean_score
from echolab.metrics.one_face import (
    DETECTION,
    NO_FACE,
    SEVERAL_FACES,
    OneFace,
    image_of,
    load_one_face,
)
from echolab.metrics.setup import Setup
from echolab.model_files import find_model_file
from echolab.vision.face_models import LANDMARKER
from echolab.vision.faces import FaceMesh

TOO_SHORT = "too few frames"

# -- motion amount ---------------------------------------------------------------------------------

FLOW_PIXELS = 256  # shorter side of the frames whose flow is measured
MOVING_SHARE = 0.05  # the fastest pixels: a talking head moves little of the frame
LUMA = (0.299, 0.587, 0.114)


def luma_of(frames: Tensor) -> Tensor:
    """Return the luma [T, Y, X] (BT.601), 0 to 255, of frames [T, 3, Y, X] uint8."""
    return torch.einsum("tcyx,c->tyx", frames.float(), torch.tensor(LUMA))


def flow_input(frames: Tensor) -> list[NDArray[np.uint8]]:
    """Return the frames [T, 3, Y, X] as gray images with a shorter side of 256 pixels."""
    height, width = frames.shape[-2:]
    scale = FLOW_PIXELS / min(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    gray = luma_of(frames).round().to(torch.uint8).numpy()
    return [
        image if scale == 1 else np.asarray(cv2.resize(image, size, interpolation=interpolation))
        for image in gray
    ]


def optical_flow(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the displacement [Y, X, 2] in pixels from one gray image to the next (Farneback)."""
    # Three octaves of a window of 15 pixels: motion of up to about 20 px per frame.
    flow = cv2.calcOpticalFlowFarneback(
        first, second, None, pyr_scale=0.5, levels=4, winsize=15, iterations=3, poly_n=5,
        poly_sigma=1.1, flags=0,
    )  # fmt: skip
    return np.asarray(flow, np.float32)


class MotionAmount(VideoMetric):
    """Optical flow in pixels per frame at a shorter side of 256, `motion`."""

    reasons = (TOO_SHORT,)

    def __init__(self, num_clips: int) -> None:
        super().__init__(num_clips)
        self.add_table("flow")

    flow: Tensor

    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Store the mean over frames of the mean flow of the fastest pixels."""
        if len(clip.frames) < 2:
            return TOO_SHORT
        # The mean of the fastest pixels does not depend on the size of a still background.
        images = flow_input(clip.frames)
        speeds = []
        for first, second in zip(images, images[1:], strict=False):
            speed = np.sort(np.linalg.norm(optical_flow(first, second), axis=-1), axis=None)
            speeds.append(speed[-max(1, round(MOVING_SHARE * speed.size)) :].mean(dtype=np.float64))
        self.flow[index] = float(np.mean(speeds))
        return ""

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the mean over clips."""
        return {"motion": mean_score(self.flow[scored])}

    def cards(self) -> dict[str, Card]:
        """Return the card."""
        return {
            "motion": Card(
                metric="motion",
                definition="mean length of the optical flow of the fastest 5 % of the pixels, in "
                "px per frame, mean over frames and clips",
                preprocessing=f"luma, shorter side scaled to {FLOW_PIXELS} px; Farneback's flow "
                "(OpenCV, 4 levels, window 15)",
                settings={"share": MOVING_SHARE},
            )
        }


# -- flicker ---------------------------------------------------------------------------------------

FLICKER_GRID = 8  # blocks a side: means of blocks hardly react to motion


class Flicker(VideoMetric):
    """Changes of brightness that the next frame takes back, in gray levels, `flicker`."""

    reasons = (TOO_SHORT,)

    def __init__(self, num_clips: int) -> None:
        super().__init__(num_clips)
        self.add_table("levels")

    levels: Tensor

    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Store the mean over blocks and frames."""
        if len(clip.frames) < 3:
            return TOO_SHORT
        # A second difference over time: steady fades and steady motion cancel.
        luma = luma_of(clip.frames)[:, None]
        blocks = functional.adaptive_avg_pool2d(luma, FLICKER_GRID).double()
        departure = blocks[1:-1] - (blocks[:-2] + blocks[2:]) / 2
        self.levels[index] = departure.abs().mean()
        return ""

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the mean over clips."""
        return {"flicker": mean_score(self.levels[scored])}

    def cards(self) -> dict[str, Card]:
        """Return the card."""
        return {
            "flicker": Card(
                metric="flicker",
                definition="|m(t) - (m(t-1) + m(t+1)) / 2| of the mean luma m of a block, in gray "
                "levels of 0 to 255; mean over blocks, frames and clips; lower is steadier",
                preprocessing=f"BT.601 luma, {FLICKER_GRID} x {FLICKER_GRID} blocks",
            )
        }


# -- the mouth -------------------------------------------------------------------------------------

SAMPLE_RATE = 16_000
SILENCE_DB = -50.0  # dB of full scale
SILENCE_MARGIN = 3  # frames at both ends of a pause: lips close after, and open before, speech


def mouth_darkness(pixels: Tensor, boxes: Tensor) -> Tensor:
    """Measure the mouth opening in each frame, [B, T], by the darkness of the lip crop.

    No network is needed, since an open mouth shows its dark inside.  The measure is only correlated
    over time with the true opening, so that lip and skin color do not matter.  `pixels` are
    [B, 3, T, Y, X] in [-1, 1], with one box [B, 4] per clip.
    """
    # The brightness of skin is the 80th percentile of the crop.
    luma = crop_lips(pixels, boxes).mean(dim=2)  # [B, T, 24, 32]
    skin = luma.flatten(2).quantile(0.8, dim=-1)[..., None, None]
    return ((skin - luma) / (skin + 1).clamp(min=0.2)).clamp(min=0).square().mean(dim=(2, 3))


def correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Return the Pearson correlation of two curves; 0 if one of them is constant."""
    # Compute in fp64, because a constant curve has rounding noise in fp32.
    a, b = first.astype(np.float64), second.astype(np.float64)
    if min(a.std(), b.std()) < 1e-7:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def loudness_db(samples: Tensor, frames: int, fps: float = FPS) -> Tensor:
    """Return the level [T] of the audio of each frame in dB of full scale, NaN after its end."""
    # Sums of squares up to each sample, so that frames may have any number of samples.
    edges = (torch.arange(frames + 1) * (SAMPLE_RATE / fps)).round().long()
    sums = functional.pad(samples.double().square().cumsum(0), (1, 0))
    inside = edges <= len(samples)
    energy = sums[edges.clamp(max=len(samples))].diff()
    level = 10 * torch.log10((energy / edges.diff()).clamp(min=1e-12))
    return torch.where(inside[1:], level, torch.nan)


def inside_pauses(silent: Tensor, margin: int = SILENCE_MARGIN) -> Tensor:
    """Return [T] whether a frame is silent with `margin` silent frames before and after.

    A pause may extend over the ends of the clip.
    """
    # All of the window is silent exactly if its mean is 1.
    padded = functional.pad(silent[None, None].float(), (margin, margin), value=1.0)
    return functional.avg_pool1d(padded, 2 * margin + 1, stride=1)[0, 0] >= 1 - 1e-6


class MouthCorrelation(VideoMetric):
    """Correlation of the mouth opening with the drawn visemes of synthetic talkers, `mouth_corr`.

    The lip box of the first frame is used for the entire clip, because a generated head may move
    differently from the drawn one.
    """

    NO_VISEMES = "no visemes"
    reasons = (NO_VISEMES, TOO_SHORT)

    def __init__(self, num_clips: int) -> None:
        super().__init__(num_clips)
        self.add_table("correlation")

    correlation: Tensor

    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Store the correlation of two curves over time."""
        if clip.visemes is None or clip.lips is None:
            return self.NO_VISEMES
        if len(clip.frames) < 3 or len(clip.visemes) != len(clip.frames):
            return TOO_SHORT
        pixels = clip.frames.transpose(0, 1)[None].float() / 127.5 - 1
        opening = mouth_darkness(pixels, clip.lips[:1].float())[0]
        self.correlation[index] = correlation(opening.numpy(), clip.visemes[:, 0].float().numpy())
        return ""

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the mean over clips."""
        return {"mouth_corr": mean_score(self.correlation[scored])}

    def cards(self) -> dict[str, Card]:
        """Return the card."""
        return {
            "mouth_corr": Card(
                metric="mouth_corr",
                definition="Pearson correlation over time of the darkness of the mouth and its "
                "drawn opening, 0 for a still mouth; mean over clips; synthetic talkers only",
                preprocessing="crop of 24 x 32 px around the lip box of the first frame",
            )
        }


class MouthOpening(Protocol):
    """Measures how far the mouth of a clip is open."""

    suffix: str  # of the score's name

    def measure(self, clip: VideoClip) -> Tensor | str:
        """Return the opening [T], NaN in frames without a face, or why there is none."""

    def describe(self) -> dict[str, Any]:
        """Return the fields of the card that the measure decides."""


class MeshOpening:
    """The distance of the inner lips in percent of the face height, by MediaPipe's face mesh."""

    suffix = ""

    def __init__(self, face: OneFace, landmarker: Path) -> None:
        self.face, self.mesh = face, FaceMesh(landmarker)
        self.sha256 = sha256_of([landmarker])

    def measure(self, clip: VideoClip) -> Tensor | str:
        """Return the opening [T] in percent, NaN in frames without a face."""
        rows = self.face.in_frames(clip.frames, range(len(clip.frames)), clip.face)
        if isinstance(rows, str):
            return rows
        openings = torch.full((len(rows),), float("nan"), dtype=torch.float64)
        heights = np.array([row[3] for row in rows if row is not None])
        # One height for the clip: the box of each frame has noise that is no mouth movement.
        for i, row in enumerate(rows):
            if row is not None:
                mouth = self.mesh.find(image_of(clip.frames[i]), row)
                if mouth.presence > 0.5:
                    openings[i] = 100 * mouth.opening / float(np.median(heights))
        return openings

    def describe(self) -> dict[str, Any]:
        """Return the unit, preprocessing, network, weights and license."""
        return {
            "definition": "distance of the inner lips in percent of the face's height",
            "preprocessing": f"{DETECTION}; landmarks 13 and 14 of the face mesh",
            "network": "MediaPipe face landmarker v2",
            "weights": self.sha256,
            "license": "Apache-2.0",
        }


class DarknessOpening:
    """The darkness of the lip crop, for synthetic talkers; scores end in `_demo`."""

    suffix = "_demo"

    def measure(self, clip: VideoClip) -> Tensor | str:
        """Return the darkness [T] in percent, at the lip box of the first frame."""
        if clip.lips is None or not len(clip.frames) or not clip.lips[:1].isfinite().all():
            return NO_FACE
        pixels = clip.frames.transpose(0, 1)[None].float() / 127.5 - 1
        return 100 * mouth_darkness(pixels, clip.lips[:1].float())[0].double()

    def describe(self) -> dict[str, Any]:
        """Return the unit and preprocessing."""
        return {
            "definition": "darkness of the mouth in percent",
            "preprocessing": "crop of 24 x 32 px around the lip box of the first frame",
        }


class SilentMouth(VideoMetric):
    """Mouth movement in pauses of the audio, in percent per frame, `silent_mouth`.

    A mouth that keeps moving while nobody speaks is a common fault of audio-driven video.
    """

    NO_AUDIO = "no audio"
    NO_PAUSE = "no pause in the audio"
    reasons = (NO_AUDIO, NO_PAUSE, NO_FACE, SEVERAL_FACES, TOO_SHORT)

    def __init__(self, num_clips: int, opening: MouthOpening) -> None:
        super().__init__(num_clips)
        self.opening = opening
        self.add_table("movement")

    movement: Tensor

    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Store the mean change of the opening between successive frames of a pause."""
        if clip.samples is None or not len(clip.samples):
            return self.NO_AUDIO
        if len(clip.frames) < 2:
            return TOO_SHORT
        # Frames after the end of the audio count as neither speech nor pause.
        silent = loudness_db(clip.samples, len(clip.frames), clip.fps) < SILENCE_DB
        # Count only changes between two frames of the same pause.
        pause = inside_pauses(silent)
        steps = pause[1:] & pause[:-1]
        if not steps.any():
            return self.NO_PAUSE
        opening = self.opening.measure(clip)
        if isinstance(opening, str):
            return opening
        # A change needs a face in both frames; without any, the clip has no score.
        changes = opening.diff().abs()[steps]
        changes = changes[changes.isfinite()]
        if not len(changes):
            return NO_FACE
        self.movement[index] = changes.mean()
        return ""

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the mean over clips."""
        return {f"silent_mouth{self.opening.suffix}": mean_score(self.movement[scored])}

    def cards(self) -> dict[str, Card]:
        """Return the card."""
        name, measure = f"silent_mouth{self.opening.suffix}", self.opening.describe()
        unit = measure.pop("definition")
        return {
            name: Card(
                metric=name,
                definition=f"mean absolute change per frame, in pauses of the audio, of the mouth "
                f"opening ({unit}); mean over clips; lower is stiller",
                settings={"silence_db": SILENCE_DB, "margin_frames": SILENCE_MARGIN},
                **measure,
            )
        }


# -- the functions that a configuration names ------------------------------------------------------


def motion(setup: Setup) -> VideoMetric:
    """Build the amount of motion."""
    return MotionAmount(setup.num_clips)


def flicker(setup: Setup) -> VideoMetric:
    """Build the flicker."""
    return Flicker(setup.num_clips)


def mouth_corr(setup: Setup) -> VideoMetric:
    """Build the correlation of the mouth with the visemes of synthetic talkers."""
    return MouthCorrelation(setup.num_clips)


def silent_mouth(setup: Setup) -> VideoMetric:
    """Build mouth movement in silence; raise MissingWeightsError without the face models."""
    path = find_model_file(LANDMARKER, setup.networks, setting="metrics.networks")
    return SilentMouth(setup.num_clips, MeshOpening(load_one_face(setup.networks), path))


def silent_mouth_demo(setup: Setup) -> VideoMetric:
    """Build mouth movement in silence of synthetic talkers."""
    return SilentMouth(setup.num_clips, DarknessOpening())
