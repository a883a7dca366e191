"""Sync-C and Sync-D: SyncNet's published scores of the agreement of lips and audio.

    d(i, j) = |V_i - A_(i + j)|,  j = -s .. s
    D(j)    = mean over i of d(i, j)
    Sync-D  = min D,  Sync-C = median D - min D,  offset = -argmin

Window i is frames i .. i + 4 with cepstra 4 i .. 4 i + 19.  A positive offset means that the audio
is early.  The original pads A with zeros at both ends; on short clips the padding itself adds
confidence (over 20 for 20 unrelated windows).  The padded form is therefore for comparison with
published numbers, the unpadded one for clips of a few seconds.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

FRAMES_PER_WINDOW = 5
CEPSTRA_PER_WINDOW = 20
CEPSTRA_PER_FRAME = 4


class Sync(NamedTuple):
    """The score of one clip."""

    confidence: float
    distance: float
    offset: int  # in frames
    windows: int


def window_count(frames: int, samples: int) -> int:
    """Return the windows of a clip, one less than possible as in the original."""
    return min(frames, samples // 640) - FRAMES_PER_WINDOW


def padded_distances(visual: Tensor, audio: Tensor, max_shift: int) -> Tensor:
    """Return D(j), [2 s + 1], of embeddings [L, D], with zeros beyond the ends of the audio."""
    padded = functional.pad(audio, (0, 0, max_shift, max_shift))
    shifted = padded.unfold(0, 2 * max_shift + 1, 1).transpose(1, 2)  # [L, 2 s + 1, D]
    return (visual[:, None] - shifted + 1e-6).norm(dim=-1).mean(0)


def unpadded_distances(visual: Tensor, audio: Tensor, max_shift: int) -> Tensor:
    """Return D(j), [2 s + 1], over only those windows that have audio at shift j.

    Raises ValueError if there are not more windows than the largest shift.
    """
    count = len(visual)
    if count <= max_shift:
        raise ValueError(f"{count} windows, need more than the largest shift, {max_shift}")
    means = []
    for shift in range(-max_shift, max_shift + 1):
        first, last = max(0, -shift), min(count, count - shift)
        means.append((visual[first:last] - audio[first + shift : last + shift]).norm(dim=-1).mean())
    return torch.stack(means)


def sync_score(distances: Tensor, windows: int) -> Sync:
    """Return Sync-C, Sync-D and the offset of D(j)."""
    lowest, index = distances.min(0)
    offset = (len(distances) - 1) // 2 - int(index)
    median = distances.quantile(0.5)
    return Sync(float(median - lowest), float(lowest), offset, windows)
