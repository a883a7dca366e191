"""HKC and HKV: how clearly hands are seen, and how much they move.

CyberHost (2024) introduced both scores without a unit or normalization.  Our definition: HKC is the
mean confidence of the detector over all 42 hand keypoints and all frames; HKV is the variance over
time of the positions of clearly seen hand keypoints, in squared percent of the shoulder width.
Keypoints are those of DWPose: YOLOX finds the person, and RTMPose 133 keypoints of body, feet,
face and hands.
"""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echolab.encoders.files import sha256_of
from echolab.errors import WeightsError
from echolab.metrics.card import Card
from echolab.metrics.metric import Score, VideoClip, VideoMetric, mean_score
from echolab.metrics.one_face import MIN_SHARE, image_of
from echolab.metrics.setup import Setup
from echolab.metrics.weights import DWPOSE, YOLOX
from echolab.model_files import find_model_file
from echolab.vision.faces import Image

# Person detector: YOLOX-l on COCO.
DETECT_PIXELS = 640
STRIDES = (8, 16, 32)
PADDING_LEVEL = 114
PERSON_SCORE, NMS_IOU = 0.3, 0.45
# A second person of this fraction of the first one's height is a rival.
SECOND_FRACTION = 0.5

# Pose: RTMPose-l on COCO-WholeBody, distilled by DWPose.
POSE_WIDTH, POSE_HEIGHT = 288, 384
BOX_MARGIN = 1.25
SPLIT = 2.0  # bins per pixel of SimCC
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)
KEYPOINTS = 133
SHOULDERS = (5, 6)
HANDS = slice(91, 133)  # 21 of the left hand, then 21 of the right

# Below this confidence DWPose's own drawing leaves a keypoint out.
SEEN = 0.3  # minimum confidence of a keypoint whose position counts
SEEN_SHARE = 0.5  # of the frames, for a hand keypoint to enter HKV
PERCENT = 100.0

NO_PERSON, SEVERAL_PEOPLE = "no person", "several people"
NO_SHOULDERS, NO_HANDS = "no shoulders", "no hands"
TOO_SHORT = "too few frames"


class Pose(NamedTuple):
    """Keypoints of one person in K frames."""

    points: NDArray[np.float64]  # [K, 133, 2] in pixels
    confidence: NDArray[np.float64]  # [K, 133]


# -- decoding --------------------------------------------------------------------------------------


def letterbox(image: Image) -> tuple[NDArray[np.float32], float]:
    """Return the BGR input [1, 3, 640, 640] of YOLOX, 0 to 255, and its scale.

    The image fills the top left corner; the rest is gray.
    """
    height, width = image.shape[:2]
    scale = DETECT_PIXELS / max(height, width)
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    # The scale is the same on both axes, so boxes need no other correction.
    padded = np.full((DETECT_PIXELS, DETECT_PIXELS, 3), PADDING_LEVEL, np.float32)
    padded[: size[1], : size[0]] = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(padded[..., ::-1].transpose(2, 0, 1)[None]), scale


def decode_people(output: NDArray[np.float32], scale: float) -> NDArray[np.float64]:
    """Return the people [n, 5], left, top, right, bottom, score, of YOLOX's output [1, 8400, 85].

    The output has center and log size in units of the stride, then objectness and 80 classes, of
    which the first is a person.
    """
    # The cells of each stride, row by row.
    cells, strides = [], []
    for stride in STRIDES:
        side = DETECT_PIXELS // stride
        y, x = np.mgrid[:side, :side]
        cells.append(np.stack([x, y], -1).reshape(-1, 2))
        strides.append(np.full((side * side, 1), stride))
    cell, stride_of = np.concatenate(cells), np.concatenate(strides)
    rows = output[0].astype(np.float64)
    center = (rows[:, :2] + cell) * stride_of
    half = np.exp(rows[:, 2:4].clip(max=20)) * stride_of / 2
    score = rows[:, 4] * rows[:, 5]
    # A cell whose most likely class is another one shows no person.
    keep = (score >= PERSON_SCORE) & (rows[:, 5:].argmax(1) == 0)
    boxes = np.concatenate([center - half, center + half], 1)[keep] / scale
    return _suppress(np.c_[boxes, score[keep]])


