"""Boxes of the face and the lips: in a picture, or followed through a video."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from echolab.errors import MediaError
from echolab.vision.face_models import LANDMARKER, YUNET, find_weight
from echolab.vision.faces import FaceDetector, FaceMesh, Picture, Row, boxes, mouth_from_corners
from echolab.vision.probe import Probe
from echolab.vision.track import Tracker
from echolab.vision.video_reader import VideoReader

DETECT_PIXELS = 640  # the longer side of the picture that the detector gets
SURE, RIVAL = 0.9, 0.5  # another face counts from this score, and this share of the largest
LIPS_IN_FACE = (0.25, 0.62, 0.75, 0.92)  # where lips lie in a face's box, in sizes of the box

Boxes = NDArray[np.float32]  # [T, 4] x0, y0, x1, y1


def lips_in(face: tuple[float, ...]) -> tuple[float, ...]:
    """Where the lips of a face's box are, when nobody has looked."""
    x, y, across, down = face[0], face[1], face[2] - face[0], face[3] - face[1]
    left, top, right, bottom = LIPS_IN_FACE
    return (x + left * across, y + top * down, x + right * across, y + bottom * down)


def face_around(lips: tuple[float, ...]) -> tuple[float, ...]:
    """The inverse: the face's box that a box of lips belongs to."""
    left, top, right, bottom = LIPS_IN_FACE
    across, down = (lips[2] - lips[0]) / (right - left), (lips[3] - lips[1]) / (bottom - top)
    x, y = lips[0] - left * across, lips[1] - top * down
    return (x, y, x + across, y + down)


def lips_of(mesh: FaceMesh, picture: Picture, row: Row) -> NDArray[np.float32]:
    """[4] the lips of one face, from the mesh where it fits."""
    found = mesh.find(picture, row)
    return found.lips if found.presence > 0.5 else mouth_from_corners(row)


def find_face(picture: Picture, name: Path, weights: Path | None) -> tuple[Boxes, Boxes]:
    """Boxes [1, 4] of the one face and its lips; MediaError where there is none or more."""
    scale = DETECT_PIXELS / max(picture.shape[:2])
    size = tuple(round(side * scale) for side in picture.shape[1::-1])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    scaled = np.ascontiguousarray(cv2.resize(picture, size, interpolation=how), np.uint8)
    yunet = find_weight(YUNET, weights)
    rows = FaceDetector(yunet, scaled.shape[1], scaled.shape[0]).detect(scaled)
    rows = rows[rows[:, 3].argsort()[::-1]]  # the largest first
    rivals = [row for row in rows[1:] if row[-1] >= SURE and row[3] >= RIVAL * rows[0, 3]]
    if len(rows) == 0 or rivals:
        what = f"{1 + len(rivals)} faces" if rivals else "no face"
        raise MediaError(f"{name}: {what} found, need 1; give another picture, or face=x0,y0,x1,y1")
    lips = lips_of(FaceMesh(find_weight(LANDMARKER, weights)), scaled, rows[0])
    return boxes(rows[:1]) / scale, lips[None] / scale


def follow_face(
    found: Probe, numbers: NDArray[np.int64], weights: Path | None
) -> tuple[Boxes, Boxes]:
    """Boxes [T, 4] of the largest face that is seen in all frames `numbers` of a video."""
    scale = min(1.0, DETECT_PIXELS / max(found.width, found.height))
    width, height = round(found.width * scale), round(found.height * scale)
    detector = FaceDetector(find_weight(YUNET, weights), width, height)
    tracker, reader = Tracker(), VideoReader(found, width, height)
    for k, picture in enumerate(reader.read(numbers)):
        tracker.add(k, detector.detect(picture))
    tracks = tracker.finish(len(numbers), 1)
    whole = [t for t in tracks if t.first == 0 and t.last >= len(numbers)]
    if not whole:
        longest = max((len(t.rows) for t in tracks), default=0)
        raise MediaError(
            f"{found.path}: no face is seen in all {len(numbers)} frames (at most in {longest}); "
            "give box=x0,y0,x1,y1, or fewer seconds="
        )
    rows = max(whole, key=lambda track: float(track.rows[:, 3].mean())).rows
    mesh = FaceMesh(find_weight(LANDMARKER, weights))
    lips = [lips_of(mesh, p, r) for p, r in zip(reader.read(numbers), rows, strict=True)]
    return boxes(rows) / scale, np.stack(lips) / scale
