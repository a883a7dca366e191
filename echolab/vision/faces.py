"""Detect and track faces by YuNet (OpenCV), and lips by MediaPipe's face mesh (tflite, by LiteRT).

mediapipe's wheel conflicts with the dependencies, but the mesh needs only its landmark network and
a crop of the face, rotated so that the eyes are level, 1.5 times the size of the detector's box.
"""

import zipfile
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

CONTINUE_SCORE = 0.7  # minimum score to continue a track; START_SCORE to start one is higher
NMS_IOU = 0.3  # non-maximum suppression of overlapping boxes of one face
MESH_PIXELS = 256
MESH_SCALE = 1.5
MESH_FILE = "face_landmarks_detector.tflite"

# Indices of the 40 lip landmarks of MediaPipe's 478, and the middle of the inner upper, lower lip.
LIPS = [61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 308, 324, 318, 402, 317, 14, 87, 178,
        88, 95, 185, 40, 39, 37, 0, 267, 269, 270, 409, 415, 310, 311, 312, 13, 82, 81, 42, 183, 78,
        191, 80]  # fmt: skip
INNER_LIPS = (13, 14)

# Tracks
START_SCORE = 0.9  # higher than the score of any animal face in our tests
SAME_FACE = 0.3  # minimum IoU of two detections of one face within a few frames
LOST_FRAMES = 5  # a face may be occluded for 0.2 s
BRIEF_FRAMES = 5  # shorter tracks are detector noise
CUT_DIFFERENCE = 27.0  # mean change of hue, saturation and value: PySceneDetect's default
SCENE_PIXELS = (64, 36)

# A row of YuNet's output: box x, y, width, height; right eye, left eye, nose, mouth corners; score.
Row = NDArray[np.float32]  # [15]
Rows = NDArray[np.float32]  # [n, 15]
Image = NDArray[np.uint8]  # [Y, X, 3] RGB


class Mesh(NamedTuple):
    """The mouth of one face, in image pixels."""

    lips: NDArray[np.float32]  # [4] x0, y0, x1, y1
    opening: float  # pixels between the inner lips
    presence: float  # confidence, 0 to 1, that there is a face


class FaceDetector:
    """YuNet for images of a fixed size."""

    def __init__(self, weights: Path, width: int, height: int) -> None:
        self.net = cv2.FaceDetectorYN.create(
            str(weights), "", (width, height), CONTINUE_SCORE, NMS_IOU, 100
        )

    def detect(self, image: Image) -> Rows:
        """Return all faces with a score of 0.7 or more."""
        rows = self.net.detect(np.ascontiguousarray(image[..., ::-1]))[1]
        # Copy, since OpenCV's array keeps its working memory alive.
        return np.zeros((0, 15), np.float32) if rows is None else np.array(rows, np.float32)


class FaceMesh:
    """MediaPipe's face mesh of 478 landmarks; `find` uses only those of the mouth."""

    def __init__(self, weights: Path) -> None:
        with zipfile.ZipFile(weights) as bundle:
            model = bundle.read(MESH_FILE)
        self.net = Interpreter(model_content=model, num_threads=1)
        self.net.allocate_tensors()
        self.input = self.net.get_input_details()[0]["index"]
        self.points, self.score = (d["index"] for d in self.net.get_output_details()[:2])

    def find(self, image: Image, face: Row) -> Mesh:
        """Return the mouth of a detected face."""
        points, presence = self.landmarks(image, face)
        lips = points[LIPS]
        upper, lower = points[list(INNER_LIPS)]
        return Mesh(
            np.concatenate([lips.min(0), lips.max(0)]).astype(np.float32),
            float(np.hypot(*(upper - lower))),
            presence,
        )

    def landmarks(self, image: Image, face: Row) -> tuple[NDArray[np.float64], float]:
        """Return all landmarks [478, 2] of a detected face in image pixels, and its presence."""
        # Crop the face, rotated upright, and run the landmark network on the crop.
        to_image = _upright_crop(face)
        crop = cv2.warpAffine(
            image,
            to_image,
            (MESH_PIXELS, MESH_PIXELS),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        )
        self.net.set_tensor(self.input, crop[None].astype(np.float32) / 255)
        self.net.invoke()

        # Map the landmarks back to the image.
        points = self.net.get_tensor(self.points).reshape(-1, 3)[:, :2]
        points = points @ to_image[:, :2].T + to_image[:, 2]
        score = float(self.net.get_tensor(self.score).ravel()[0])
        return points, float(1 / (1 + np.exp(-np.clip(score, -60, 60))))


