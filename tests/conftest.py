"""Fixtures that every test may request, in an environment in which nothing uses the network."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: many tiny tensors run faster on one thread than on two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_SILENT", "true")

import pytest
from forked import ForkServer
from hypothesis import settings

settings.register_profile("echolab", deadline=None)  # how busy the machine is proves nothing
settings.load_profile("echolab")

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no worker ends long after the others."""
    slurm = {item.path for item in items if item.get_closest_marker("slurm")}
    items.sort(key=lambda item: item.path not in slurm)


def _folder(variable: str, default: str) -> Path:
    """Return the folder that an environment variable names, or a default one; skip if there is
    none.
    """
    folder = Path(os.environ.get(variable) or ROOT.parent / "shared" / default)
    if not folder.is_dir():
        pytest.skip(f"no {folder}; set {variable}")
    return folder


@pytest.fixture(scope="session")
def media() -> Path:
    """Return the folder of sample images, audio files and videos."""
    return _folder("ECHOLAB_MEDIA", "media")


@pytest.fixture(scope="session")
def weights() -> Path:
    """Return the folder of model files of third parties."""
    return _folder("ECHOLAB_WEIGHTS", "weights")


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Yield a server that starts ranks quickly; see tests/forked.py."""
    server = ForkServer()
    yield server
    server.close()
