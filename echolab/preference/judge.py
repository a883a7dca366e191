"""Judging candidates without people: lip sync, identity and flicker, each as a plain number."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from echolab.metrics.demo_networks import FrameFeatures, SyncNetDemo
from echolab.metrics.scores import sync_of

WEIGHTS = {"sync": 1.0, "identity": 0.25, "flicker": -0.25}


class Verdict(NamedTuple):
    """How one candidate did."""

    sync: float  # Sync-C of the judge
    identity: float  # cosine of a frame's features with those of the reference picture, mean
    flicker: float  # mean change from frame to frame, of a pixel in [-1, 1]


@torch.no_grad()
def judge(
    sync: SyncNetDemo,
    frame: FrameFeatures,
    pixels: Tensor,
    reference: Tensor,
    boxes: Tensor,
    cepstra: Tensor,
) -> list[Verdict]:
    """Verdicts on clips [B, 3, T, Y, X], reference pictures [B, 3, Y, X], lip boxes [B, 4]."""
    syncs = sync_of(sync, pixels, boxes, cepstra)
    clips, frames = pixels.shape[0], pixels.shape[2]
    seen = frame(pixels.transpose(1, 2).flatten(0, 1)).view(clips, frames, -1)
    identity = functional.cosine_similarity(seen, frame(reference)[:, None], dim=-1).mean(1)
    flicker = (pixels[:, :, 1:] - pixels[:, :, :-1]).abs().mean((1, 2, 3, 4))
    rows = zip(syncs, identity.tolist(), flicker.tolist(), strict=True)
    return [Verdict(sync.confidence, alike, change) for sync, alike, change in rows]


def totals(verdicts: dict[tuple[str, int], Verdict]) -> dict[tuple[str, int], float]:
    """One number a candidate: the standardised parts, weighted by WEIGHTS."""
    table = torch.tensor([tuple(verdict) for verdict in verdicts.values()], dtype=torch.float64)
    spread = table.std(0).clamp(min=1e-9) if len(table) > 1 else torch.ones(3)
    scaled = (table - table.mean(0)) / spread
    weights = torch.tensor([WEIGHTS[name] for name in Verdict._fields], dtype=torch.float64)
    return dict(zip(verdicts, (scaled @ weights).tolist(), strict=True))


def best_and_worst(scores: dict[tuple[str, int], float]) -> dict[str, tuple[int, int]]:
    """For each prompt its best and its worst candidate; prompts with one candidate give none."""
    prompts: dict[str, list[tuple[float, int]]] = {}
    for (key, candidate), score in scores.items():
        prompts.setdefault(key, []).append((score, candidate))
    ordered = {key: sorted(found) for key, found in prompts.items() if len(found) > 1}
    return {key: (found[-1][1], found[0][1]) for key, found in ordered.items()}
