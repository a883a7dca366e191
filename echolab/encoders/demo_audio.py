"""Log-mel frames, two a video frame: the stand-in for wav2vec2's 50 vectors a second.

A vector of wav2vec2 has seen its neighbours and knows its place (a convolution adds it).  The
network's attention over a window of sound is blind to order, so the stand-in has both too: five
neighbouring frames, and the token's place as sines and cosines.
"""

import math
from functools import cache

import torch
from torch import Tensor

from echolab.errors import MediaError

RATE_HZ = 16_000
SAMPLES_PER_FRAME = 640  # at 25 frames a second
HOP, WINDOW, FFT = 320, 640, 1024
MELS = 40
NEIGHBOURS = 2  # on each side
PERIODS = (8, 16, 32, 64)  # of the place, in tokens; 8 are one latent frame
SIZE = (2 * NEIGHBOURS + 1) * MELS + 2 * len(PERIODS)


@cache
def mel_filters() -> Tensor:
    """Triangular filters [40, 513] on the mel scale from 0 to 8 kHz."""
    top = 2595 * math.log10(1 + RATE_HZ / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, MELS + 2) / 2595) - 1)
    hertz = torch.linspace(0, RATE_HZ / 2, FFT // 2 + 1)
    left, centre, right = (corners[k : MELS + k, None] for k in range(3))
    rising, falling = (hertz - left) / (centre - left), (right - hertz) / (right - centre)
    return torch.minimum(rising, falling).clamp(min=0)


def places(tokens: Tensor) -> Tensor:
    """Sines and cosines of places [N], [N, 8]."""
    angles = 2 * math.pi * tokens[:, None] / torch.tensor(PERIODS)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def check_length(samples: Tensor, frames: int) -> None:
    """MediaError where sound [n] at 16 kHz ends before its clip does."""
    needed = frames * SAMPLES_PER_FRAME
    if len(samples) < needed:
        raise MediaError(
            f"sound of {len(samples)} samples ({len(samples) / RATE_HZ:.2f} s) is shorter than "
            f"{frames} frames ({needed} samples); ask for fewer frames"
        )


def encode_sound(samples: Tensor, frames: int) -> Tensor:
    """Sound [n] in [-1, 1] at 16 kHz to exactly 2 T tokens [2 T, 208], of about unit size.

    Token k is centred on sample 320 k + 160.  Raises MediaError where the sound is shorter than
    the clip; what is longer is cut.
    """
    check_length(samples, frames)
    needed = frames * SAMPLES_PER_FRAME
    margin = (WINDOW - HOP) // 2
    padded = torch.nn.functional.pad(samples[:needed].float(), (margin, margin))
    windows = padded.unfold(0, WINDOW, HOP) * torch.hann_window(WINDOW)
    power = torch.fft.rfft(windows, FFT).abs().square()
    mels = ((power @ mel_filters().T + 1e-5).log() + 4) / 3  # [2 T, 40]
    around = torch.nn.functional.pad(mels.T, (NEIGHBOURS, NEIGHBOURS), mode="replicate")
    stacked = around.unfold(1, 2 * NEIGHBOURS + 1, 1).permute(1, 2, 0).flatten(1)
    return torch.cat([stacked, places(torch.arange(len(mels)))], dim=1)
