"""Shared data types; all are NamedTuples, which Lightning can cast and pin.

Shapes, with Wan's strides (see `geometry`): B clips, T frames, F latent frames (T = 4 (F - 1) + 1),
C latent channels, Y, X pixels, H = Y / 8, W = X / 8 latents, L text tokens, N image tokens,
P = (H / 2) (W / 2) tokens of one latent frame.
"""

from typing import Any, NamedTuple

from torch import Tensor

# Data: decoded clips.


class Clips(NamedTuple):
    """Decoded clips of one size; only synthetic talkers have visemes."""

    keys: list[str]
    pixels: Tensor  # [B, 3, T, Y, X] uint8
    samples: Tensor  # [B, 640 T]     audio in [-1, 1] at 16 kHz
    face: Tensor  # [B, T, 4]      left, top, right, bottom in pixels
    lips: Tensor  # [B, T, 4]
    visemes: Tensor | None  # [B, T, 2]      opening and width of the mouth, in [0, 1]
    metadata: list[dict[str, Any]]  # JSON metadata of each sample

    def float_pixels(self, which: Tensor | slice = slice(None)) -> Tensor:
        """Return the pixels of selected clips, as float in [-1, 1]."""
        return self.pixels[which].float() / 127.5 - 1


# The network's inputs, and batches of clips with these inputs.


class Conditions(NamedTuple):
    """The inputs of the network besides noisy latents and timesteps."""

    text: Tensor  # [B, L, text_dim]    text states, zero-padded
    image: Tensor  # [B, N, image_dim]   tokens of the reference image; zeros without an image
    audio: Tensor  # [B, 2 T, audio_dim] two tokens per frame, or Flash's [B, T, layers, audio_dim];
    # zeros without audio
    face: Tensor  # [B, P]              1 for tokens that attend to audio, row-major
    known: Tensor  # [B, 4, F, H, W]     1 for given pixels
    known_latents: Tensor  # [B, C, F, H, W]     latents of the given pixels, all others mid-gray


class Batch(NamedTuple):
    """Clips with their conditions."""

    latents: Tensor  # [B, C, F, H, W]  clean
    conditions: Conditions
    weight: Tensor  # [B, 1, F, H, W]  weight of each latent in the loss; mean 1 is usual
    tasks: list[str]  # task name of each clip
    keys: list[str]  # key of each clip in its dataset


class PreferencePair(NamedTuple):
    """Two videos for the same conditions; both share all other fields."""

    chosen: Tensor  # [B, C, F, H, W]
    rejected: Tensor  # [B, C, F, H, W]
    conditions: Conditions
    weight: Tensor  # [B, 1, F, H, W]
    tasks: list[str]
    keys: list[str]


class SyncBatch(NamedTuple):
    """Spans of talking faces with their audio, to train SyncNet."""

    crops: Tensor  # [B, T, 3, y, x]  uint8 RGB, crops of the lips or of the face
    cepstra: Tensor  # [B, 4 T - 1, 13]
    keys: list[str]

    @property
    def tasks(self) -> list[str]:
        """The tasks of the clips; talking faces have none."""
        return []


# A training step: random numbers, modality weights and loss.


class Draws(NamedTuple):
    """Random numbers of one training step, a pure function of (seed, epoch, key, draw index)."""

    noise: Tensor  # [B, C, F, H, W]  standard normal, fp32
    sigmas: Tensor  # [B]              noise level; 0 is data, 1 is noise
    uniforms: Tensor  # [B, 2]           uniform in [0, 1), for dropout of image and audio


class ModalityWeights(NamedTuple):
    """Factors on the three cross-attention outputs."""

    text: Tensor  # [B]
    image: Tensor  # [B]
    audio: Tensor  # [B]


class Loss(NamedTuple):
    """A scalar to minimize, and the values to log with it."""

    value: Tensor  # []
    parts: dict[str, Tensor]  # [B] or []
