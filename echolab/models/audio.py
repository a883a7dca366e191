"""Sound for the transformer: features to tokens, and the tokens that each latent frame hears.

The preview model: two tokens a video frame, eight a latent frame, and latent frame i hears the 17
tokens [8i - 11, 8i + 5], about 340 ms around its frames.  The Flash model: 32 tokens a latent
frame, made of all layers of wav2vec2 at the 8 video frames around its own four.

Shapes: B clips, T video frames, F = (T - 1) / 4 + 1 latent frames, D width.
Source: antgroup/echomimic_v3, `src/wan_transformer3d_audio.py` and `..._2512.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echolab.geometry import WAN

WINDOW = 17  # tokens that a latent frame hears
TOKENS_PER_FRAME = 2  # of a video frame
LEAD = 11  # tokens heard before the first of latent frame 0

REACH = 2  # Flash: video frames heard before the first and after the last of a latent frame
FLASH_TOKENS = 32  # a latent frame
FLASH_HIDDEN = 512


class Hearing(NamedTuple):
    """How cross-attention reads tokens of sound; its weights differ by it."""

    biases: bool  # of the projections to keys and values
    masked: bool  # faces alone let the sound in
    windows: Callable[[Tensor, int], Tensor]  # keys or values of a clip -> of its latent frames
    time_stride: int = WAN.time_stride


class AudioTokens(nn.Module):
    """Preview: wav2vec2 features [B, 2 T, audio_dim] -> tokens [B, 2 T, D]."""

    def __init__(self, audio_dim: int, dim: int):
        super().__init__()
        self.proj = nn.Linear(audio_dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        """Silence (zeros) becomes the norm's bias, a learned constant."""
        return self.norm(self.proj(features))


def audio_windows(tokens: Tensor, time_stride: int = WAN.time_stride) -> Tensor:
    """The window of every latent frame: [B, 2 T, D] -> [B, F, 17, D], zeros beyond the clip's ends.

    Zero keys take part in the softmax, as in the released model (it computes the true lengths and
    does not use them).  It puts the zeros last; attention does not know the order of its keys.
    """
    stride = TOKENS_PER_FRAME * time_stride
    frames = (tokens.shape[1] // TOKENS_PER_FRAME - 1) // time_stride + 1
    tail = stride * (frames - 1) + WINDOW - LEAD - tokens.shape[1]
    padded = F.pad(tokens, (0, 0, LEAD, tail))
    return padded.unfold(1, WINDOW, stride).transpose(2, 3)


# Neither projection has a bias, so padding after it is padding before it, at half the cost.
PREVIEW = Hearing(biases=False, masked=True, windows=audio_windows)


class FlashAudioTokens(nn.Module):
    """Flash: all layers of wav2vec2 [B, T, layers, audio_dim] -> tokens [B, F, 32, D].

    The first latent frame, one video frame, has a first layer of its own.
    """

    def __init__(self, audio_dim: int, layers: int, dim: int, time_stride: int = WAN.time_stride):
        super().__init__()
        self.time_stride = time_stride
        self.proj1 = nn.Linear((1 + 2 * REACH) * layers * audio_dim, FLASH_HIDDEN)
        self.proj1_vf = nn.Linear((time_stride + 2 * REACH) * layers * audio_dim, FLASH_HIDDEN)
        self.proj2 = nn.Linear(FLASH_HIDDEN, FLASH_HIDDEN)
        self.proj3 = nn.Linear(FLASH_HIDDEN, FLASH_TOKENS * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        """Silence (zeros) becomes what the biases make of it."""
        first, later = flash_windows(features, self.time_stride)
        hidden = torch.cat([self.proj1(first.flatten(-3)), self.proj1_vf(later.flatten(-3))], 1)
        tokens = self.proj3(self.proj2(hidden.relu()).relu())
        return self.norm(tokens.unflatten(-1, (FLASH_TOKENS, -1)))


def flash_windows(features: Tensor, time_stride: int = WAN.time_stride) -> tuple[Tensor, Tensor]:
    """[B, T, ...] -> [B, 1, 5, ...] and [B, F - 1, 8, ...]: the frames heard, ends repeated.

    Latent frame 0 hears video frames -2..2, latent frame i its own 4i-3..4i and two on each side.
    (The release gathers five frames around each video frame, and then keeps these.)
    """
    last = features.shape[1] - 1
    around = torch.arange(time_stride + 2 * REACH, device=features.device) - REACH
    starts = 1 + time_stride * torch.arange(last // time_stride, device=features.device)
    first = around[None, : 1 + 2 * REACH].clamp(0, last)
    later = (starts[:, None] + around).clamp(0, last)
    return features[:, first], features[:, later]


def _as_they_are(tokens: Tensor, time_stride: int) -> Tensor:
    return tokens


FLASH = Hearing(biases=True, masked=False, windows=_as_they_are)
