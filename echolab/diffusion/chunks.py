"""Long video one chunk after another: each is given the last decoded frames of the one before.

EchoMimicV3's `infer_preview.py`, 299-377: chunks of 113 frames, of which the first 8 are known
from the chunk before; the frames that two chunks share are cross-faded linearly, as pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from echolab.errors import ConfigError


def chunk_spans(frames: int, size: int, overlap: int, fill: bool = False) -> list[tuple[int, int]]:
    """(start, stop) in frames of chunks that cover a video; each is 4n + 1 frames long.

    All are `size` long but the last, which ends with the video or up to three frames later, and is
    `size` long too where `fill`.  chunk_spans(229, 113, 8) = [(0, 113), (105, 218), (210, 231)].
    """
    if size % 4 != 1:
        raise ConfigError(f"window={size}: must be 4n+1 frames; {size // 4 * 4 + 1} is one")
    if not 1 <= overlap < size:
        raise ConfigError(f"overlap={overlap}: must be 1 or more and below the window's {size}")
    starts = [0]
    while starts[-1] + size < frames:
        starts.append(starts[-1] + size - overlap)
    last = size if fill else -(-(frames - starts[-1] - 1) // 4) * 4 + 1
    return [(start, start + size) for start in starts[:-1]] + [(starts[-1], starts[-1] + last)]


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
