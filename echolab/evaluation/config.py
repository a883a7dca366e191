"""What an evaluation during training samples and scores, as plain values and open datasets."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from echolab.data.shard_reader import ShardDataset
from echolab.errors import ConfigError
from echolab.evaluation.choice import build_metrics
from echolab.evaluation.decoding import vae_fingerprint
from echolab.evaluation.held_out import HeldOut
from echolab.evaluation.sampling import Sampling
from echolab.metrics.metric import VideoMetric
from echolab.metrics.setup import Setup


class EvaluationConfig(NamedTuple):
    """The settings of conf/evaluation and conf/metrics."""

    every: int  # optimizer steps between evaluations; 0: never
    raw: ShardDataset
    clips: ShardDataset  # the same clips, encoded
    vae: Path  # the autoencoder that encoded them
    sampling: Sampling
    scores: Sequence[Mapping[str, Any]]  # names, target and args of each metric
    num_clips: int = 64
    max_seconds: float = math.inf  # limit of one evaluation
    num_videos: int = 4  # samples that are kept as mp4
    networks: Path | None = None  # folder of the metrics' networks
    real: Path | None = None  # raw clips that Frechet distances compare with

    def held_out(self) -> HeldOut:
        """Open the held-out set.

        Raise DataError if the datasets differ, ConfigError for another autoencoder.
        """
        held_out = HeldOut(self.raw, self.clips, self.num_clips)
        # Latents of another autoencoder would decode to noise that still has scores.
        expected, actual = self.clips.encoders.get("video", ""), vae_fingerprint(self.vae)
        if actual != expected:
            raise ConfigError(
                f"evaluation.vae={self.vae}: is {actual[:12]}, the clips of {self.clips.folder} "
                f"were encoded by {expected[:12]}; give that one"
            )
        return held_out

    def metrics(self, held_out: HeldOut) -> tuple[list[VideoMetric], list[str]]:
        """Return new metrics for a held-out set, and a line for each that is left out."""
        # The tables of a metric have one row per clip of this set.
        setup = Setup(len(held_out), held_out.frames, self.networks, self.real)
        return build_metrics(self.scores, setup)


def planned_clips(
    num_clips: int, max_seconds: float, clips_before: int, seconds_before: float
) -> int:
    """Return how many clips fit into the time limit, from the last evaluation's time.

    The number is halved until it fits, so that small changes of speed do not change it: values of
    another number of clips cannot be compared.  It never grows again within a run.
    """
    # Nothing was measured before the first evaluation.
    if not clips_before or not seconds_before:
        return num_clips
    # A resumed run continues with the smaller number, since its curve has that card.
    planned = min(num_clips, clips_before)
    while planned > 2 and planned * seconds_before / clips_before > max_seconds:
        planned = (planned + 1) // 2
    return planned
