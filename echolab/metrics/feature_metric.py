"""The base of FID and FVD: features of generated clips against features of reference clips.

Features of every clip are rows of a table, so the distances, their intervals, and the distances at
smaller numbers of clips come from one pass.  The reference is the first clips of a raw dataset,
read when scores are first computed (`compare_with`), or features that another instance of the same
metric collected over all ranks (`all_features`, `set_reference`).
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from echolab.data.media import decode_mp4
from echolab.data.shard_reader import open_dataset
from echolab.errors import DataError
from echolab.metrics.card import Card
from echolab.metrics.frechet import (
    OfWeights,
    distance_interval,
    distances_by_count,
    frechet_distance,
    frechet_of_weights,
    kernel_distance,
    kernel_of_weights,
)
from echolab.metrics.metric import Score, VideoClip, VideoMetric
from echolab.metrics.weights import Network

KERNEL = (
    "unbiased squared MMD with kernel (x . y / D + 1)^3 over all samples (Binkowski et al. 2018)"
)
NOT_FINITE = "features are not finite"
NO_REFERENCE = "no reference clips"
TOO_FEW = "less than two clips"


class FeatureMetric(VideoMetric):
    """Frechet and kernel distances of features [rows, D] of each clip.

    Scores are `<frechet>`, `<kernel>`, and `<frechet>_n<count>` for each of `counts`.
    """

    frechet: str  # names of the scores
    kernel: str
    unbiased: bool  # covariance 1 / (N - 1), or else 1 / N
    higher_is_better = False

    def __init__(
        self,
        num_clips: int,
        network: Network,
        *,
        rows: int,
        dim: int,
        counts: Sequence[int] = (),
        draws: int = 100,
        seed: int = 0,
    ) -> None:
        """Make tables for `num_clips` clips; `draws` resamples give the intervals, 0 for none."""
        super().__init__(num_clips)
        self.net = network.net
        self.network = network._replace(net=torch.nn.Identity())  # for the card alone
        self.rows, self.dim = rows, dim
        self.counts, self.draws, self.seed = tuple(counts), draws, seed
        self.add_table("features", rows, dim)
        self.reference: Tensor | None = None
        self.reference_name, self.reference_clips = "", 0
        self._dataset: Path | None = None  # of reference clips that are not yet read

    features: Tensor

    @abstractmethod
    def clip_features(self, clip: VideoClip) -> Tensor:
        """Return features [rows, D] of a clip."""

    def problem(self, clip: VideoClip) -> str:
        """Return why a clip has no features, one of `reasons`, or ""."""
        return ""

    @abstractmethod
    def card(self) -> Card:
        """Return the card of the Frechet distance, without what all feature metrics share."""

    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Fill the row of features, which must be finite."""
        if problem := self.problem(clip):
            return problem
        features = self.clip_features(clip).double()
        if not features.isfinite().all():
            return NOT_FINITE
        # Add zero: a negative zero would become positive when the tables of ranks are summed.
        self.features[index] = features + 0.0
        return ""

    def all_features(self) -> Tensor:
        """Return the features [N, rows, D] of the scored clips of all ranks, on the CPU.

        Every rank must call this.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            return self.features[(self.visits == 1) & (self.status == 1)].cpu()

    def set_reference(self, features: Tensor, name: str) -> None:
        """Set the reference features [N, rows, D] of the set `name`; raise ValueError for others.

        `reset` keeps them.
        """
        # Features of another network or number of frames would give a number that looks fine.
        if features.ndim != 3 or features.shape[1:] != (self.rows, self.dim):
            raise ValueError(
                f"reference features {list(features.shape)}, need [N, {self.rows}, {self.dim}]"
            )
        self.reference, self.reference_name = features.detach().cpu().double(), name
        self.reference_clips = len(features)
        self._computed = None  # torchmetrics would return scores against the earlier reference

    def compare_with(self, dataset: Path, clips: int) -> None:
        """Compare with at most `clips` first clips of a raw dataset, read when scores are computed.

        Every rank reads all of them, so that no rank waits for another; `reset` keeps them.
        """
        source = open_dataset(dataset)
        self.reference, self._dataset, self._computed = None, dataset, None
        self.reference_clips = min(clips, len(source))
        self.reference_name = source.fingerprint[:12]

    def _read_reference(self, dataset: Path) -> Tensor:
        """Return features of the reference clips; raise DataError for a clip without features."""
        source, rows = open_dataset(dataset), []
        for index in range(self.reference_clips):
            frames = torch.from_numpy(decode_mp4(source.read(index)["mp4"])).permute(0, 3, 1, 2)
            clip = VideoClip(f"{index} of {dataset}", frames)
            if problem := self.problem(clip):
                raise DataError(f"clip {clip.key}: {problem}; give longer real clips")
            with torch.no_grad():
                rows.append(self.clip_features(clip).cpu().double())
        return torch.stack(rows)

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the distances from the reference; NaN for less than two clips on a side."""
        names = [self.frechet, self.kernel, *(f"{self.frechet}_n{n}" for n in self.counts)]
        if self.reference is None and self._dataset is not None and len(scored) >= 2:
            self.reference = self._read_reference(self._dataset)
        reference = self.reference
        if reference is None or len(reference) < 2 or len(scored) < 2:
            reason = TOO_FEW if self.reference_clips else NO_REFERENCE
            return {name: Score(math.nan, flags={reason: 1}) for name in names}
        # Compute on the CPU in fp64, where a sum does not depend on the kind of device.
        features = self.features[scored].cpu()
        frechet = partial(frechet_distance, unbiased=self.unbiased)
        resampled = frechet_of_weights(features, reference, unbiased=self.unbiased)
        rows, real = features.flatten(0, 1), reference.flatten(0, 1)
        scores = {
            self.frechet: self._score(frechet(rows, real), resampled, len(scored)),
            self.kernel: self._score(
                kernel_distance(rows, real), kernel_of_weights(features, reference), len(scored)
            ),
        }
        # Show the bias: the distance at fewer clips.
        by_count = distances_by_count(features, reference, self.counts, frechet, self.seed)
        for count in self.counts:
            scores[f"{self.frechet}_n{count}"] = (
                Score(by_count[count])
                if count in by_count
                else Score(math.nan, flags={f"less than {count} clips": 1})
            )
        return scores

    def _score(self, value: float, resampled: OfWeights, clips: int) -> Score:
        """Return a distance with its interval."""
        if not self.draws:
            return Score(value)
        return Score(value, *distance_interval(resampled, clips, seed=self.seed, draws=self.draws))

    def cards(self) -> dict[str, Card]:
        """Return the cards of the scores."""
        covariance = "1 / (N - 1)" if self.unbiased else "1 / N"
        # The reference is part of the measure: another set gives other values.
        settings = {
            "rows_per_clip": self.rows,
            "reference": self.reference_name,
            "reference_clips": self.reference_clips,
            "draws": self.draws,
            "seed": self.seed,
        }
        shared = {
            "network": self.network.architecture,
            "weights": self.network.weights,
            "license": self.network.license,
        }
        card = self.card().with_evaluation(**shared)
        base = {**card.settings, **settings}
        frechet = card.with_evaluation(settings={**base, "covariance": covariance})
        cards = {
            self.frechet: frechet,
            self.kernel: card.with_evaluation(metric=self.kernel, definition=KERNEL, settings=base),
        }
        # A distance at another number of clips is another measure.
        for number in self.counts:
            name = f"{self.frechet}_n{number}"
            subset = {**frechet.settings, "subset_clips": number}
            cards[name] = frechet.with_evaluation(metric=name, settings=subset)
        return cards
