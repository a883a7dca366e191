"""What every metric is built from: the size of the evaluation set, and where its files are.

A metric that a configuration names is a plain function `(setup, **parameters) -> VideoMetric`.  It
raises WeightsError if a file of its network is missing.
"""

from pathlib import Path
from typing import NamedTuple

from echolab.errors import ConfigError, WeightsError


class Setup(NamedTuple):
    """The inputs that the functions of metrics share."""

    num_clips: int  # clips of the evaluation set
    frames: int  # frames of each clip
    networks: Path | None = None  # folder of the metrics' networks
    real: Path | None = None  # raw dataset that Frechet distances compare with

    def file(self, name: str) -> Path:
        """Return a file of `networks`; raise WeightsError if it is missing."""
        # Say which file is missing, and where it was expected.
        if self.networks is None:
            raise WeightsError(f"{name}: no folder of metric networks; give networks=")
        path = self.networks / name
        if not path.exists():
            raise WeightsError(f"{path}: not there; fit, copy or download it")
        return path

    def real_clips(self) -> Path:
        """Return the raw dataset to compare with; raise ConfigError without one."""
        if self.real is None:
            raise ConfigError("a Frechet distance compares with real clips; give real=DATASET")
        return self.real
