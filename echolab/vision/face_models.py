"""The two face models: find their files, check the sha256, download missing files.

Search order: the given folder or else ECHOLAB_WEIGHTS, ./weights, ../shared/weights,
~/.cache/echolab/weights, then the public URL, which is downloaded to the cache.
"""

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from echolab.atomic_io import write_atomic
from echolab.errors import WeightsError

CACHE = Path("~/.cache/echolab/weights")
USUAL_FOLDERS = (Path("weights"), Path("../shared/weights"))  # relative to the working directory
TIMEOUT_SECONDS = 30


class FaceModel(NamedTuple):
    """A model file with pinned size and sha256."""

    name: str
    bytes: int
    sha256: str
    urls: tuple[str, ...]


# YuNet, Apache-2.0; its boxes agree with EchoMimicV3's published face masks (median IoU 0.93).
YUNET = FaceModel(
    "yunet_n_640_640.onnx",
    317466,
    "25a606a145a5b6d7271ae138fbd00eba91dad8b83222ae3f2c7ecd0f4a7b0e31",
    (
        "https://github.com/ShiqiYu/libfacedetection.train/raw/0047ac24afb1/onnx/yunet_n_640_640.onnx",
        "https://github.com/ShiqiYu/libfacedetection.train/raw/master/onnx/yunet_n_640_640.onnx",
    ),
)
# MediaPipe's face landmarker, Apache-2.0: a zip of tflite files.
LANDMARKER = FaceModel(
    "face_landmarker_v2_with_blendshapes.task",
    3758596,
    "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff",
    (
        "https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/1/face_landmarker.task",
    ),
)


def find_face_model(model: FaceModel, folder: Path | None = None) -> Path:
    """Return the path of the verified model file; download it if needed.

    Raise WeightsError if no folder or URL has the file, or if its sha256 differs.
    """
    # A requested folder must exist, since the user expects the models to come from it.
    given = folder or os.environ.get("ECHOLAB_WEIGHTS")
    cache = CACHE.expanduser()
    folders = [*USUAL_FOLDERS, cache]
    if given:
        folders.insert(0, Path(given).expanduser())
        if not folders[0].is_dir():
            raise WeightsError(
                f"{folders[0]}: no such folder; give face_models=FOLDER or ECHOLAB_WEIGHTS"
            )
    for candidate in folders:
        if (candidate / model.name).is_file():
            return _verify_file(candidate / model.name, model)
    # Download the file to the cache, for all later runs too.
    cache.mkdir(parents=True, exist_ok=True)
    write_atomic(cache / model.name, _download(model, cache))
    return cache / model.name


def _verify_file(path: Path, model: FaceModel) -> Path:
    """Return `path`; raise WeightsError unless its sha256 is the pinned one."""
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 != model.sha256:
        raise WeightsError(
            f"{path}: sha256 {sha256[:16]}..., need {model.sha256[:16]}...; "
            f"replace it from {model.urls[-1]}, or remove it to have it downloaded"
        )
    return path


def _download(model: FaceModel, cache: Path) -> bytes:
    """Return the content of a model file; raise WeightsError if no URL serves it."""
    problem = ""
    for url in model.urls:
        try:
            # Read at most one byte more than expected: enough to detect a longer file.
            with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
                data: bytes = response.read(model.bytes + 1)
        except (OSError, urllib.error.URLError, ValueError) as error:
            problem = str(getattr(error, "reason", error))
            continue
        if hashlib.sha256(data).hexdigest() == model.sha256:
            return data
        problem = "its file differs from the pinned one"
    raise WeightsError(
        f"{model.name}: not in a models folder, and {model.urls[-1]} cannot be used "
        f"({problem}); put the file into {cache} or give face_models=FOLDER"
    )
