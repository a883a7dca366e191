"""Expressions of generated and recorded faces: a Frechet distance of blendshapes.

E-FID (EMO, 2024) is the Frechet distance of 64 expression coefficients of a 3-D face reconstruction
whose face model has a restricted license.  This variant uses the blendshapes of MediaPipe's face
landmarker (Apache-2.0), and therefore has a name of its own: its values cannot be compared with
published E-FID.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray
from torch import Tensor

from echolab.encoders.files import sha256_of
from echolab.errors import WeightsError
from echolab.metrics.card import Card
from echolab.metrics.frechet import frechet_distance
from echolab.metrics.metric import Score, VideoClip, VideoMetric
from echolab.metrics.one_face import (
    DETECTION,
    MIN_SHARE,
    NO_FACE,
    SEVERAL_FACES,
    OneFace,
    image_of,
    load_one_face,
)
from echolab.metrics.setup import Setup
from echolab.model_files import find_model_file
from echolab.vision.face_models import LANDMARKER
from echolab.vision.faces import FaceMesh, Image, Row

BLENDSHAPE_FILE = "face_blendshapes.tflite"
BLENDSHAPES = 51  # MediaPipe's 52 without the first, "_neutral", which carries no expression
FRAMES = 16  # per clip, evenly spaced: neighboring frames have nearly the same expression
PRESENCE = 0.5  # minimum confidence of the mesh
JAW_OPEN = 24  # column of "jawOpen"

# The landmarks of the 478 that the blendshape network reads, from MediaPipe's graph
# face_blendshapes_graph.cc.
INPUTS = [
    0, 1, 4, 5, 6, 7, 8, 10, 13, 14, 17, 21, 33, 37, 39, 40, 46, 52, 53, 54, 55, 58, 61, 63, 65,
    66, 67, 70, 78, 80, 81, 82, 84, 87, 88, 91, 93, 95, 103, 105, 107, 109, 127, 132, 133, 136,
    144, 145, 146, 148, 149, 150, 152, 153, 154, 155, 157, 158, 159, 160, 161, 162, 163, 168, 172,
    173, 176, 178, 181, 185, 191, 195, 197, 234, 246, 249, 251, 263, 267, 269, 270, 276, 282, 283,
    284, 285, 288, 291, 293, 295, 296, 297, 300, 308, 310, 311, 312, 314, 317, 318, 321, 323, 324,
    332, 334, 336, 338, 356, 361, 362, 365, 373, 374, 375, 377, 378, 379, 380, 381, 382, 384, 385,
    386, 387, 388, 389, 390, 397, 398, 400, 402, 405, 409, 415, 454, 466, 468, 469, 470, 471, 472,
    473, 474, 475, 476, 477,
]  # fmt: skip


class Blendshapes:
    """MediaPipe's blendshapes of detected faces, from landmarks of its face mesh."""

    def __init__(self, landmarker: Path) -> None:
        """Read the networks of a .task file.  Raise WeightsError if it has no blendshapes."""
        try:
            with zipfile.ZipFile(landmarker) as bundle:
                model = bundle.read(BLENDSHAPE_FILE)
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise WeightsError(
                f"{landmarker}: no blendshapes in it; use face_landmarker_v2_with_blendshapes.task"
            ) from error
        # The bundle holds both networks: landmarks first, blendshapes from landmarks.
        self.mesh = FaceMesh(landmarker)
        self.net = Interpreter(model_content=model, num_threads=1)
        self.net.allocate_tensors()
        self.input = self.net.get_input_details()[0]["index"]
        self.output = self.net.get_output_details()[0]["index"]
        self.sha256 = sha256_of([landmarker])

    def of_landmarks(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the blendshapes [51], 0 to 1, of landmarks [478, 2] in pixels."""
        self.net.set_tensor(self.input, points[INPUTS][None].astype(np.float32))
        self.net.invoke()
        return np.asarray(self.net.get_tensor(self.output), np.float64).ravel()[1:]

    def of_face(self, image: Image, row: Row) -> NDArray[np.float64] | None:
        """Return the blendshapes [51] of a detected face; None if the mesh does not confirm it."""
        points, presence = self.mesh.landmarks(image, row)
        return self.of_landmarks(points) if presence > PRESENCE else None


class EfidBlendshapes(VideoMetric):
    """Frechet distance of blendshapes, generated against recorded, `efid_blendshapes`."""

    NO_TRUTH = "no recorded video"
    TRUTH = "not one face in the recorded video"
    reasons = (NO_FACE, SEVERAL_FACES, NO_TRUTH, TRUTH)

    def __init__(self, num_clips: int, face: OneFace, blendshapes: Blendshapes) -> None:
        super().__init__(num_clips)
        self.face, self.blendshapes = face, blendshapes
        # The last column is 1 for frames with a face.
        self.add_table("generated", FRAMES, BLENDSHAPES + 1)
        self.add_table("recorded", FRAMES, BLENDSHAPES + 1)

    generated: Tensor
    recorded: Tensor

    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Store the blendshapes of both videos."""
        if clip.truth is None:
            return self.NO_TRUTH
        generated = self._features(clip.frames, clip.face)
        if isinstance(generated, str):
            return generated
        recorded = self._features(clip.truth, None)
        if isinstance(recorded, str):
            return self.TRUTH
        self.generated[index], self.recorded[index] = generated, recorded
        return ""

    def _features(self, frames: Tensor, tracked: Tensor | None) -> Tensor | str:
        """Return the row of a table [16, 52] of one video, or why it has none."""
        if not len(frames):
            return NO_FACE
        # A video of fewer frames uses each frame once.
        indices = sorted(set(np.linspace(0, len(frames) - 1, FRAMES).round().astype(int).tolist()))
        rows = self.face.in_frames(frames, indices, tracked)
        if isinstance(rows, str):
            return rows
        # Frames without a face stay zero, and are left out of the distance by the last column.
        features = torch.zeros(FRAMES, BLENDSHAPES + 1, dtype=torch.float64)
        for k, (i, row) in enumerate(zip(indices, rows, strict=True)):
            shapes = None if row is None else self.blendshapes.of_face(image_of(frames[i]), row)
            if shapes is not None:
                features[k, :-1], features[k, -1] = torch.from_numpy(shapes), 1.0
        return features if features[:, -1].sum() >= MIN_SHARE * len(indices) else NO_FACE

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the distance of the frames of all clips; NaN for fewer than two frames."""
        generated, recorded = (
            table[scored].flatten(0, 1) for table in (self.generated, self.recorded)
        )
        first, second = (rows[rows[:, -1] > 0, :-1] for rows in (generated, recorded))
        if min(len(first), len(second)) < 2:
            return {"efid_blendshapes": Score(float("nan"), flags={"fewer than 2 frames": 1})}
        return {"efid_blendshapes": Score(frechet_distance(first, second))}

    def cards(self) -> dict[str, Card]:
        """Return the card."""
        return {
            "efid_blendshapes": Card(
                metric="efid_blendshapes",
                definition="Frechet distance of blendshapes of generated and recorded frames, "
                "pooled over clips, covariance with 1 / (N - 1); not the published E-FID, which "
                "has 64 coefficients of a 3-D face model",
                preprocessing=f"{DETECTION}; 478 landmarks on a rotated crop of 1.5 boxes, in "
                "pixels of the frame",
                network="MediaPipe face landmarker v2 with blendshapes, 51 without _neutral",
                weights=self.blendshapes.sha256,
                license="Apache-2.0",
                settings={
                    "frames_per_clip": FRAMES,
                    "presence": PRESENCE,
                    "min_face_share": MIN_SHARE,
                },
            )
        }


# -- the functions that a configuration names ------------------------------------------------------


def efid_blendshapes(setup: Setup) -> VideoMetric:
    """Build the distance of blendshapes; raise MissingWeightsError without the face models."""
    path = find_model_file(LANDMARKER, setup.networks, setting="metrics.networks")
    return EfidBlendshapes(setup.num_clips, load_one_face(setup.networks), Blendshapes(path))
