"""Types that the packages exchange; all are NamedTuples, which Lightning casts and pins.

Shapes, with Wan's strides (see `geometry`): B clips, T frames, F latent frames (T = 4 (F - 1) + 1),
C latent channels, Y, X pixels, H = Y / 8, W = X / 8 latents, L text tokens, N image tokens,
P = (H / 2) (W / 2) tokens of one latent frame.
"""

from typing import Any, NamedTuple

from torch import Tensor

# Data: decoded clips.


class Clips(NamedTuple):
    """Clips of one size, decoded; only synthetic talkers have visemes."""

    keys: list[str]
    pixels: Tensor  # [B, 3, T, Y, X] uint8
    samples: Tensor  # [B, 640 T]     audio in [-1, 1] at 16 kHz
    face: Tensor  # [B, T, 4]      left, top, right, bottom in pixels
    lips: Tensor  # [B, T, 4]
    visemes: Tensor | None  # [B, T, 2]      opening and width of the mouth, in [0, 1]
    metadata: list[dict[str, Any]]  # JSON metadata of each sample

    def float_pixels(self, which: Tensor | slice = slice(None)) -> Tensor:
        """Return pixels of some clips in [-1, 1]."""
        return self.pixels[which].float() / 127.5 - 1


# The network: its inputs, and batches of clips with them.


class Conditions(NamedTuple):
    """The inputs of the network besides noisy latents and timesteps."""

    text: Tensor  # [B, L, text_dim]    text states, zero after the end of the text
    image: Tensor  # [B, N, image_dim]   tokens of the reference image; zeros without one
    audio: Tensor  # [B, 2 T, audio_dim] two tokens a frame, or Flash's [B, T, layers, audio_dim];
    # zeros without audio
    face: Tensor  # [B, P]              1 on tokens that attend to audio, row-major
    known: Tensor  # [B, 4, F, H, W]     1 for given pixels
    known_latents: Tensor  # [B, C, F, H, W]     the given pixels, encoded; the rest mid-gray


class Batch(NamedTuple):
    """Clips with their conditions."""

    latents: Tensor  # [B, C, F, H, W]  clean
    conditions: Conditions
    weight: Tensor  # [B, 1, F, H, W]  weight of each latent in the loss; mean 1 is usual
    tasks: list[str]  # task name of each clip
    keys: list[str]  # key of each clip in its dataset


class PreferencePair(NamedTuple):
    """Two videos for the same conditions; everything else exists once for both."""

    chosen: Tensor  # [B, C, F, H, W]
    rejected: Tensor  # [B, C, F, H, W]
    conditions: Conditions
    weight: Tensor  # [B, 1, F, H, W]
    tasks: list[str]
    keys: list[str]


# A training step: its random numbers, the weights of the modalities, and its loss.


class Draws(NamedTuple):
    """Random numbers of one training step, a pure function of (seed, epoch, key, draw index)."""

    noise: Tensor  # [B, C, F, H, W]  standard normal, fp32
    sigmas: Tensor  # [B]              noise level; 0 is data, 1 is noise
    uniforms: Tensor  # [B, 2]           for the dropout of image and audio


class ModalityWeights(NamedTuple):
    """Factors on the three cross-attention outputs."""

    text: Tensor  # [B]
    image: Tensor  # [B]
    audio: Tensor  # [B]


class Loss(NamedTuple):
    """A scalar to minimize, and the values to log with it."""

    value: Tensor  # []
    parts: dict[str, Tensor]  # [B] or []
