"""The interface of all scores of generated videos: a table with one row per clip.

Every metric keeps its values or features in fp64 tables with one row per clip of the evaluation
set.  A rank fills the rows of its own clips and leaves the others at zero, so the sum over ranks is
the full table.  Adding zero is exact: any number of ranks gives the same bits as one process, also
with uneven shares.  Rows of clips are also what bootstrap intervals and kernel distances need.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from echolab.metrics.card import Card

FPS = 25.0
SCORED = "scored"


class VideoClip(NamedTuple):
    """One video to score, with the inputs that it was generated from.

    T frames of Y x X pixels; boxes are left, top, right, bottom in pixels of `frames`.
    """

    key: str
    frames: Tensor  # [T, 3, Y, X] uint8 RGB
    samples: Tensor | None = None  # [n] fp32, the audio in [-1, 1] at 16 kHz
    reference: Tensor | None = None  # [3, Y, X] uint8, the image that was animated
    truth: Tensor | None = None  # [T, 3, Y, X] uint8, the recorded video
    face: Tensor | None = None  # [T, 4] boxes of the tracked face; NaN without detection
    lips: Tensor | None = None  # [T, 4]
    visemes: Tensor | None = None  # [T, 2] of synthetic talkers
    borders: tuple[int, ...] = ()  # frames at which a window or chunk of the sampler begins
    fps: float = FPS


class Score(NamedTuple):
    """A score of a set of clips."""

    value: float  # NaN if no clip could be scored
    low: float = float("nan")  # bootstrap interval of 95 %; NaN if there are too few clips
    high: float = float("nan")
    clips: int = 0  # number of clips that were scored
    flags: Mapping[str, int] = {}  # why other clips were not scored, with the number of clips


class VideoMetric(Metric, ABC):
    """One or several scores of a set of videos.

    Subclasses add table states with `add_table`, fill a row in `score_clip`, and compute scores
    from complete tables in `scores_of`.
    """

    full_state_update = False
    is_differentiable = False
    reasons: Sequence[str] = ()  # why a clip of this metric may have no score, in words

    def __init__(self, num_clips: int) -> None:
        """Make empty tables for `num_clips` clips.  Raise ValueError for less than one."""
        super().__init__()
        if num_clips < 1:
            raise ValueError(f"num_clips={num_clips}: a score needs at least one clip")
        self.num_clips = num_clips
        self.add_table("status")  # 0: no rank had this clip; 1: scored; 2 + i: reasons[i]
        self.add_table("visits")  # number of ranks that scored this clip, at most one

    status: Tensor
    visits: Tensor

    def add_table(self, name: str, *shape: int) -> None:
        """Add a state [clips, *shape] in fp64 of zeros, which is summed over ranks."""
        zeros = torch.zeros(self.num_clips, *shape, dtype=torch.float64)
        self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, index: int, clip: VideoClip) -> None:
        """Fill row `index`.  Raise ValueError for a row outside the tables or filled before."""
        if not 0 <= index < self.num_clips:
            raise ValueError(f"clip {index}: the set has {self.num_clips} clips")
        if self.visits[index]:
            raise ValueError(f"clip {index} ({clip.key}): was scored before")
        # Give each clip alone to networks: a batch of another size would change rounding.
        with torch.no_grad():
            reason = self.score_clip(index, clip)
        self.status[index] = 2 + self.reasons.index(reason) if reason else 1
        self.visits[index] = 1

    @abstractmethod
    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Fill row `index` of the tables; return "", or the reason why the clip has no score."""

    def compute(self) -> dict[str, Score]:
        """Return the scores by name, over the clips of all ranks."""
        # Rows that several ranks filled are sums of no meaning.
        once = self.visits == 1
        scored = torch.nonzero(once & (self.status == 1)).flatten()
        numbers = {
            reason: int((once & (self.status == 2 + i)).sum())
            for i, reason in enumerate(self.reasons)
        }
        numbers["not sampled"] = int((self.visits == 0).sum())
        numbers["scored by several ranks"] = int((self.visits > 1).sum())
        flags = {reason: count for reason, count in numbers.items() if count}
        return {
            name: score._replace(clips=len(scored), flags=flags | dict(score.flags))
            for name, score in self.scores_of(scored).items()
        }

    @abstractmethod
    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the scores by name, from the rows `scored` [N] of the tables, N >= 0.

        A value that too few clips allow is NaN, and `flags` says why.
        """

    @abstractmethod
    def cards(self) -> dict[str, Card]:
        """Return how each score is made, by the same names as `scores_of`."""


def mean_score(rows: Tensor, seed: int = 0) -> Score:
    """Return the mean of values [N] with a bootstrap interval; NaN for no values."""
    if not len(rows):
        return Score(float("nan"))
    low, high = bootstrap(rows, seed)
    return Score(float(rows.mean()), low, high)


def bootstrap(rows: Tensor, seed: int = 0, draws: int = 1000) -> tuple[float, float]:
    """Return the 2.5 and 97.5 % percentiles of the mean of values [N], resampled by clip.

    The resamples depend on N and the seed only.  Return NaN for less than three values.
    """
    if len(rows) < 3:
        return float("nan"), float("nan")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(rows), (draws, len(rows)), generator=generator)
    means = rows.cpu().double()[chosen].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
