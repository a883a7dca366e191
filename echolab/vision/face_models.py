"""The two model files of the preparation: looked up, checked, and fetched when absent.

Order: the folder of the option, the folder in ECHOLAB_WEIGHTS, ./weights, ../shared/weights,
~/.cache/echolab/weights, then the public address, which fills the cache.  A file counts only when
its sha256 is the pinned one.
"""

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from echolab.atomic_io import write_whole
from echolab.errors import WeightsError

CACHE = Path("~/.cache/echolab/weights")
USUAL = (Path("weights"), Path("../shared/weights"))  # of the working folder
TIMEOUT_SECONDS = 30


class Weight(NamedTuple):
    """A file that is known byte for byte."""

    name: str
    bytes: int
    sha256: str
    addresses: tuple[str, ...]


# YuNet, Apache-2.0; its boxes agree with EchoMimicV3's published face masks (median IoU 0.93).
YUNET = Weight(
    "yunet_n_640_640.onnx",
    317466,
    "25a606a145a5b6d7271ae138fbd00eba91dad8b83222ae3f2c7ecd0f4a7b0e31",
    (
        "https://github.com/ShiqiYu/libfacedetection.train/raw/0047ac24afb1/onnx/yunet_n_640_640.onnx",
        "https://github.com/ShiqiYu/libfacedetection.train/raw/master/onnx/yunet_n_640_640.onnx",
    ),
)
# MediaPipe's face landmarker, Apache-2.0: a zip of tflite files.
LANDMARKER = Weight(
    "face_landmarker_v2_with_blendshapes.task",
    3758596,
    "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff",
    (
        "https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/1/face_landmarker.task",
    ),
)


def find_weight(weight: Weight, folder: Path | None = None) -> Path:
    """Path of the checked file; raises WeightsError with what to put where."""
    given = folder or os.environ.get("ECHOLAB_WEIGHTS")
    cache = CACHE.expanduser()
    for place in [Path(given).expanduser()] if given else []:
        if not place.is_dir():
            raise WeightsError(f"{place}: no such folder; give weights=FOLDER or ECHOLAB_WEIGHTS")
        if (place / weight.name).is_file():
            return _checked(place / weight.name, weight)
    for place in (*USUAL, cache):
        if (place / weight.name).is_file():
            return _checked(place / weight.name, weight)
    cache.mkdir(parents=True, exist_ok=True)
    write_whole(cache / weight.name, _fetch(weight, cache))
    return cache / weight.name


def _checked(path: Path, weight: Weight) -> Path:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != weight.sha256:
        raise WeightsError(
            f"{path}: sha256 {found[:16]}..., need {weight.sha256[:16]}...; "
            f"replace it from {weight.addresses[-1]}, or remove it to have it fetched"
        )
    return path


def _fetch(weight: Weight, cache: Path) -> bytes:
    problem = ""
    for address in weight.addresses:
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as answer:
                data: bytes = answer.read(weight.bytes + 1)
        except (OSError, urllib.error.URLError, ValueError) as error:
            problem = str(getattr(error, "reason", error))
            continue
        if hashlib.sha256(data).hexdigest() == weight.sha256:
            return data
        problem = "it serves another file than the pinned one"
    raise WeightsError(
        f"{weight.name}: not in a weights folder, and {weight.addresses[-1]} cannot be used "
        f"({problem}); put the file into {cache} or give weights=FOLDER"
    )
