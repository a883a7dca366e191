"""Faces by YuNet (OpenCV), lips by MediaPipe's face mesh (its tflite file run by LiteRT).

mediapipe's own wheel does not fit the dependencies; the mesh needs only its landmark network and a
crop of the face, rotated upright by the eyes, 1.5 times the size of the detector's box.
"""

import zipfile
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

CONTINUE_SCORE = 0.7  # continues a track; one starts at 0.9, above the score of any dog seen
NMS_IOU = 0.3  # of two boxes of one face: the weaker is suppressed
MESH_PIXELS = 256
MESH_SCALE = 1.5
MESH_FILE = "face_landmarks_detector.tflite"

# The 40 lip points of MediaPipe's 478, and the middle of the inner upper and lower lip.
LIPS = [61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 308, 324, 318, 402, 317, 14, 87, 178,
        88, 95, 185, 40, 39, 37, 0, 267, 269, 270, 409, 415, 310, 311, 312, 13, 82, 81, 42, 183, 78,
        191, 80]  # fmt: skip
INNER_LIPS = (13, 14)

# A row of YuNet: box x, y, width, height; right eye, left eye, nose, mouth corners; score.
Row = NDArray[np.float32]  # [15]
Rows = NDArray[np.float32]  # [n, 15]
Image = NDArray[np.uint8]  # [Y, X, 3] RGB


class Mesh(NamedTuple):
    """The mouth of one face, in the pixels of the image."""

    lips: NDArray[np.float32]  # [4] x0, y0, x1, y1
    opening: float  # pixels between the inner lips
    presence: float  # 0 to 1: confidence that there is a face


class FaceDetector:
    """YuNet for images of one size."""

    def __init__(self, weights: Path, width: int, height: int) -> None:
        self.net = cv2.FaceDetectorYN.create(
            str(weights), "", (width, height), CONTINUE_SCORE, NMS_IOU, 100
        )

    def detect(self, image: Image) -> Rows:
        """Return all faces of score 0.7 or more."""
        rows = self.net.detect(np.ascontiguousarray(image[..., ::-1]))[1]
        # A copy: OpenCV's own array keeps its working memory alive.
        return np.zeros((0, 15), np.float32) if rows is None else np.array(rows, np.float32)


class FaceMesh:
    """MediaPipe's 478 face landmarks, of which the mouth is used."""

    def __init__(self, weights: Path) -> None:
        with zipfile.ZipFile(weights) as bundle:
            model = bundle.read(MESH_FILE)
        self.net = Interpreter(model_content=model, num_threads=1)
        self.net.allocate_tensors()
        self.input = self.net.get_input_details()[0]["index"]
        self.points, self.score = (d["index"] for d in self.net.get_output_details()[:2])

    def find(self, image: Image, face: Row) -> Mesh:
        """Return the mouth of the face that a detector's row describes."""
        # Crop the face upright and run the landmark network on it.
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
        lips = points[LIPS]
        upper, lower = points[list(INNER_LIPS)]
        score = float(self.net.get_tensor(self.score).ravel()[0])
        return Mesh(
            np.concatenate([lips.min(0), lips.max(0)]).astype(np.float32),
            float(np.hypot(*(upper - lower))),
            float(1 / (1 + np.exp(-np.clip(score, -60, 60)))),
        )


def _upright_crop(face: Row) -> NDArray[np.float64]:
    """Return the affine map [2, 3] from the pixels of the crop to those of the image."""
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
    """Return boxes [n, 4], x0, y0, x1, y1, of a detector's rows."""
    return np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:4]], 1)
