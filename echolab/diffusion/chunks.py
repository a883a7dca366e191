"""Long video one chunk after another: each is given the last decoded frames of the one before.

EchoMimicV3's `infer_preview.py`, 299-377: chunks of 113 frames, of which the first 8 are known
from the chunk before; the frames that two chunks share are cross-faded linearly, as pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from echolab.errors import ConfigError
from echolab.geometry import WAN, LatentGeometry


def chunk_spans(
    frames: int, size: int, overlap: int, fill: bool = False, geometry: LatentGeometry = WAN
) -> list[tuple[int, int]]:
    """(start, stop) in frames of chunks that cover a video; each is 4n + 1 frames long.

    All are `size` long but the last, which ends with the video or up to three frames later, and is
    `size` long too where `fill`.  chunk_spans(229, 113, 8) = [(0, 113), (105, 218), (210, 231)].
    """
    check_clip_length("window", size, geometry)
    if not 1 <= overlap < size:
        raise ConfigError(f"overlap={overlap}: must be 1 or more and below the window's {size}")
    starts = [0]
    while starts[-1] + size < frames:
        starts.append(starts[-1] + size - overlap)
    left = geometry.covering_latent_frames(frames - starts[-1])
    last = size if fill else geometry.frames(left)
    return [(start, start + size) for start in starts[:-1]] + [(starts[-1], starts[-1] + last)]


def check_clip_length(name: str, frames: int, geometry: LatentGeometry) -> None:
    """Raise ConfigError unless a setting in frames fills its latent frames."""
    if not geometry.is_clip_length(frames):
        near = geometry.near_clip_length(frames)
        raise ConfigError(f"{name}={frames}: must be {geometry.clip_lengths} frames; {near} is one")


def cross_fade(before: Tensor, after: Tensor, overlap: int) -> Tensor:
    """Two videos [3, T, Y, X] as one; the last `overlap` frames of the first fade into the second.

    The fade is linspace(0, 1, overlap), as released: it begins with the one and ends with the
    other.
    """
    fade = torch.linspace(0, 1, overlap, device=before.device)[:, None, None]
    shared = torch.lerp(before[:, -overlap:], after[:, :overlap], fade)
    return torch.cat([before[:, :-overlap], shared, after[:, overlap:]], 1)


def joined(chunks: Sequence[Tensor], overlap: int) -> Tensor:
    """All chunks [3, T, Y, X] as one video."""
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = cross_fade(whole, chunk, overlap)
    return whole
