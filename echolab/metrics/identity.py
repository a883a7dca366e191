"""CSIM: does the face of a generated video stay the person of the reference image?

The score is the cosine of ArcFace embeddings of generated frames and of the reference image, or of
the recorded frames of the same time.  Papers do not say which network they used, and values of two
networks cannot be compared: the card names the network and its file.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echolab.encoders.files import sha256_of
from echolab.errors import ConfigError, WeightsError
from echolab.metrics.card import Card
from echolab.metrics.metric import Score, VideoClip, VideoMetric, mean_score
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
from echolab.metrics.weights import ARCFACE, MOBILEFACENET
from echolab.model_files import ModelFile, find_model_file
from echolab.vision.faces import Image, Row

FACE_PIXELS = 112
# The five landmarks in an aligned face, as ArcFace's authors published them: eyes, nose, corners of
# the mouth, from left to right in the image.
TEMPLATE = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)


class FaceNetwork(NamedTuple):
    """A released ArcFace network and the scaling of its RGB input, (x - mean) / std."""

    file: ModelFile
    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
CENTERED = ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5))

# insightface publishes no sha256 of the file in its archive.
GLINT = ModelFile(
    "glintr100.onnx",
    0,
    "",
    ("https://github.com/deepinsight/insightface/releases/download/v0.7/antelopev2.zip",),
    ARCFACE.license,
)
# By file name, since the files have no field that says how to scale their input.
NETWORKS = {
    network.file.name: network
    for network in (
        FaceNetwork(MOBILEFACENET, "MobileFaceNet, MS1M (foamliu)", *IMAGENET),
        FaceNetwork(ARCFACE, "ArcFace R50, WebFace600K (insightface buffalo_l)", *CENTERED),
        FaceNetwork(GLINT, "ArcFace R100, Glint360K (insightface antelopev2)", *CENTERED),
    )
}


def fit_similarity(source: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the similarity transform [2, 3] that maps points [n, 2] to points with least squares.

    Umeyama (1991): rotation, uniform scale and shift, without a reflection.
    """
    # In complex numbers a rotation with scale is one factor, so least squares has a closed form.
    z, w = (points[:, 0] + 1j * points[:, 1] for points in (source, target))
    centered = z - z.mean()
    factor = (np.conj(centered) * (w - w.mean())).sum() / (np.abs(centered) ** 2).sum()
    shift = w.mean() - factor * z.mean()
    return np.array(
        [[factor.real, -factor.imag, shift.real], [factor.imag, factor.real, shift.imag]]
    )


def align_face(image: Image, row: Row) -> Image:
    """Return the face [112, 112, 3] of YuNet's row, warped to ArcFace's template."""
    # YuNet lists the landmarks in the order of the template.
    landmarks = row[4:14].reshape(5, 2).astype(np.float64)
    to_template = fit_similarity(landmarks, TEMPLATE)
    face = cv2.warpAffine(image, to_template, (FACE_PIXELS, FACE_PIXELS), flags=cv2.INTER_LINEAR)
    return np.asarray(face, np.uint8)


class FaceEmbedder:
    """Embeds the one face of images by ArcFace."""

    def __init__(self, face: OneFace, weights: Path) -> None:
        """Read an ONNX file of a known name.  Raise WeightsError for others."""
        if weights.name not in NETWORKS:
            raise WeightsError(
                f"{weights}: not a known face network; name the file {', '.join(NETWORKS)}"
            )
        self.face, self.network = face, NETWORKS[weights.name]
        self.sha256 = sha256_of([weights])
        try:
            self.net = cv2.dnn.readNetFromONNX(str(weights))
        except cv2.error as error:
            raise WeightsError(f"{weights}: not a readable ONNX file; replace it") from error

    def embed(self, image: Image, row: Row) -> NDArray[np.float64]:
        """Return the unit embedding [D] of one detected face."""
        face = align_face(image, row).astype(np.float32)
        mean, std = (np.array(v, np.float32) for v in (self.network.mean, self.network.std))
        scaled = (face - mean) / std
        self.net.setInput(np.ascontiguousarray(scaled.transpose(2, 0, 1)[None]))
        # Networks end without normalization; cosines need unit vectors.
        embedding = np.asarray(self.net.forward(), np.float64).ravel()
        return embedding / np.linalg.norm(embedding)

    def in_image(self, frame: Tensor, box: Tensor | None = None) -> NDArray[np.float64] | str:
        """Return the embedding [D] of the face in a frame [3, Y, X], or why there is none."""
        image = image_of(frame)
        row = self.face.in_image(image, box)
        return row if isinstance(row, str) else self.embed(image, row)

    def in_frames(
        self, frames: Tensor, indices: Sequence[int], tracked: Tensor | None = None
    ) -> NDArray[np.float64] | str:
        """Return embeddings [K, D] of selected frames, NaN for frames without a face, or the reason
        why the clip has none.
        """
        rows = self.face.in_frames(frames, indices, tracked)
        if isinstance(rows, str):
            return rows
        # Rows of NaN keep the frames of two videos aligned.
        vectors = [
            None if row is None else self.embed(image_of(frames[i]), row)
            for i, row in zip(indices, rows, strict=True)
        ]
        dim = next(len(vector) for vector in vectors if vector is not None)
        return np.stack([np.full(dim, np.nan) if v is None else v for v in vectors])


