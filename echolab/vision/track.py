"""Join detections to tracks: one face in consecutive frames of a scene."""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from echolab.vision.faces import Image, Rows, boxes

START_SCORE = 0.9
SAME_FACE = 0.3  # IoU of two detections of one face, within a few frames
LOST_FRAMES = 5  # a face may be hidden for 0.2 s
BRIEF_FRAMES = 5  # a track this short is noise of the detector
CUT_DIFFERENCE = 27.0  # mean change of hue, saturation and value: PySceneDetect's default
SCENE_PIXELS = (64, 36)


class Track(NamedTuple):
    """One face in consecutive frames."""

    first: int
    rows: Rows  # [frames, 15] YuNet's rows, interpolated between the frames it ran on

    @property
    def last(self) -> int:
        """The frame after its last."""
        return self.first + len(self.rows)


class SceneCuts:
    """Detects scene cuts in a sequence of frames."""

    def __init__(self) -> None:
        self.previous: NDArray[np.float32] | None = None

    def begins(self, image: Image) -> bool:
        """Return whether this frame begins a new scene."""
        small = cv2.resize(image, SCENE_PIXELS, interpolation=cv2.INTER_AREA)
        current = cv2.cvtColor(small, cv2.COLOR_RGB2HSV).astype(np.float32)
        previous, self.previous = self.previous, current
        return previous is None or float(np.abs(current - previous).mean()) > CUT_DIFFERENCE


class Tracker:
    """Joins the detections of successive frames to tracks, greedily by IoU."""

    def __init__(self) -> None:
        self.open: list[dict[int, NDArray[np.float32]]] = []  # frame -> row, one dict a face
        self.closed: list[Track] = []

    def cut(self, frame: int) -> None:
        """End all tracks: a new scene begins at `frame`."""
        for detected in self.open:
            self._close(detected, frame)
        self.open = []

    def add(self, frame: int, rows: Rows) -> None:
        """Add the detections of `frame`, which is later than all before."""
        kept = []
        for detected in self.open:
            if frame - max(detected) <= LOST_FRAMES:
                kept.append(detected)
            else:
                self._close(detected, max(detected) + 1)
        self.open = kept
        free = list(range(len(rows)))
        for detected in sorted(kept, key=lambda detected: -len(detected)):
            last = detected[max(detected)]
            overlaps = [_iou(last, rows[i]) for i in free]
            if overlaps and max(overlaps) > SAME_FACE:
                detected[frame] = rows[free.pop(int(np.argmax(overlaps)))]
        self.open += [{frame: rows[i]} for i in free if rows[i, 14] >= START_SCORE]

    def finish(self, frames: int, every: int) -> list[Track]:
        """Return the tracks of a video of `frames` frames, detected every `every` frames."""
        for detected in self.open:
            # A track ends where the next detection would have been: the detector ran no more.
            last = max(detected)
            self._close(detected, min(last + every, frames) if frames - last <= every else last + 1)
        self.open = []
        return [track for track in self.closed if len(track.rows) > BRIEF_FRAMES]

    def _close(self, detected: dict[int, NDArray[np.float32]], end: int) -> None:
        """Keep a track up to frame `end`, with rows interpolated between its detections."""
        frames_detected = sorted(detected)
        end = min(end, frames_detected[-1] + LOST_FRAMES)
        frames = np.arange(frames_detected[0], max(end, frames_detected[-1] + 1))
        known = np.stack([detected[frame] for frame in frames_detected])
        rows = np.stack([np.interp(frames, frames_detected, column) for column in known.T], 1)
        self.closed.append(Track(frames_detected[0], rows.astype(np.float32)))


def _iou(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    a, b = boxes(one[None])[0], boxes(other[None])[0]
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = float(width * height)
    return both / float(one[2] * one[3] + other[2] * other[3] - both)
