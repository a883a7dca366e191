"""Score clips by a list of metrics, over all ranks, and complete the metric cards."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from echolab.diffusion.guidance import Net
from echolab.encoders.encode import Autoencoder
from echolab.evaluation.decoding import decode
from echolab.evaluation.held_out import HeldOut
from echolab.evaluation.sampling import Poll, Sampling, Share, parts_of, sample_parts
from echolab.metrics.card import Card
from echolab.metrics.metric import Score, VideoClip, VideoMetric

NOT_FINITE = "pixels are not finite"
COLUMNS = ("score", "value", "low", "high", "clips", "card")  # of `Results.rows`
Reduce = Callable[[Tensor], Tensor]
Keep = Callable[[int, VideoClip], None]  # receives each clip that this rank scores


class Finite(VideoMetric):
    """Counts clips whose pixels are not finite, which no metric scores."""

    reasons = (NOT_FINITE,)

    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Accept the clip."""
        return ""

    def mark(self, index: int) -> None:
        """Count a clip as not finite."""
        self.status[index] = 2
        self.visits[index] = 1
        self._update_count += 1

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the share of finite clips."""
        return {"finite": Score(len(scored) / self.num_clips)}

    def cards(self) -> dict[str, Card]:
        """Return no card: this is no score of the network."""
        return {}


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _card_hash(cards: Mapping[str, Card], name: str) -> str:
    return cards[name].hash if name in cards else ""


class Results(NamedTuple):
    """Scores by name, each with its card."""

    scores: dict[str, Score]
    cards: dict[str, Card]

    def values(self, prefix: str = "") -> dict[str, float]:
        """Return the values by name, without scores that no clip has."""
        return {
            f"{prefix}{name}": score.value
            for name, score in self.scores.items()
            if not math.isnan(score.value)
        }

    def to_json(self) -> dict[str, Any]:
        """Return scores, intervals, flags and cards as plain values; NaN is null."""
        # JSON has no NaN: a score without value is null, and its flags say why.
        scores = {
            name: {
                "value": _or_none(score.value),
                "interval": [_or_none(score.low), _or_none(score.high)],
                "clips": score.clips,
                "flags": dict(score.flags),
            }
            for name, score in self.scores.items()
        }
        cards = {name: card.to_json() for name, card in self.cards.items()}
        planned = max((card.clips for card in self.cards.values()), default=0)
        return {"clips": planned, "scores": scores, "cards": cards}

    def rows(self) -> list[list[Any]]:
        """Return a table with the columns of COLUMNS."""
        return [
            [name, *map(_or_none, score[:3]), score.clips, _card_hash(self.cards, name)]
            for name, score in self.scores.items()
        ]

    def missing(self) -> dict[str, str]:
        """Return why a score has no value, by name."""
        return {
            name: ", ".join(f"{reason} ({count})" for reason, count in score.flags.items())
            for name, score in self.scores.items()
            if math.isnan(score.value)
        }


class Scorer:
    """Metrics over one set of clips; every rank adds its own clips."""

    def __init__(self, metrics: Sequence[VideoMetric], held_out: HeldOut) -> None:
        self.metrics, self.held_out = list(metrics), held_out
        self.finite = Finite(len(held_out))

    def add(self, index: int, clip: VideoClip, *, finite: bool = True) -> None:
        """Score one clip by all metrics, or count it as not finite."""
        # A metric would turn broken pixels into a number that looks plausible.
        if not finite:
            self.finite.mark(index)
            return
        for metric in (*self.metrics, self.finite):
            metric.update(index, clip)

    def results(
        self, sampling: Sampling | None, *, reduce: Reduce = lambda table: table, **facts: Any
    ) -> Results:
        """Return the scores over the clips of all ranks.

        `reduce` sums a table over the ranks, by default there is one.  The cards get the facts of
        the evaluation; without `sampling` the clips are recordings.
        """
        # Every rank left the rows of the others at zero, so the sums are exact.
        for metric in (*self.metrics, self.finite):
            metric.distributed_available_fn = lambda: False  # the tables are summed here
            for name in metric._defaults:
                setattr(metric, name, reduce(getattr(metric, name)))
        # Metrics of one set share the facts of their cards.
        scores: dict[str, Score] = {}
        cards: dict[str, Card] = {}
        with warnings.catch_warnings():
            # A rank without clips of its own is no mistake here.
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            faulty = dict(self.finite.compute()["finite"].flags)
            for metric in self.metrics:
                scores |= metric.compute()
                cards |= metric.cards()
        count = faulty.get(NOT_FINITE, 0)
        known = self._facts(sampling) | facts
        completed = {name: card.with_evaluation(**known) for name, card in cards.items()}
        return Results({n: _with_faulty(s, count) for n, s in scores.items()}, completed)

    def _facts(self, sampling: Sampling | None) -> dict[str, Any]:
        """Return the fields of the cards that the evaluation knows."""
        # The number of clips is that of the set; a score states how many of them it has.
        settings = sampling._asdict() if sampling else {}
        settings.pop("batch_size", None)  # has no influence but rounding
        return {
            "clips": len(self.held_out),
            "frames": self.held_out.frames,
            "fps": 25.0,
            "clip_set": self.held_out.fingerprint,
            "sampling": settings,
        }


def _with_faulty(score: Score, count: int) -> Score:
    """Return the score with `count` clips flagged as not finite instead of not sampled."""
    if not count:
        return score
    # No metric has seen these clips, so it counts them as not sampled.
    flags = dict(score.flags)
    flags["not sampled"] = flags.get("not sampled", 0) - count
    if flags["not sampled"] <= 0:
        del flags["not sampled"]
    return score._replace(flags=flags | {NOT_FINITE: count})


def score_recordings(
    scorer: Scorer, indices: Iterable[int], *, shuffled: bool = False, keep: Keep | None = None
) -> None:
    """Score recorded clips, with their own audio or, if `shuffled`, that of the previous clip."""
    # Recorded clips pass neither sampler nor autoencoder.
    for index in indices:
        clip = scorer.held_out.clip(index, audio_of=1 if shuffled else 0)
        scorer.add(index, clip)
        if keep:
            keep(index, clip)


def score_reconstructions(
    scorer: Scorer, vae: Autoencoder, device: torch.device, keep: Keep | None = None
) -> None:
    """Score all recorded clips after encoding and decoding: no sample can look better."""
    # One clip at a time, since a long recorded clip needs much memory.
    for index in range(len(scorer.held_out)):
        frames = scorer.held_out.clip(index).frames
        pixels = frames.to(device).transpose(0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            latents = vae.encode(pixels)
        score_latents(scorer, vae, range(index, index + 1), latents, keep)


def score_samples(
    scorer: Scorer,
    net: Net,
    vae: Autoencoder,
    sampling: Sampling,
    share: Share,
    *,
    device: torch.device,
    dtype: torch.dtype,
    poll: Poll = lambda: None,
    keep: Keep | None = None,
) -> None:
    """Sample, decode and score this rank's clips, batch by batch."""
    # Decode batch by batch, so that pixels of one batch are in memory.
    parts = parts_of(len(scorer.held_out), sampling.batch_size, share)
    batches = sample_parts(
        net, scorer.held_out, sampling, parts, device=device, dtype=dtype, poll=poll
    )
    for part, latents in batches:
        if part.counted:
            score_latents(scorer, vae, part.indices, latents, keep)


def score_latents(
    scorer: Scorer, vae: Autoencoder, indices: range, latents: Tensor, keep: Keep | None = None
) -> None:
    """Decode latents [B, C, F, H, W] of some clips and score them."""
    # Each clip is scored alone, as the definition of each metric is by clip.
    frames, finite = decode(vae, latents)
    for index, clip_frames, is_finite in zip(indices, frames, finite, strict=True):
        clip = scorer.held_out.clip(index, clip_frames)
        scorer.add(index, clip, finite=is_finite)
        if keep:
            keep(index, clip)
