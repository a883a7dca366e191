"""Audio for the transformer: features to tokens, and the tokens that each latent frame attends to.

The preview model has two tokens per video frame, eight per latent frame; latent frame i attends to
the 17 tokens [8i - 11, 8i + 5], about 340 ms around its frames.  The Flash model has 32 tokens per
latent frame, computed from all layers of wav2vec2 at its four video frames and two on each side.

Shapes: B clips, T video frames, F = (T - 1) / 4 + 1 latent frames (time stride 4), D width.
Source: antgroup/echomimic_v3, `src/wan_transformer3d_audio.py` and `..._2512.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echolab.geometry import WAN

WINDOW = 17  # number of tokens that a latent frame attends to
TOKENS_PER_FRAME = 2  # per video frame
LEAD = 11  # the window of latent frame i begins at token 8 i - LEAD

# Flash
REACH = 2  # context video frames on each side of a latent frame's video frames
FLASH_TOKENS = 32  # per latent frame
FLASH_HIDDEN = 512


class AudioAttentionConfig(NamedTuple):
    """Settings of the audio branch of cross-attention."""

    biases: bool  # whether the projections to keys and values have biases
    masked: bool  # whether only tokens of the face attend to audio
    windows: Callable[
        [Tensor, int], Tensor
    ]  # keys or values of a clip -> one window a latent frame
    time_stride: int = WAN.time_stride


class AudioTokens(nn.Module):
    """Preview: wav2vec2 features [B, 2 T, audio_dim] -> tokens [B, 2 T, D]."""

    def __init__(self, audio_dim: int, dim: int):
        super().__init__()
        self.proj = nn.Linear(audio_dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        """Project the features; zeros (silence) map to the norm's bias, a learned constant."""
        return self.norm(self.proj(features))


def audio_windows(tokens: Tensor, time_stride: int = WAN.time_stride) -> Tensor:
    """Return the window of each latent frame: [B, 2 T, D] -> [B, F, 17, D], zero-padded.

    Zero keys take part in the softmax, as in the released model, which computes the true lengths
    but does not use them.  The release appends all zeros at the end, which is equivalent, since
    attention does not depend on the order of keys.
    """
    # Pad so that every window is complete, then unfold at the stride of latent frames.
    stride = TOKENS_PER_FRAME * time_stride
    frames = (tokens.shape[1] // TOKENS_PER_FRAME - 1) // time_stride + 1
    tail = stride * (frames - 1) + WINDOW - LEAD - tokens.shape[1]
    padded = F.pad(tokens, (0, 0, LEAD, tail))
    return padded.unfold(1, WINDOW, stride).transpose(2, 3)


# The projections have no biases, so padding after the projections equals padding before them.
PREVIEW = AudioAttentionConfig(biases=False, masked=True, windows=audio_windows)


class FlashAudioTokens(nn.Module):
    """Flash: all layers of wav2vec2 [B, T, layers, audio_dim] -> tokens [B, F, 32, D].

    The first latent frame, which covers one video frame, has a separate first layer.
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
        """Project windows of the features; zeros (silence) yield an output of the biases only."""
        # The first latent frame has a separate projection.
        first, later = flash_windows(features, self.time_stride)
        hidden = torch.cat([self.proj1(first.flatten(-3)), self.proj1_vf(later.flatten(-3))], 1)
        tokens = self.proj3(self.proj2(hidden.relu()).relu())
        return self.norm(tokens.unflatten(-1, (FLASH_TOKENS, -1)))


def flash_windows(features: Tensor, time_stride: int = WAN.time_stride) -> tuple[Tensor, Tensor]:
    """Return the context frames: [B, T, ...] -> [B, 1, 5, ...] and [B, F - 1, 8, ...].

    Latent frame 0 gets video frames -2..2; latent frame i gets frames 4i-3..4i and two on each
    side.  Frames beyond the clip repeat its first or last frame.
    (The release gathers five frames around each video frame and then selects the same frames.)
    """
    # Frame indices of each window, clamped to the clip.
    last = features.shape[1] - 1
    around = torch.arange(time_stride + 2 * REACH, device=features.device) - REACH
    starts = 1 + time_stride * torch.arange(last // time_stride, device=features.device)
    first = around[None, : 1 + 2 * REACH].clamp(0, last)
    later = (starts[:, None] + around).clamp(0, last)
    return features[:, first], features[:, later]


def _all_tokens(tokens: Tensor, time_stride: int) -> Tensor:
    """Return the tokens unchanged, since Flash's tokens are windowed already."""
    return tokens


FLASH = AudioAttentionConfig(biases=True, masked=False, windows=_all_tokens)
