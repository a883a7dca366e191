"""Features of caption, image and audio without trained networks, for the demo.

Captions (for umT5): each token stands for a word and the one after it, so that "blue eyes" and
"blue shirt" differ; its vector is a fixed draw from a hash of the two.

Images (for CLIP): 16 coarse patches with their positions.

Audio (for wav2vec2's 50 vectors a second): log-mel frames, two a video frame.  A vector of wav2vec2
depends on its neighbors and encodes its position (by a convolution).  The network's attention over
a window of audio ignores order, so these features have both too: five neighboring frames, and the
token's position as sines and cosines.
"""

import hashlib
import math
import re
from functools import cache

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from echolab.errors import MediaError

CAPTION_TOKENS, CAPTION_DIM = 32, 32

IMAGE_SIDE, IMAGE_PATCH = 32, 8
IMAGE_TOKENS = (IMAGE_SIDE // IMAGE_PATCH) ** 2
IMAGE_DIM = 3 * IMAGE_PATCH**2 + IMAGE_TOKENS

RATE_HZ = 16_000
SAMPLES_PER_FRAME = 640  # at 25 frames a second
HOP, WINDOW, FFT = 320, 640, 1024
MELS = 40
NEIGHBORS = 2  # on each side
PERIODS = (8, 16, 32, 64)  # of the position, in tokens; 8 are one latent frame
AUDIO_DIM = (2 * NEIGHBORS + 1) * MELS + 2 * len(PERIODS)


def word_vector(words: str) -> Tensor:
    """Return a standard normal vector [32] that depends on nothing but the words."""
    seed = int.from_bytes(hashlib.blake2b(words.encode(), digest_size=7).digest())
    return torch.randn(CAPTION_DIM, generator=torch.Generator().manual_seed(seed))


def encode_caption(caption: str) -> Tensor:
    """Return the features [32, 32] of a caption, zero after its end; a longer one is cut."""
    # One token for each word and its successor.
    words = re.findall(r"[\w']+", caption.lower())
    tokens = torch.zeros(CAPTION_TOKENS, CAPTION_DIM)
    for index, pair in enumerate(zip(words, [*words[1:], ""], strict=False)):
        if index == CAPTION_TOKENS:
            break
        tokens[index] = word_vector(" ".join(pair))
    return tokens


def encode_image(image: Tensor | None) -> Tensor:
    """Return the features [16, 208] of an image [3, Y, X] in [-1, 1]; zeros for None.

    The image is resized to 32 x 32, as CLIP resizes to 224 x 224.
    """
    if image is None:
        return torch.zeros(IMAGE_TOKENS, IMAGE_DIM)
    # A one-hot position is appended to each patch.
    small = functional.interpolate(image[None], (IMAGE_SIDE, IMAGE_SIDE), mode="area")[0]
    patches = rearrange(small, "c (h p) (w q) -> (h w) (c p q)", p=IMAGE_PATCH, q=IMAGE_PATCH)
    return torch.cat([patches, torch.eye(IMAGE_TOKENS)], dim=1)


@cache
def mel_filters() -> Tensor:
    """Return triangular filters [40, 513] on the mel scale from 0 to 8 kHz."""
    # Corners at equal steps of the mel scale.
    top = 2595 * math.log10(1 + RATE_HZ / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, MELS + 2) / 2595) - 1)
    hertz = torch.linspace(0, RATE_HZ / 2, FFT // 2 + 1)
    left, center, right = (corners[k : MELS + k, None] for k in range(3))
    rising, falling = (hertz - left) / (center - left), (right - hertz) / (right - center)
    return torch.minimum(rising, falling).clamp(min=0)


def positions(tokens: Tensor) -> Tensor:
    """Return sines and cosines [N, 8] of token indices [N]."""
    angles = 2 * math.pi * tokens[:, None] / torch.tensor(PERIODS)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def check_length(samples: Tensor, frames: int) -> None:
    """Raise MediaError if audio [n] at 16 kHz ends before its clip."""
    needed = frames * SAMPLES_PER_FRAME
    if len(samples) < needed:
        raise MediaError(
            f"audio of {len(samples)} samples ({len(samples) / RATE_HZ:.2f} s) is shorter than "
            f"{frames} frames ({needed} samples); ask for fewer frames"
        )


def encode_audio(samples: Tensor, frames: int) -> Tensor:
    """Return exactly 2 T tokens [2 T, 208], of about unit size, of audio [n] at 16 kHz.

    Token k is centered on sample 320 k + 160.  Longer audio is cut.  Raises MediaError for audio
    shorter than the clip.
    """
    check_length(samples, frames)
    needed = frames * SAMPLES_PER_FRAME

    # Log-mel frames, scaled to about unit size.
    margin = (WINDOW - HOP) // 2
    padded = functional.pad(samples[:needed].float(), (margin, margin))
    windows = padded.unfold(0, WINDOW, HOP) * torch.hann_window(WINDOW)
    power = torch.fft.rfft(windows, FFT).abs().square()
    mels = ((power @ mel_filters().T + 1e-5).log() + 4) / 3  # [2 T, 40]

    # Each frame with its neighbors, and its position.
    around = functional.pad(mels.T, (NEIGHBORS, NEIGHBORS), mode="replicate")
    stacked = around.unfold(1, 2 * NEIGHBORS + 1, 1).permute(1, 2, 0).flatten(1)
    return torch.cat([stacked, positions(torch.arange(len(mels)))], dim=1)
