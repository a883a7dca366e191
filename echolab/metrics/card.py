"""The metric card: all that decides whether two values of a score can be compared.

Papers report FID, FVD and Sync-C without saying how they were made; a different resize, covariance,
codec or number of clips changes them more than a better model does.  Every value is therefore
stored with its card, and two values with different cards do not share a column without a mark.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

SOFTWARE = ("echolab", "torch", "torchmetrics", "numpy", "opencv-python-headless", "av")


def software() -> dict[str, str]:
    """Return the versions of the packages that compute scores."""
    versions = {}
    for name in SOFTWARE:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions


@dataclass(frozen=True, kw_only=True)
class Card:
    """How a score is made.  The metric knows the first part, the evaluation the second."""

    metric: str  # name of the score, as in `eval/<metric>`
    definition: str  # formula or convention, with its source
    preprocessing: str  # of frames or audio, up to the network's input
    network: str = "none"  # architecture, or none
    weights: str = "none"  # sha256 of the file; "random" or "demo"; or none
    license: str = ""  # of the weights
    settings: dict[str, Any] = field(default_factory=dict)  # of the metric

    clips: int = 0  # number of clips of the evaluation set
    frames: int = 0  # per clip
    fps: float = 0.0
    codec: str = "none"  # that clips passed before they were scored, with its quality
    clip_set: str = ""  # fingerprint of the held-out clips
    sampling: dict[str, Any] = field(default_factory=dict)  # steps, shift, guidance, seed, task
    software: dict[str, str] = field(default_factory=software)

    @property
    def hash(self) -> str:
        """The first 12 hexadecimal digits of the sha256 of the card's canonical JSON.

        How the clips were sampled is part of the system that is measured, not of the measure.
        """
        measure = {name: value for name, value in asdict(self).items() if name != "sampling"}
        canonical = json.dumps(measure, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def with_evaluation(self, **changes: Any) -> "Card":
        """Return the card with the fields that the evaluation knows."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Return the card and its hash as plain values."""
        return {**asdict(self), "hash": self.hash}


def differences(first: Card, second: Card) -> list[str]:
    """Return the fields in which two cards differ, as `field: first, second`."""
    ours, theirs = asdict(first), asdict(second)
    return [f"{name}: {ours[name]}, {theirs[name]}" for name in ours if ours[name] != theirs[name]]