def _upright_crop(face: Row) -> NDArray[np.float64]:
    """Return the affine map [2, 3] from crop pixels to image pixels."""
    x, y, width, height = face[:4]
    across = face[6:8] - face[4:6]
    angle = np.arctan2(across[1], across[0])
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    side = MESH_SCALE * max(width, height)
    center = np.array([x + width / 2, y + height / 2])
    corner = center - rotation @ np.array([side / 2, side / 2])
    return np.c_[rotation * side / MESH_PIXELS, corner]


def mouth_from_corners(face: Row) -> NDArray[np.float32]:
    """Return a lip box [4] from the detector's mouth corners, for faces without a mesh."""
    (x0, y0), (x1, y1) = sorted(face[10:14].reshape(2, 2).tolist())
    half = 0.5 * float(np.hypot(x1 - x0, y1 - y0))
    middle = (y0 + y1) / 2
    return np.array([x0, middle - 0.6 * half, x1, middle + 0.6 * half], np.float32)


def boxes(rows: Rows) -> NDArray[np.float32]:
    """Return the boxes [n, 4] (x0, y0, x1, y1) of detector rows."""
    return np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:4]], 1)


# Tracks: one face in consecutive frames of a scene


class Track(NamedTuple):
    """One face in consecutive frames."""

    first: int
    rows: Rows  # [frames, 15] YuNet's rows, interpolated between the detections

    @property
    def last(self) -> int:
        """Index of the frame after the end of the track."""
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
        """End all tracks, since a new scene begins at `frame`."""
        for detected in self.open:
            self._close(detected, frame)
        self.open = []

    def add(self, frame: int, rows: Rows) -> None:
        """Add the detections of `frame`, which must be later than all previous frames."""
        # Close tracks whose face has not been detected for too long.
        kept = []
        for detected in self.open:
            if frame - max(detected) <= LOST_FRAMES:
                kept.append(detected)
            else:
                self._close(detected, max(detected) + 1)
        self.open = kept
        # Match detections to tracks, the longest first; unmatched detections may start a track.
        free = list(range(len(rows)))
        for detected in sorted(kept, key=lambda detected: -len(detected)):
            last = detected[max(detected)]
            overlaps = [_iou(last, rows[i]) for i in free]
            if overlaps and max(overlaps) > SAME_FACE:
                detected[frame] = rows[free.pop(int(np.argmax(overlaps)))]
        self.open += [{frame: rows[i]} for i in free if rows[i, 14] >= START_SCORE]

    def finish(self, frames: int, every: int) -> list[Track]:
        """Return the tracks of a video of `frames` frames, with detections every `every` frames."""
        for detected in self.open:
            # Extend tracks that reach the last detection up to the end of the video.
            last = max(detected)
            self._close(detected, min(last + every, frames) if frames - last <= every else last + 1)
        self.open = []
        return [track for track in self.closed if len(track.rows) > BRIEF_FRAMES]

    def _close(self, detected: dict[int, NDArray[np.float32]], end: int) -> None:
        """Store a track up to frame `end`, with rows interpolated between its detections."""
        frames_detected = sorted(detected)
        end = min(end, frames_detected[-1] + LOST_FRAMES)
        frames = np.arange(frames_detected[0], max(end, frames_detected[-1] + 1))
        detections = np.stack([detected[frame] for frame in frames_detected])
        rows = np.stack([np.interp(frames, frames_detected, column) for column in detections.T], 1)
        self.closed.append(Track(frames_detected[0], rows.astype(np.float32)))


def _iou(row_a: Row, row_b: Row) -> float:
    a, b = boxes(row_a[None])[0], boxes(row_b[None])[0]
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    intersection = float(width * height)
    return intersection / float(row_a[2] * row_a[3] + row_b[2] * row_b[3] - intersection)
