"""Which face is where, and since when: detections joined to tracks within one scene."""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from echolab.vision.faces import Picture, Rows, boxes

START_SCORE = 0.9
SAME_FACE = 0.3  # IoU of two detections of one face, a few frames apart
LOST_FRAMES = 5  # a face may hide for 0.2 s
BRIEF_FRAMES = 5  # a track this short is a flicker of the detector
CUT_DIFFERENCE = 27.0  # mean change of hue, saturation and value: PySceneDetect's default
SCENE_PIXELS = (64, 36)


class Track(NamedTuple):
    """One face in consecutive frames."""

    first: int
    rows: Rows  # [frames, 15] YuNet's rows, interpolated where it was not asked

    @property
    def last(self) -> int:
        """The frame after its last."""
        return self.first + len(self.rows)


class SceneCuts:
    """Tells whether a picture begins a new scene, seeing one after another."""

    def __init__(self) -> None:
        self.before: NDArray[np.float32] | None = None

    def begins(self, picture: Picture) -> bool:
        small = cv2.resize(picture, SCENE_PIXELS, interpolation=cv2.INTER_AREA)
        now = cv2.cvtColor(small, cv2.COLOR_RGB2HSV).astype(np.float32)
        before, self.before = self.before, now
        return before is None or float(np.abs(now - before).mean()) > CUT_DIFFERENCE


class Tracker:
    """Joins the detections of one frame after another."""

    def __init__(self) -> None:
        self.open: list[dict[int, NDArray[np.float32]]] = []  # frame -> row, one dict a face
        self.closed: list[Track] = []

    def cut(self, frame: int) -> None:
        """A new scene begins at `frame`: no face goes on."""
        for seen in self.open:
            self._close(seen, frame)
        self.open = []

    def add(self, frame: int, rows: Rows) -> None:
        """The detections of `frame`, which is later than all before."""
        kept = []
        for seen in self.open:
            if frame - max(seen) <= LOST_FRAMES:
                kept.append(seen)
            else:
                self._close(seen, max(seen) + 1)
        self.open = kept
        free = list(range(len(rows)))
        for seen in sorted(kept, key=lambda seen: -len(seen)):
            last = seen[max(seen)]
            overlaps = [_iou(last, rows[i]) for i in free]
            if overlaps and max(overlaps) > SAME_FACE:
                seen[frame] = rows[free.pop(int(np.argmax(overlaps)))]
        self.open += [{frame: rows[i]} for i in free if rows[i, 14] >= START_SCORE]

    def finish(self, frames: int, every: int) -> list[Track]:
        """All tracks of a video of `frames` frames, asked about every `every` frames."""
        for seen in self.open:
            # The detector was not asked after its last turn; the face has not gone for that.
            last = max(seen)
            self._close(seen, min(last + every, frames) if frames - last <= every else last + 1)
        self.open = []
        return [track for track in self.closed if len(track.rows) > BRIEF_FRAMES]

    def _close(self, seen: dict[int, NDArray[np.float32]], end: int) -> None:
        asked = sorted(seen)
        end = min(end, asked[-1] + LOST_FRAMES)
        frames = np.arange(asked[0], max(end, asked[-1] + 1))
        known = np.stack([seen[frame] for frame in asked])
        rows = np.stack([np.interp(frames, asked, column) for column in known.T], 1)
        self.closed.append(Track(asked[0], rows.astype(np.float32)))


def _iou(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    a, b = boxes(one[None])[0], boxes(other[None])[0]
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = float(width * height)
    return both / float(one[2] * one[3] + other[2] * other[3] - both)
