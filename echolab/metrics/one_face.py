"""Detect the one face that each frame of a clip shows, for the scores that measure faces.

YuNet detects at most 640 pixels on the longer side.  Only detections with a score of 0.9 or more
count, which no animal face of the sample media reaches.  In a frame with several faces the tracked
box decides, or else the size: a face more than twice as high as all others is the speaker.  A clip
with a frame that stays ambiguous has no score, and so has a clip with too few faces.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from echolab.model_files import find_model_file
from echolab.vision.face_models import YUNET
from echolab.vision.faces import START_SCORE, FaceDetector, Image, Row, boxes

DETECT_PIXELS = 640  # longer side of the image that the detector sees
SECOND_FRACTION = 0.5  # a second face of this fraction of the first one's height is a rival
SAME_FACE = 0.3  # minimum IoU of a detection and the tracked box of the same frame
MIN_SHARE = 0.8  # of the frames of a clip must show a face

NO_FACE = "no face"
SEVERAL_FACES = "several faces"
DETECTION = (
    f"YuNet at {DETECT_PIXELS} px, score >= {START_SCORE}; the tracked or the clearly largest face"
)


def image_of(frame: Tensor) -> Image:
    """Return a frame [3, Y, X] uint8 as an image [Y, X, 3]."""
    return np.ascontiguousarray(frame.permute(1, 2, 0).cpu().numpy())


@lru_cache(maxsize=1)  # metrics of one evaluation share it
def load_one_face(folder: Path | None) -> "OneFace":
    """Return the detector of YuNet's file; raise MissingWeightsError without it."""
    return OneFace(find_model_file(YUNET, folder, setting="metrics.networks"))


class OneFace:
    """Finds one face per frame by YuNet."""

    def __init__(self, yunet: Path) -> None:
        self.yunet = yunet
        self._detectors: dict[tuple[int, int], FaceDetector] = {}  # by width, height

    def in_image(self, image: Image, box: Tensor | None = None) -> Row | str:
        """Return YuNet's row of the face in pixels of the image, or the reason why there is none.

        `box` [4] is the tracked face, ignored if NaN.
        """
        rows = self._detect(image)
        if not len(rows):
            return NO_FACE
        # Prefer the detection at the tracked box.
        if box is not None and bool(box.isfinite().all()):
            overlaps = _ious(boxes(rows), np.asarray(box.cpu(), np.float32))
            best = int(overlaps.argmax())
            if overlaps[best] >= SAME_FACE:
                return rows[best]
        # Otherwise the largest face must have no rival.
        rows = rows[rows[:, 3].argsort()[::-1]]
        if len(rows) > 1 and rows[1, 3] >= SECOND_FRACTION * rows[0, 3]:
            return SEVERAL_FACES
        return rows[0]

    def in_frames(
        self, frames: Tensor, indices: Sequence[int], tracked: Tensor | None = None
    ) -> list[Row | None] | str:
        """Return the rows of selected frames [T, 3, Y, X], None without a face, or the reason why
        the clip has none.
        """
        # One ambiguous frame is enough: the score might follow two people.
        rows: list[Row | None] = []
        for i in indices:
            box = tracked[i] if tracked is not None else None
            row = self.in_image(image_of(frames[i]), box)
            if isinstance(row, str) and row != NO_FACE:
                return row
            rows.append(None if isinstance(row, str) else row)
        # A score of the few frames in which a face remains would say nothing about the clip.
        detected = sum(row is not None for row in rows)
        return rows if detected and detected >= MIN_SHARE * len(rows) else NO_FACE

    def _detect(self, image: Image) -> NDArray[np.float32]:
        """Return all confident rows [n, 15], in pixels of the image."""
        height, width = image.shape[:2]
        scale = min(1.0, DETECT_PIXELS / max(height, width))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        if scale < 1:
            image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
        # YuNet is made for one size; a set of clips has few.
        if size not in self._detectors:
            self._detectors[size] = FaceDetector(self.yunet, *size)
        rows = self._detectors[size].detect(image)
        rows = rows[rows[:, 14] >= START_SCORE]
        # Each side was rounded to full pixels, so each has a scale of its own.
        rows[:, 0:14:2] *= width / size[0]
        rows[:, 1:14:2] *= height / size[1]
        return rows


def _ious(candidates: NDArray[np.float32], box: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the IoU [n] of boxes [n, 4] with one box [4]."""
    low = np.maximum(candidates[:, :2], box[:2])
    high = np.minimum(candidates[:, 2:], box[2:])
    intersection = (high - low).clip(min=0).prod(1)
    areas = (candidates[:, 2:] - candidates[:, :2]).prod(1)
    union = areas + (box[2:] - box[:2]).prod() - intersection
    return np.asarray(intersection / np.maximum(union, 1e-6), np.float32)
