"""Face tracks and crops for SyncNet, as the published pipeline makes them (syncnet_python).

Faces are joined to tracks within a scene: greedily by IoU > 0.5, with up to 25 frames without a
detection, which are interpolated.  The crop of a box with center c and half side s, each smoothed
by a median over 13 frames, spans c_x -+ 1.4 s and c_y - s to c_y + 1.8 s; outside the frame it is
gray 110; it is scaled to 224 x 224 pixels.

The published detector is S3FD.  Here boxes come from YuNet, or from the tracks of a dataset.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.signal import medfilt

from echolab.metrics.networks.syncnet import CROP_PIXELS
from echolab.vision.faces import START_SCORE, FaceDetector, Image, Rows, SceneCuts, boxes

SAME_FACE = 0.5  # minimum IoU of successive detections of one face
MISSED_FRAMES = 25  # most frames from one detection to the next
SMOOTHING = 13  # frames of the median
CROP_SCALE = 0.4  # margin of the crop, in half sides of the box
GRAY = 110
DETECT_PIXELS = 640  # longer side of the image that the detector sees
RIVAL = 0.5  # a second face of this fraction of the first one's size is a rival

Boxes = NDArray[np.float64]  # [n, 4] left, top, right, bottom
Detect = Callable[[Image], Rows]


class FaceTrack(NamedTuple):
    """One face in successive frames."""

    first: int  # frame
    boxes: Boxes  # [T, 4]

    @property
    def last(self) -> int:
        """Index of the frame after the end of the track."""
        return self.first + len(self.boxes)

    @property
    def side(self) -> float:
        """The larger of mean width and mean height, in pixels."""
        return float((self.boxes[:, 2:] - self.boxes[:, :2]).mean(0).max())


def find_tracks(frames: NDArray[np.uint8], detect: Detect) -> list[FaceTrack]:
    """Return the face tracks of frames RGB [T, Y, X, 3], in order of their beginning.

    Only detections with a score of 0.9 begin a track; those of 0.7 continue it.
    """
    tracks: list[FaceTrack] = []
    scene: list[tuple[int, Rows]] = []  # detections of the frames of a scene
    cuts = SceneCuts()
    for index, frame in enumerate(frames):
        # A track never extends over a scene cut.
        if cuts.begins(frame):
            tracks += join_detections(scene)
            scene = []
        scene.append((index, detect(frame)))
    return tracks + join_detections(scene)


def join_detections(scene: list[tuple[int, Rows]]) -> list[FaceTrack]:
    """Join the detections of a scene, one (frame, rows) per frame, to tracks."""
    # Detections that belong to no track yet.
    free = [(index, list(rows)) for index, rows in scene]
    tracks = []
    while (start := _take_start(free)) is not None:
        # Follow this face to its end before the next face is begun.
        index, row = start
        detected = {index: boxes(row[None])[0].astype(np.float64)}
        for later, rows in free:
            if later > index + MISSED_FRAMES:
                break
            overlaps = [iou(detected[index], box) for box in boxes(np.array(rows))] if rows else []
            if later > index and overlaps and max(overlaps) > SAME_FACE:
                row = rows.pop(int(np.argmax(overlaps)))
                index = later
                detected[index] = boxes(row[None])[0].astype(np.float64)
        tracks.append(interpolate(detected))
    return sorted(tracks, key=lambda track: track.first)


def _take_start(
    free: list[tuple[int, list[NDArray[np.float32]]]],
) -> tuple[int, NDArray[np.float32]] | None:
    """Remove and return the first detection that may begin a track."""
    for index, rows in free:
        for position, row in enumerate(rows):
            if row[14] >= START_SCORE:
                return index, rows.pop(position)
    return None


def tracks_of_boxes(known: Boxes, width: int, height: int) -> list[FaceTrack]:
    """Return the tracks of one face's boxes [T, 4] in frames of width x height pixels.

    Boxes that are NaN, smaller than 2 pixels or outside the frame count as no detection.
    """
    # A center within the frame makes sure that a crop shows some of it.
    sizes, centers = known[:, 2:] - known[:, :2], (known[:, 2:] + known[:, :2]) / 2
    with np.errstate(invalid="ignore"):
        usable = (sizes >= 2).all(1) & (centers >= 0).all(1) & (centers <= (width, height)).all(1)
    detected: dict[int, Boxes] = {}
    tracks = []
    for index in np.flatnonzero(usable & np.isfinite(known).all(1)).tolist():
        # A longer gap ends the track.
        if detected and index > max(detected) + MISSED_FRAMES:
            tracks.append(interpolate(detected))
            detected = {}
        detected[index] = known[index].astype(np.float64)
    return [*tracks, interpolate(detected)] if detected else tracks


def interpolate(detected: dict[int, Boxes]) -> FaceTrack:
    """Return the track of detected boxes [4] by frame, linear in the frames between them."""
    # All four sides are interpolated separately.
    known = sorted(detected)
    frames = np.arange(known[0], known[-1] + 1)
    columns = np.stack([detected[index] for index in known]).T
    between = [np.interp(frames, known, column) for column in columns]
    return FaceTrack(known[0], np.stack(between, 1))


def iou(first: Boxes, second: Boxes) -> float:
    """Return the intersection of two boxes [4] relative to their union."""
    # Boxes that do not overlap have a corner of the intersection on the wrong side.
    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])
    common = float(np.prod(np.maximum(high - low, 0)))
    areas = float(np.prod(first[2:] - first[:2]) + np.prod(second[2:] - second[:2]))
    return common / (areas - common) if areas > common else 0.0


def crop_track(frames: NDArray[np.uint8], track: FaceTrack) -> NDArray[np.uint8]:
    """Return the crops [T, 224, 224, 3] of a track from the frames [N, Y, X, 3] of the video."""
    # Half side and center are smoothed separately.
    sizes = track.boxes[:, 2:] - track.boxes[:, :2]
    centers = (track.boxes[:, 2:] + track.boxes[:, :2]) / 2
    # The published median takes frames outside the track as zero, so the first and last six frames
    # have the median of the frames inside and zeros.
    half, x, y = (medfilt(v, SMOOTHING) for v in (sizes.max(1) / 2, *centers.T))
    places = zip(half.tolist(), x.tolist(), y.tolist(), strict=True)
    shown = frames[track.first : track.last]
    return np.stack([_crop(frame, *place) for frame, place in zip(shown, places, strict=True)])


def _crop(frame: Image, half: float, x: float, y: float) -> Image:
    """Crop one frame, with the published order of rounding: after the padding is added."""
    pad = int(half * (1 + 2 * CROP_SCALE))
    # Coordinates of the frame, rounded as those of the padded frame.
    top, bottom = int(y + pad - half) - pad, int(y + pad + half * (1 + 2 * CROP_SCALE)) - pad
    left, right = (int(x + pad + sign * half * (1 + CROP_SCALE)) - pad for sign in (-1, 1))
    # The published crop ends where its padded frame ends.
    height, width = frame.shape[:2]
    top, left = max(top, -pad), max(left, -pad)
    bottom, right = min(bottom, height + pad), min(right, width + pad)
    # Pad the part that lies within the frame, instead of the frame: the same pixels.
    inside = frame[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    border = (max(-top, 0), max(bottom - height, 0), max(-left, 0), max(right - width, 0))
    padded = cv2.copyMakeBorder(inside, *border, cv2.BORDER_CONSTANT, value=(GRAY,) * 3)
    return np.asarray(cv2.resize(padded, (CROP_PIXELS, CROP_PIXELS)), np.uint8)


def source_frames(count: int, fps: float) -> NDArray[np.int64]:
    """Return which of `count` frames at `fps` each frame at 25 fps shows: the nearest in time."""
    times = np.arange(max(1, round(count * 25 / fps))) / 25
    return np.minimum(np.floor(times * fps + 0.5), count - 1).astype(np.int64)


def main_track(tracks: list[FaceTrack], frames: int) -> FaceTrack | None:
    """Return the track of the largest summed area among those of `frames` frames or more.

    Return None if it has a rival: another such track, of half its size or more, at the same time.
    Raise ValueError for no track of that length.
    """

    def area(track: FaceTrack) -> float:
        return float(np.prod(track.boxes[:, 2:] - track.boxes[:, :2], axis=1).sum())

    # A face that is brief, small or in another scene is no rival.
    main, *others = sorted((t for t in tracks if len(t.boxes) >= frames), key=area, reverse=True)
    rivals = [
        other
        for other in others
        if min(main.last, other.last) > max(main.first, other.first)
        and other.side >= RIVAL * main.side
    ]
    return None if rivals else main


class YuNet:
    """Detects faces in images of any size, of at most 640 pixels on the longer side."""

    def __init__(self, weights: Path) -> None:
        self.weights = weights
        self._detectors: dict[tuple[int, int], FaceDetector] = {}  # by width, height

    def __call__(self, image: Image) -> Rows:
        """Return YuNet's rows with a score of 0.7 or more, in pixels of the image."""
        height, width = image.shape[:2]
        scale = min(1.0, DETECT_PIXELS / max(height, width))
        size = (round(width * scale), round(height * scale))
        # A detector has a fixed size, and building one takes as long as a few images.
        if size not in self._detectors:
            self._detectors[size] = FaceDetector(self.weights, *size)
        if scale < 1:
            image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
        rows = self._detectors[size].detect(image)
        rows[:, :14] /= scale
        return rows
