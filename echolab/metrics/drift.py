"""Drift of color and identity from the start to the end of a video, and seams at window borders.

Long videos are sampled in windows or chunks, each of which begins from the end of the one before:
errors of color and of the face add up over the windows, and each border may show a jump.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echolab.metrics.card import Card
from echolab.metrics.identity import FaceEmbedder, identity_card, load_embedder
from echolab.metrics.metric import Score, VideoClip, VideoMetric, mean_score
from echolab.metrics.motion import FLOW_PIXELS, flow_input, optical_flow
from echolab.metrics.one_face import NO_FACE, SEVERAL_FACES, image_of
from echolab.metrics.setup import Setup
from echolab.metrics.weights import MOBILEFACENET

ENDS = 12  # frames at the start and at the end that are compared: about half a second
TOO_SHORT = f"fewer than {2 * ENDS} frames"

# -- color -----------------------------------------------------------------------------------------


# Linear sRGB to XYZ, divided by the white of D65, so that gray is (g, g, g).
RGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
     [0.0193339, 0.1191920, 0.9503041]]
)  # fmt: skip
RGB_TO_XYZ /= RGB_TO_XYZ.sum(1, keepdims=True)
_LEVELS = np.arange(256) / 255
LINEAR = np.where(_LEVELS <= 0.04045, _LEVELS / 12.92, ((_LEVELS + 0.055) / 1.055) ** 2.4)


def to_lab(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Convert an image [Y, X, 3] of sRGB to CIELAB, L* in 0 .. 100, with the white of D65."""
    xyz = LINEAR[image] @ RGB_TO_XYZ.T
    # CIE's function: a cube root, with a straight line near black.
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (xyz * 24389 / 27 + 16) / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def mean_lab(frames: Tensor) -> NDArray[np.float64]:
    """Return the mean CIELAB color [3] of frames [T, 3, Y, X] uint8."""
    return np.mean([to_lab(image_of(frame)).mean((0, 1)) for frame in frames], 0)


class ColorDrift(VideoMetric):
    """Change of the mean color and of its parts from start to end, in CIELAB units.

    `color_drift` is a distance; `brightness_drift` and `saturation_drift` have a sign, positive if
    the video becomes brighter or more colorful.
    """

    reasons = (TOO_SHORT,)

    def __init__(self, num_clips: int) -> None:
        super().__init__(num_clips)
        self.add_table("changes", 3)  # distance, lightness, chroma

    changes: Tensor

    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Store the three changes."""
        if len(clip.frames) < 2 * ENDS:
            return TOO_SHORT
        start, end = mean_lab(clip.frames[:ENDS]), mean_lab(clip.frames[-ENDS:])
        # Chroma is the distance from gray of the mean color.
        chroma = np.hypot(*end[1:]) - np.hypot(*start[1:])
        changes = [float(np.linalg.norm(end - start)), float(end[0] - start[0]), float(chroma)]
        self.changes[index] = torch.tensor(changes, dtype=torch.float64)
        return ""

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the means over clips."""
        names = ("color_drift", "brightness_drift", "saturation_drift")
        return {name: mean_score(self.changes[scored, k]) for k, name in enumerate(names)}

    def cards(self) -> dict[str, Card]:
        """Return the cards of the three scores."""
        definitions = {
            "color_drift": "CIE 1976 color difference",
            "brightness_drift": "difference of lightness L*",
            "saturation_drift": "difference of chroma C*",
        }
        return {
            name: Card(
                metric=name,
                definition=f"{text} of the mean colors of the last and first {ENDS} frames, mean "
                "over clips; scene content enters too, so compare with recorded videos",
                preprocessing="sRGB to CIELAB (D65) per pixel, at full size",
                settings={"ends": ENDS},
            )
            for name, text in definitions.items()
        }


# -- identity --------------------------------------------------------------------------------------


class IdentityDrift(VideoMetric):
    """Change of the face from the start to the end, as 1 - cosine, `identity_drift`."""

    EVERY = 3  # frames
    reasons = (TOO_SHORT, NO_FACE, SEVERAL_FACES)

    def __init__(self, num_clips: int, embedder: FaceEmbedder) -> None:
        super().__init__(num_clips)
        self.embedder = embedder
        self.add_table("change")

    change: Tensor

    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Store 1 minus the cosine of the mean embeddings at the start and at the end."""
        count = len(clip.frames)
        if count < 2 * ENDS:
            return TOO_SHORT
        means = []
        # Each end must show a face: a face that is lost at the end has no finite drift.
        for first in (0, count - ENDS):
            indices = range(first, first + ENDS, self.EVERY)
            embeddings = self.embedder.in_frames(clip.frames, indices, clip.face)
            if isinstance(embeddings, str):
                return embeddings
            mean = np.nanmean(embeddings, 0)
            means.append(mean / np.linalg.norm(mean))
        # Equal directions may have a product above 1 by rounding.
        self.change[index] = max(0.0, 1 - float(means[0] @ means[1]))
        return ""

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the mean over clips."""
        return {"identity_drift": mean_score(self.change[scored])}

    def cards(self) -> dict[str, Card]:
        """Return the card."""
        definition = (
            f"1 - cosine of the mean ArcFace embeddings of the first and last {ENDS} frames, mean "
            "over clips; 0 is the same face, 1 an unrelated one"
        )
        return {
            "identity_drift": identity_card(self.embedder, "identity_drift", definition, self.EVERY)
        }