def identity_card(embedder: FaceEmbedder, name: str, definition: str, every: int) -> Card:
    """Return the card of a score that is made of face embeddings."""
    return Card(
        metric=name,
        definition=definition,
        preprocessing=f"{DETECTION}; five landmarks to ArcFace's 112 px template, bilinear",
        network=embedder.network.name,
        weights=embedder.sha256,
        license=embedder.network.file.license,
        settings={"every": every, "min_face_share": MIN_SHARE, "mean": embedder.network.mean},
    )


class Csim(VideoMetric):
    """Cosine similarity of generated frames and the reference image, `csim`; higher is better.

    `csim_faces` is the share of frames with a face; the others do not enter `csim`.
    """

    NO_REFERENCE = "no reference image"
    REFERENCE = "not one face in the reference"
    reasons = (NO_FACE, SEVERAL_FACES, NO_REFERENCE, REFERENCE)

    def __init__(self, num_clips: int, embedder: FaceEmbedder, every: int = 5) -> None:
        """Score every fifth frame by default."""
        super().__init__(num_clips)
        self.embedder, self.every = embedder, every
        self.add_table("similarity")
        self.add_table("share")

    similarity: Tensor
    share: Tensor

    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Store the mean cosine and the share of frames with a face."""
        if clip.reference is None:
            return self.NO_REFERENCE
        reference = self.embedder.in_image(clip.reference)
        # A reference with several people is decided by the tracked box, if it has the same size.
        if isinstance(reference, str) and clip.face is not None:
            if clip.reference.shape == clip.frames.shape[1:] and len(clip.face):
                reference = self.embedder.in_image(clip.reference, clip.face[0])
        if isinstance(reference, str):
            return self.REFERENCE
        indices = range(0, len(clip.frames), self.every)
        embeddings = self.embedder.in_frames(clip.frames, indices, clip.face)
        if isinstance(embeddings, str):
            return embeddings
        # NaN marks frames without a face.
        cosines = torch.from_numpy(embeddings @ reference)
        self.similarity[index] = cosines.nanmean()
        self.share[index] = cosines.isfinite().double().mean()
        return ""

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the means over clips."""
        return {
            "csim": mean_score(self.similarity[scored]),
            "csim_faces": mean_score(self.share[scored]),
        }

    def cards(self) -> dict[str, Card]:
        """Return the cards of both scores."""
        csim = (
            "mean over frames with a face, then over clips, of the cosine of ArcFace embeddings of "
            "the frame and of the reference image"
        )
        faces = "share of scored frames with a face, mean over clips"
        return {
            "csim": identity_card(self.embedder, "csim", csim, self.every),
            "csim_faces": identity_card(self.embedder, "csim_faces", faces, self.every),
        }


class CsimTruth(VideoMetric):
    """Cosine similarity of generated and recorded frames of the same time, `csim_truth`."""

    NO_TRUTH = "no recorded video"
    LENGTH = "recorded video of another length"
    TRUTH = "not one face in the recorded video"
    reasons = (NO_FACE, SEVERAL_FACES, NO_TRUTH, LENGTH, TRUTH)

    def __init__(self, num_clips: int, embedder: FaceEmbedder, every: int = 5) -> None:
        """Score every fifth frame by default."""
        super().__init__(num_clips)
        self.embedder, self.every = embedder, every
        self.add_table("similarity")

    similarity: Tensor

    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Store the mean cosine over frames in which both videos show a face."""
        if clip.truth is None:
            return self.NO_TRUTH
        if len(clip.truth) != len(clip.frames):
            return self.LENGTH
        indices = range(0, len(clip.frames), self.every)
        generated = self.embedder.in_frames(clip.frames, indices, clip.face)
        if isinstance(generated, str):
            return generated
        recorded = self.embedder.in_frames(clip.truth, indices)
        if isinstance(recorded, str):
            return self.TRUTH
        # Each video may lack a face in a fifth of the frames; at least 60 % remain.
        self.similarity[index] = float(np.nanmean((generated * recorded).sum(1)))
        return ""

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the mean over clips."""
        return {"csim_truth": mean_score(self.similarity[scored])}

    def cards(self) -> dict[str, Card]:
        """Return the card."""
        definition = (
            "mean over frames with a face, then over clips, of the cosine of ArcFace embeddings of "
            "generated and recorded frames of the same time"
        )
        return {"csim_truth": identity_card(self.embedder, "csim_truth", definition, self.every)}


# -- the functions that a configuration names ------------------------------------------------------


@lru_cache(maxsize=2)  # metrics of one evaluation share it
def load_embedder(folder: Path | None, network: str) -> FaceEmbedder:
    """Return a released face network by its file name.

    Raise ConfigError for an unknown name, and MissingWeightsError without its file.
    """
    if network not in NETWORKS:
        raise ConfigError(f"network={network}: not a face network; give {', '.join(NETWORKS)}")
    path = find_model_file(NETWORKS[network].file, folder, setting="metrics.networks")
    return FaceEmbedder(load_one_face(folder), path)


def csim(setup: Setup, *, network: str = MOBILEFACENET.name, every: int = 5) -> VideoMetric:
    """Build CSIM against the reference image."""
    return Csim(setup.num_clips, load_embedder(setup.networks, network), every)


def csim_truth(setup: Setup, *, network: str = MOBILEFACENET.name, every: int = 5) -> VideoMetric:
    """Build CSIM against the recorded video."""
    return CsimTruth(setup.num_clips, load_embedder(setup.networks, network), every)