def _suppress(people: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return people [n, 5] without those that overlap a better one."""
    # Greedy, from the highest score on.
    people = people[people[:, 4].argsort()[::-1]]
    kept: list[NDArray[np.float64]] = []
    for row in people:
        if all(_iou(row, other) <= NMS_IOU for other in kept):
            kept.append(row)
    return np.array(kept).reshape(-1, 5)


def _iou(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    overlap = (np.minimum(a[2:4], b[2:4]) - np.maximum(a[:2], b[:2])).clip(min=0).prod()
    union = (a[2:4] - a[:2]).prod() + (b[2:4] - b[:2]).prod() - overlap
    return float(overlap / max(union, 1e-9))


def pose_region(box: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return center [2] and size [2] of the region around a person's box, with RTMPose's aspect."""
    # Extend the shorter side: the crop must not stretch the person.
    center = (box[:2] + box[2:4]) / 2
    width, height = (box[2:4] - box[:2]) * BOX_MARGIN
    aspect = POSE_WIDTH / POSE_HEIGHT
    return center, np.array([max(width, height * aspect), max(height, width / aspect)])


def pose_input(
    image: Image, center: NDArray[np.float64], size: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Return the normalized RGB input [1, 3, 384, 288] of a region of the image."""
    # One warp crops and scales; outside of the image it is black, as in mmpose.
    scale = POSE_WIDTH / size[0]
    shift = np.array([POSE_WIDTH, POSE_HEIGHT]) / 2 - scale * center
    to_input = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
    crop = cv2.warpAffine(image, to_input, (POSE_WIDTH, POSE_HEIGHT), flags=cv2.INTER_LINEAR)
    normalized = (crop.astype(np.float32) - MEAN) / STD
    return np.ascontiguousarray(normalized.transpose(2, 0, 1)[None])


def decode_simcc(
    x: NDArray[np.float32], y: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return points [K, 2] in input pixels and confidence [K] of SimCC scores [K, 2 X], [K, 2 Y].

    A point is at the highest bin of each axis; its confidence is the lower of the two maxima, as in
    mmpose.
    """
    points = np.stack([x.argmax(1), y.argmax(1)], 1) / SPLIT
    confidence = np.minimum(x.max(1), y.max(1)).astype(np.float64)
    return points, confidence


# -- the network -----------------------------------------------------------------------------------


class DwPose:
    """DWPose from its two ONNX files, yolox_l.onnx and dw-ll_ucoco_384.onnx."""

    def __init__(self, detector: Path, pose: Path) -> None:
        """Read both files.  Raise WeightsError if one is not a readable ONNX file."""
        self.detector, self.pose = _read_onnx(detector), _read_onnx(pose)
        self.sha256 = sha256_of([detector, pose])
        self._last: tuple[Tensor, int, Pose | str] | None = None

    def people(self, image: Image) -> NDArray[np.float64]:
        """Return the people [n, 5] in an image, left, top, right, bottom, score."""
        padded, scale = letterbox(image)
        self.detector.setInput(padded)
        return decode_people(np.asarray(self.detector.forward(), np.float32), scale)

    def keypoints(
        self, image: Image, box: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the points [133, 2] in image pixels and the confidence [133] of one person."""
        center, size = pose_region(box)
        self.pose.setInput(pose_input(image, center, size))
        # Names and order of the outputs depend on the export, but not their numbers of bins.
        outputs = self.pose.forward(self.pose.getUnconnectedOutLayersNames())
        x, y = sorted((np.asarray(output, np.float32)[0] for output in outputs), key=np.size)
        points, confidence = decode_simcc(x, y)
        return points * size / [POSE_WIDTH, POSE_HEIGHT] + center - size / 2, confidence

    def of_clip(self, frames: Tensor, every: int) -> Pose | str:
        """Return the pose in every n-th frame [T, 3, Y, X], or the reason why there is none."""
        # HKC and HKV ask for the same clip after each other.
        if self._last is None or self._last[0] is not frames or self._last[1] != every:
            self._last = (frames, every, self._measure(frames, every))
        return self._last[2]

    def _measure(self, frames: Tensor, every: int) -> Pose | str:
        points, confidence = [], []
        for frame in frames[::every]:
            image = image_of(frame)
            people = self.people(image)
            heights = np.sort(people[:, 3] - people[:, 1])[::-1]
            if not len(people):
                continue
            if len(heights) > 1 and heights[1] >= SECOND_FRACTION * heights[0]:
                return SEVERAL_PEOPLE
            # Height is a better measure of a person's distance than area: arms may be spread.
            person = people[(people[:, 3] - people[:, 1]).argmax()]
            keypoints = self.keypoints(image, person)
            points.append(keypoints[0])
            confidence.append(keypoints[1])
        # A frame without the person would lower HKC for another reason than unclear hands.
        if not points or len(points) < MIN_SHARE * len(frames[::every]):
            return NO_PERSON
        return Pose(np.stack(points), np.stack(confidence))


def _read_onnx(path: Path) -> cv2.dnn.Net:
    try:
        return cv2.dnn.readNetFromONNX(str(path))
    except cv2.error as error:
        raise WeightsError(f"{path}: not a readable ONNX file; replace it") from error


# -- scores ----------------------------------------------------------------------------------------


def hand_confidence(pose: Pose) -> float:
    """Return the mean confidence of hand keypoints, limited to 0 .. 1."""
    return float(pose.confidence[:, HANDS].clip(0, 1).mean())


def hand_variance(pose: Pose) -> float | str:
    """Return the variance of hand positions in squared percent of the shoulder width.

    It is the variance over frames of x plus that of y (1 / N), mean over the hand keypoints that
    are clearly seen in at least half of the frames.
    """
    seen = pose.confidence >= SEEN
    shoulders = seen[:, list(SHOULDERS)].all(1)
    if shoulders.sum() < 2:
        return NO_SHOULDERS
    # The median is robust against a few frames in which the person turns.
    left, right = (pose.points[shoulders, k] for k in SHOULDERS)
    width = float(np.median(np.linalg.norm(left - right, axis=-1)))
    # Seen from the side, shoulders have no width that positions could be divided by.
    if width < 1:
        return NO_SHOULDERS
    hands, clear = PERCENT * pose.points[:, HANDS] / width, seen[:, HANDS]
    steady = (clear.mean(0) >= SEEN_SHARE) & (clear.sum(0) >= 2)
    if not steady.any():
        return NO_HANDS
    # Frames in which a keypoint is unclear are left out: its position there is arbitrary.
    variances = [hands[clear[:, k], k].var(0).sum() for k in np.flatnonzero(steady)]
    return float(np.mean(variances))


def _card(name: str, definition: str, network: DwPose, every: int) -> Card:
    return Card(
        metric=name,
        definition=definition,
        preprocessing="YOLOX-l at 640 px (BGR), the clearly tallest person; RTMPose at 288 x 384 "
        "(RGB, ImageNet mean and std), box x 1.25",
        network="DWPose: yolox_l and dw-ll_ucoco_384, 133 keypoints",
        weights=network.sha256,
        license=DWPOSE.license,
        settings={
            "every": every,
            "person_score": PERSON_SCORE,
            "seen": SEEN,
            "min_person_share": MIN_SHARE,
        },
    )


class HandConfidence(VideoMetric):
    """HKC, the mean confidence of hand keypoints, `hkc`; 0 to 1, higher is clearer.

    Clips whose hands are out of the frame have low values, so compare with recorded videos.
    """

    reasons = (NO_PERSON, SEVERAL_PEOPLE)

    def __init__(self, num_clips: int, network: DwPose, every: int = 5) -> None:
        """Score every fifth frame by default."""
        super().__init__(num_clips)
        self.network, self.every = network, every
        self.add_table("confidence")

    confidence: Tensor

    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Store the mean over keypoints and frames."""
        pose = self.network.of_clip(clip.frames, self.every)
        if isinstance(pose, str):
            return pose
        self.confidence[index] = hand_confidence(pose)
        return ""

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the mean over clips."""
        return {"hkc": mean_score(self.confidence[scored])}

    def cards(self) -> dict[str, Card]:
        """Return the card."""
        definition = (
            "mean confidence (SimCC maximum, limited to 0 .. 1) of 42 hand keypoints over "
            "keypoints, frames and clips"
        )
        return {"hkc": _card("hkc", definition, self.network, self.every)}


class HandVariance(VideoMetric):
    """HKV, the variance of hand positions over time, `hkv`; motion, not quality."""

    reasons = (NO_PERSON, SEVERAL_PEOPLE, NO_SHOULDERS, NO_HANDS, TOO_SHORT)

    def __init__(self, num_clips: int, network: DwPose, every: int = 5) -> None:
        """Score every fifth frame by default."""
        super().__init__(num_clips)
        self.network, self.every = network, every
        self.add_table("variance")

    variance: Tensor

    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Store the variance."""
        if len(clip.frames) <= self.every:
            return TOO_SHORT
        pose = self.network.of_clip(clip.frames, self.every)
        if isinstance(pose, str):
            return pose
        variance = hand_variance(pose)
        if isinstance(variance, str):
            return variance
        self.variance[index] = torch.tensor(variance, dtype=torch.float64)
        return ""

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the mean over clips."""
        return {"hkv": mean_score(self.variance[scored])}

    def cards(self) -> dict[str, Card]:
        """Return the card."""
        definition = (
            "variance over time of x plus that of y of hand keypoints with confidence >= 0.3 in "
            "half of the frames, in squared percent of the median shoulder width; mean over "
            "keypoints and clips"
        )
        return {"hkv": _card("hkv", definition, self.network, self.every)}


# -- the functions that a configuration names ------------------------------------------------------


@lru_cache(maxsize=1)  # HKC and HKV share the networks and the poses of a clip
def load_dwpose(folder: Path | None) -> DwPose:
    """Return DWPose; raise MissingWeightsError without its two files."""
    detector, pose = (
        find_model_file(model, folder, setting="metrics.networks") for model in (YOLOX, DWPOSE)
    )
    return DwPose(detector, pose)


def hkc(setup: Setup, *, every: int = 5) -> VideoMetric:
    """Build the confidence of hand keypoints."""
    return HandConfidence(setup.num_clips, load_dwpose(setup.networks), every)


def hkv(setup: Setup, *, every: int = 5) -> VideoMetric:
    """Build the variance of hand keypoints."""
    return HandVariance(setup.num_clips, load_dwpose(setup.networks), every)