# -- seams -----------------------------------------------------------------------------------------

PIXEL_FLOOR = 0.25  # gray levels: below, the change of a still video is rounding
MOTION_FLOOR = 0.05  # pixels per frame


def pixel_changes(frames: Tensor) -> NDArray[np.float64]:
    """Return the mean absolute change [T - 1] in gray levels from each frame to the next."""
    # Differences of uint8 would wrap.
    pairs = zip(frames, frames[1:], strict=False)
    return np.array([float((b.short() - a.short()).abs().double().mean()) for a, b in pairs])


def motion_changes(frames: Tensor) -> NDArray[np.float64]:
    """Return the mean length [T - 2] of the change of optical flow at each inner frame, in px."""
    # Steady motion has no change of flow, so a moving camera hides no seam.
    images = flow_input(frames)
    flows = [optical_flow(a, b) for a, b in zip(images, images[1:], strict=False)]
    pairs = zip(flows, flows[1:], strict=False)
    return np.array([np.linalg.norm(b - a, axis=-1).mean(dtype=np.float64) for a, b in pairs])


def seam_ratio(
    changes: NDArray[np.float64], at_border: Sequence[int], near: Sequence[int], floor: float
) -> float:
    """Return the mean change at borders, divided by the median of changes that are not near one.

    `at_border` and `near` are indices of changes; a median below `floor` counts as `floor`.
    """
    ordinary = np.delete(changes, near)
    return float(changes[list(at_border)].mean() / max(float(np.median(ordinary)), floor))


class Seams(VideoMetric):
    """Jumps at the borders of windows, relative to other frames; 1 is no seam.

    `seam_pixels` compares the change of pixels, `seam_motion` the change of motion.
    """

    NO_BORDERS = "no window border"
    FEW_FRAMES = "too few frames between the borders"
    reasons = (NO_BORDERS, FEW_FRAMES)

    def __init__(self, num_clips: int) -> None:
        super().__init__(num_clips)
        self.add_table("ratios", 2)

    ratios: Tensor

    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Store both ratios."""
        # Change k is from frame k to k + 1, and the change of motion k is at frame k + 1.
        count = len(clip.frames)
        borders = [border for border in clip.borders if 2 <= border <= count - 2]
        if not borders:
            return self.NO_BORDERS
        into = [border - 1 for border in borders]
        # Flow over a border enters the change of motion before and after it.
        around = sorted({k for border in borders for k in (border - 2, border - 1)})
        if count - 2 - len(around) < len(around):
            return self.FEW_FRAMES
        pixels = seam_ratio(pixel_changes(clip.frames), into, into, PIXEL_FLOOR)
        motion = seam_ratio(motion_changes(clip.frames), around, around, MOTION_FLOOR)
        self.ratios[index] = torch.tensor([pixels, motion], dtype=torch.float64)
        return ""

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the means over clips."""
        names = ("seam_pixels", "seam_motion")
        return {name: mean_score(self.ratios[scored, k]) for k, name in enumerate(names)}

    def cards(self) -> dict[str, Card]:
        """Return the cards of both scores."""
        frames = "frames at which a window of the sampler begins"
        return {
            "seam_pixels": Card(
                metric="seam_pixels",
                definition=f"mean absolute change of pixels into {frames}, over the median of all "
                "other changes of the clip; mean over clips; 1 is no seam",
                preprocessing="8-bit RGB at full size",
                settings={"floor_levels": PIXEL_FLOOR},
            ),
            "seam_motion": Card(
                metric="seam_motion",
                definition=f"mean change of the optical flow just before and after {frames}, over "
                "the median of all other changes of the clip; mean over clips; 1 is no seam",
                preprocessing=f"luma, shorter side scaled to {FLOW_PIXELS} px; Farneback's flow",
                settings={"floor_px": MOTION_FLOOR},
            ),
        }


# -- the functions that a configuration names ------------------------------------------------------


def color_drift(setup: Setup) -> VideoMetric:
    """Build the drift of the mean color."""
    return ColorDrift(setup.num_clips)


def identity_drift(setup: Setup, *, network: str = MOBILEFACENET.name) -> VideoMetric:
    """Build the drift of the face; raise MissingWeightsError without the face models."""
    return IdentityDrift(setup.num_clips, load_embedder(setup.networks, network))


def seams(setup: Setup) -> VideoMetric:
    """Build the scores of window borders."""
    return Seams(setup.num_clips)
