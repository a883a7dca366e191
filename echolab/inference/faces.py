"""Find the boxes of one face and its lips, in an image or through a video."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from echolab.errors import MediaError
from echolab.vision.face_models import LANDMARKER, YUNET, find_face_model
from echolab.vision.faces import (
    FaceDetector,
    FaceMesh,
    Image,
    Row,
    Tracker,
    boxes,
    mouth_from_corners,
)
from echolab.vision.video_reader import Probe, VideoReader

DETECT_PIXELS = 640  # longer side of the image that the detector sees
# A second face with at least this score and fraction of the largest face makes an image ambiguous.
SECOND_SCORE, SECOND_FRACTION = 0.9, 0.5
# Used for a box that the user gives instead of a detection.
LIPS_IN_FACE = (0.25, 0.62, 0.75, 0.92)  # typical lip box, in fractions of the face box

Boxes = NDArray[np.float32]  # [T, 4] x0, y0, x1, y1


def lips_in(face: tuple[float, ...]) -> tuple[float, ...]:
    """Return the typical lip box within a face's box, for faces that are not detected."""
    x, y, width, height = face[0], face[1], face[2] - face[0], face[3] - face[1]
    left, top, right, bottom = LIPS_IN_FACE
    return (x + left * width, y + top * height, x + right * width, y + bottom * height)


def face_around(lips: tuple[float, ...]) -> tuple[float, ...]:
    """Return the typical face box around a lip box: the inverse of `lips_in`."""
    left, top, right, bottom = LIPS_IN_FACE
    width, height = (lips[2] - lips[0]) / (right - left), (lips[3] - lips[1]) / (bottom - top)
    x, y = lips[0] - left * width, lips[1] - top * height
    return (x, y, x + width, y + height)


def lips_of(mesh: FaceMesh, image: Image, row: Row) -> NDArray[np.float32]:
    """Return the lip box [4] of one face, from the mesh if it is valid, else from the detector."""
    mouth = mesh.find(image, row)
    return mouth.lips if mouth.presence > 0.5 else mouth_from_corners(row)


def find_face(image: Image, name: Path, face_models: Path | None) -> tuple[Boxes, Boxes]:
    """Return boxes [1, 4] of the face and its lips.  Raise MediaError unless there is one face."""
    scale = DETECT_PIXELS / max(image.shape[:2])
    size = tuple(round(side * scale) for side in image.shape[1::-1])
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    scaled = np.ascontiguousarray(cv2.resize(image, size, interpolation=interpolation), np.uint8)
    yunet = find_face_model(YUNET, face_models)
    rows = FaceDetector(yunet, scaled.shape[1], scaled.shape[0]).detect(scaled)

    # Choose the largest face, unless another face is nearly as large.
    rows = rows[rows[:, 3].argsort()[::-1]]
    others = [
        row
        for row in rows[1:]
        if row[-1] >= SECOND_SCORE and row[3] >= SECOND_FRACTION * rows[0, 3]
    ]
    if len(rows) == 0 or others:
        count = f"{1 + len(others)} faces" if others else "no face"
        raise MediaError(f"{name}: {count} in it, need 1; give another image, or face=x0,y0,x1,y1")
    lips = lips_of(FaceMesh(find_face_model(LANDMARKER, face_models)), scaled, rows[0])
    return boxes(rows[:1]) / scale, lips[None] / scale


def follow_face(
    probe: Probe, indices: NDArray[np.int64], face_models: Path | None
) -> tuple[Boxes, Boxes]:
    """Return boxes [T, 4] of the largest face in all frames `indices` of a video, and its lips.

    Raise MediaError if no face is in all of these frames.
    """
    # Detect in a smaller copy of each frame.
    scale = min(1.0, DETECT_PIXELS / max(probe.width, probe.height))
    width, height = round(probe.width * scale), round(probe.height * scale)
    detector = FaceDetector(find_face_model(YUNET, face_models), width, height)
    tracker, reader = Tracker(), VideoReader(probe, width, height)
    for k, image in enumerate(reader.read(indices)):
        tracker.add(k, detector.detect(image))

    # Only a face in every frame can be regenerated.
    tracks = tracker.finish(len(indices), 1)
    complete = [t for t in tracks if t.first == 0 and t.last >= len(indices)]
    if not complete:
        longest = max((len(t.rows) for t in tracks), default=0)
        raise MediaError(
            f"{probe.path}: no face is in all {len(indices)} frames (at most in {longest}); "
            "give box=x0,y0,x1,y1, or fewer seconds="
        )
    rows = max(complete, key=lambda track: float(track.rows[:, 3].mean())).rows
    mesh = FaceMesh(find_face_model(LANDMARKER, face_models))
    lips = [lips_of(mesh, i, r) for i, r in zip(reader.read(indices), rows, strict=True)]
    return boxes(rows) / scale, np.stack(lips) / scale
