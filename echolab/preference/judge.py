"""Automatic judge of candidates: lip sync, identity, flicker, and a combined score."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from echolab.metrics.demo import sync_of
from echolab.metrics.demo_networks import FrameFeatures, SyncNetDemo

# Weights of the standardized measurements in the combined score.
WEIGHTS = {"sync": 1.0, "identity": 0.25, "flicker": -0.25}


class Verdict(NamedTuple):
    """Measurements of one candidate."""

    sync: float  # Sync-C by the judge's network
    identity: float  # mean cosine similarity of frame features to those of the reference image
    flicker: float  # mean absolute change of a pixel in [-1, 1] from frame to frame


@torch.no_grad()
def judge(
    sync: SyncNetDemo,
    frame: FrameFeatures,
    pixels: Tensor,
    reference: Tensor,
    boxes: Tensor,
    cepstra: Tensor,
) -> list[Verdict]:
    """Judge clips [B, 3, T, Y, X] with reference images [B, 3, Y, X] and lip boxes [B, 4]."""
    syncs = sync_of(sync, pixels, boxes, cepstra)
    clips, frames = pixels.shape[0], pixels.shape[2]
    # Compare every frame with the reference image of its clip.
    features = frame(pixels.transpose(1, 2).flatten(0, 1)).view(clips, frames, -1)
    identity = functional.cosine_similarity(features, frame(reference)[:, None], dim=-1).mean(1)
    flicker = (pixels[:, :, 1:] - pixels[:, :, :-1]).abs().mean((1, 2, 3, 4))
    rows = zip(syncs, identity.tolist(), flicker.tolist(), strict=True)
    return [Verdict(sync.confidence, similarity, change) for sync, similarity, change in rows]


def total_scores(verdicts: dict[tuple[str, int], Verdict]) -> dict[tuple[str, int], float]:
    """Return one score per candidate: the sum of standardized measurements, weighted by WEIGHTS."""
    table = torch.tensor([tuple(verdict) for verdict in verdicts.values()], dtype=torch.float64)
    # Standardize over all candidates, so that WEIGHTS apply to quantities without units.
    spread = table.std(0).clamp(min=1e-9) if len(table) > 1 else torch.ones(3)
    scaled = (table - table.mean(0)) / spread
    weights = torch.tensor([WEIGHTS[name] for name in Verdict._fields], dtype=torch.float64)
    return dict(zip(verdicts, (scaled @ weights).tolist(), strict=True))


def best_and_worst(scores: dict[tuple[str, int], float]) -> dict[str, tuple[int, int]]:
    """Return the best and the worst candidate of each prompt with several candidates."""
    prompts: dict[str, list[tuple[float, int]]] = {}
    for (key, candidate), score in scores.items():
        prompts.setdefault(key, []).append((score, candidate))
    # A prompt with a single candidate yields no pair.
    ranked = {key: sorted(scored) for key, scored in prompts.items() if len(scored) > 1}
    return {key: (scored[-1][1], scored[0][1]) for key, scored in ranked.items()}
