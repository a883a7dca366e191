"""Released model files: find them in the folders of weights, check their sha256, download them.

Search order: the given folder or else ECHOLAB_WEIGHTS, ./weights, ../shared/weights,
~/.cache/echolab/weights.  A missing file is downloaded to the cache only if the caller asks for it,
and only if its sha256 is pinned.
"""

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from echolab.atomic_io import write_atomic
from echolab.errors import MissingWeightsError, WeightsError

CACHE = Path("~/.cache/echolab/weights")
USUAL_FOLDERS = (Path("weights"), Path("../shared/weights"))  # relative to the working directory
TIMEOUT_SECONDS = 30


class ModelFile(NamedTuple):
    """A released model: a file with pinned size and sha256, or a folder of transformers."""

    name: str  # of the file or folder
    bytes: int  # 0 if unknown
    sha256: str  # empty if none is published, as of folders
    urls: tuple[str, ...]  # addresses of the file, or the page of a folder
    license: str = ""


def find_model_file(
    model: ModelFile,
    folder: Path | None = None,
    *,
    setting: str = "ECHOLAB_WEIGHTS",
    download: bool = False,
) -> Path:
    """Return the path of the verified model file, or of the folder of a model of transformers.

    `setting` is the setting that gives `folder`, for messages.  Raise MissingWeightsError if no
    folder has the file and `download` cannot get it; raise WeightsError if its sha256 differs, or
    if a given folder does not exist.
    """
    for candidate in search_folders(folder, setting):
        if (candidate / model.name).exists():
            return _verify(candidate / model.name, model)
    # Only a pinned file may be downloaded, since nothing else can be checked.
    cache = CACHE.expanduser()
    if not download or not model.sha256:
        size = f", {model.bytes / 1e6:.1f} MB" if model.bytes else ""
        raise MissingWeightsError(
            f"{model.name}: not in a folder of weights; get it from {model.urls[0]} "
            f"({model.license or 'license unknown'}{size}) and put it into {cache}, "
            f"or give {setting}=FOLDER"
        )
    cache.mkdir(parents=True, exist_ok=True)
    write_atomic(cache / model.name, _download(model, cache, setting))
    return cache / model.name


def search_folders(folder: Path | None = None, setting: str = "ECHOLAB_WEIGHTS") -> list[Path]:
    """Return the folders of weights in search order; raise WeightsError if a given one is missing.

    A requested folder must exist, since the user expects the models to come from it.
    """
    folders = [*USUAL_FOLDERS, CACHE.expanduser()]
    given = folder or os.environ.get("ECHOLAB_WEIGHTS")
    if given:
        folders.insert(0, Path(given).expanduser())
        if not folders[0].is_dir():
            ways = " or ".join(dict.fromkeys([f"{setting}=FOLDER", "ECHOLAB_WEIGHTS=FOLDER"]))
            raise WeightsError(f"{folders[0]}: no such folder; give {ways}")
    return folders


def _verify(path: Path, model: ModelFile) -> Path:
    """Return `path`; raise WeightsError unless its sha256 is the pinned one, if there is one."""
    if not model.sha256:
        return path
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); copy it again") from error
    if sha256 != model.sha256:
        raise WeightsError(
            f"{path}: sha256 {sha256[:16]}..., need {model.sha256[:16]}...; "
            f"replace it from {model.urls[-1]}, or remove it to have it searched elsewhere"
        )
    return path


def _download(model: ModelFile, cache: Path, setting: str) -> bytes:
    """Return the content of a model file; raise MissingWeightsError if no URL serves it."""
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
    raise MissingWeightsError(
        f"{model.name}: not in a folder of weights, and {model.urls[-1]} cannot be used "
        f"({problem}); put the file into {cache} or give {setting}=FOLDER"
    )
