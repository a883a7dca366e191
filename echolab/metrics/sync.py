"""Sync-C, Sync-D and the audio-visual offset of SyncNet, for embeddings V (lips) and A (audio).

    d(i, j) = |V_i - A_(i + j)|,  j = -s .. s
    D(j)    = mean over i of d(i, j)
    Sync-D  = min D,  Sync-C = median D - min D,  offset = -argmin

Window i is frames i .. i + 4 with cepstra 4 i .. 4 i + 19.  A positive offset means that the audio
is early.  The original pads A with zeros at both ends; on short clips the padding itself increases
confidence (over 20 for 20 unrelated windows).  Therefore use the padded form to compare with
published numbers, and the unpadded form for clips of a few seconds.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from echolab.metrics.networks.syncnet import FRAMES_PER_WINDOW


class Sync(NamedTuple):
    """The sync scores of one clip."""

    confidence: float
    distance: float
    offset: int  # in frames
    windows: int


def window_count(frames: int, samples: int) -> int:
    """Return the number of windows of a clip, one less than possible, as in the original."""
    return min(frames, samples // 640) - FRAMES_PER_WINDOW


def padded_distances(visual: Tensor, audio: Tensor, max_shift: int) -> Tensor:
    """Return D(j), [2 s + 1], of embeddings [L, D], with zero-padded audio."""
    # Every shift has L terms; those beyond the clip are distances to zero.
    padded = functional.pad(audio, (0, 0, max_shift, max_shift))
    shifted = padded.unfold(0, 2 * max_shift + 1, 1).transpose(1, 2)  # [L, 2 s + 1, D]
    return (visual[:, None] - shifted + 1e-6).norm(dim=-1).mean(0)


def unpadded_distances(visual: Tensor, audio: Tensor, max_shift: int) -> Tensor:
    """Return D(j), [2 s + 1], averaged only over windows that have audio at shift j.

    Raise ValueError unless there are more windows than the largest shift.
    """
    # No window is paired with audio outside the clip.
    count = len(visual)
    if count <= max_shift:
        raise ValueError(f"{count} windows, need more than the largest shift, {max_shift}")
    means = []
    for shift in range(-max_shift, max_shift + 1):
        first, last = max(0, -shift), min(count, count - shift)
        means.append((visual[first:last] - audio[first + shift : last + shift]).norm(dim=-1).mean())
    return torch.stack(means)


def sync_score(distances: Tensor, windows: int) -> Sync:
    """Compute Sync-C, Sync-D and the offset from D(j)."""
    # The middle of the curve is shift 0.
    lowest, index = distances.min(0)
    offset = (len(distances) - 1) // 2 - int(index)
    median = distances.quantile(0.5)
    return Sync(float(median - lowest), float(lowest), offset, windows)
