"""The small networks behind the `_demo` scores: SyncNetDemo, and features of frames and clips.

Shapes: B clips, T frames, L windows, D features; crops are [B, T, 3, 24, 32] in [-1, 1].
"""

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from echolab.errors import DataError
from echolab.metrics.sync import CEPSTRA_PER_FRAME, CEPSTRA_PER_WINDOW, FRAMES_PER_WINDOW

CROP_HEIGHT, CROP_WIDTH = 24, 32
CROP_MARGIN = 1.3  # of the lip box: the head may move while the crop stands still


def convolution(inputs: int, outputs: int, stride: int = 2) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


def crop_lips(pixels: Tensor, boxes: Tensor) -> Tensor:
    """Crops [B, T, 3, 24, 32] of clips [B, 3, T, Y, X] at one box [B, 4] a clip, x0 y0 x1 y1."""
    height, width = pixels.shape[-2:]
    x0, y0, x1, y1 = boxes.unbind(-1)
    half_x, half_y = CROP_MARGIN * (x1 - x0) / 2, CROP_MARGIN * (y1 - y0) / 2
    across = torch.linspace(-1, 1, CROP_WIDTH, device=pixels.device)
    down = torch.linspace(-1, 1, CROP_HEIGHT, device=pixels.device)
    grid_x = ((x0 + x1) / 2)[:, None] + half_x[:, None] * across  # [B, 32] in pixels
    grid_y = ((y0 + y1) / 2)[:, None] + half_y[:, None] * down  # [B, 24]
    grid = torch.stack(
        [
            (2 * grid_x / width - 1)[:, None, :].expand(-1, CROP_HEIGHT, -1),
            (2 * grid_y / height - 1)[:, :, None].expand(-1, -1, CROP_WIDTH),
        ],
        dim=-1,
    )
    clips, frames = pixels.shape[0], pixels.shape[2]
    stacked = rearrange(pixels, "b c t y x -> b (t c) y x")
    crops = functional.grid_sample(stacked, grid, align_corners=False, padding_mode="border")
    return crops.view(clips, frames, 3, CROP_HEIGHT, CROP_WIDTH)


class SyncNetDemo(nn.Module):
    """SyncNet's two branches in small: lips and sound to unit vectors, near where they belong."""

    def __init__(self, *, dim: int = 64) -> None:
        super().__init__()
        self.frame = nn.Sequential(
            convolution(3, 32), convolution(32, 64), convolution(64, 64), nn.Flatten()
        )
        self.lips = nn.Sequential(
            nn.Conv1d(64 * 3 * 4, 128, FRAMES_PER_WINDOW), nn.SiLU(), nn.Conv1d(128, dim, 1)
        )
        self.sound = nn.Sequential(
            nn.Conv1d(13, 128, 5, stride=1),
            nn.SiLU(),
            nn.Conv1d(128, 128, CEPSTRA_PER_WINDOW - 4, stride=CEPSTRA_PER_FRAME),
            nn.SiLU(),
            nn.Conv1d(128, dim, 1),
        )
        self.log_temperature = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("cepstra_mean", torch.zeros(13))
        self.register_buffer("cepstra_std", torch.ones(13))

    cepstra_mean: Tensor
    cepstra_std: Tensor

    def embed_lips(self, crops: Tensor) -> Tensor:
        """[B, T, 3, 24, 32] to unit vectors [B, T - 4, D]."""
        clips = crops.shape[0]
        frames = self.frame(rearrange(crops, "b t c y x -> (b t) c y x"))
        windows = self.lips(rearrange(frames, "(b t) d -> b d t", b=clips))
        return functional.normalize(rearrange(windows, "b d l -> b l d"), dim=-1)

    def embed_sound(self, cepstra: Tensor) -> Tensor:
        """[B, columns, 13] to unit vectors [B, 1 + (columns - 20) // 4, D]."""
        scaled = (cepstra - self.cepstra_mean) / self.cepstra_std
        windows = self.sound(rearrange(scaled, "b t d -> b d t"))
        return functional.normalize(rearrange(windows, "b d l -> b l d"), dim=-1)


def check_size(pixels: Tensor, size: int) -> None:
    """DataError where pictures are not of the size that a feature network was fitted on."""
    height, width = pixels.shape[-2:]
    if (height, width) != (size, size):
        raise DataError(
            f"pictures of {height} x {width} pixels, the feature network was fitted on "
            f"{size} x {size}; prepare the clips with size={size}, or fit it on clips like these"
        )


class FrameFeatures(nn.Module):
    """A picture's features, from a network that tells a talker's pose and lips."""

    def __init__(self, *, labels: int, size: int, dim: int = 64) -> None:
        super().__init__()
        self.size = size
        self.features = nn.Sequential(
            convolution(3, 24),
            convolution(24, 48),
            convolution(48, 64),
            convolution(64, 96),
            nn.Flatten(),
            nn.Linear(96 * (size // 16) ** 2, dim),
        )
        self.head = nn.Linear(dim, labels)

    def forward(self, pictures: Tensor) -> Tensor:
        """Square pictures [N, 3, size, size] in [-1, 1] to features [N, D]."""
        check_size(pictures, self.size)
        features: Tensor = self.features(pictures)
        return features


class ClipFeatures(nn.Module):
    """A clip's features, from a network that tells how the lips and the head move."""

    def __init__(self, *, labels: int, size: int, dim: int = 64) -> None:
        super().__init__()
        self.size = size
        self.frame = nn.Sequential(
            convolution(3, 24),
            convolution(24, 48),
            convolution(48, 64),
            nn.Flatten(),
            nn.Linear(64 * (size // 8) ** 2, 96),
        )
        self.time = nn.Sequential(
            nn.Conv1d(96, 96, 5, padding=2), nn.SiLU(), nn.Conv1d(96, dim, 5, stride=2, padding=2)
        )
        self.head = nn.Linear(2 * dim, labels)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, T, size, size] in [-1, 1] to features [B, 2 D]: mean and spread over time."""
        check_size(pixels, self.size)
        clips = pixels.shape[0]
        frames = self.frame(rearrange(pixels, "b c t y x -> (b t) c y x"))
        path = self.time(rearrange(frames, "(b t) d -> b d t", b=clips))
        return torch.cat([path.mean(-1), path.std(-1)], dim=-1)


def mouth_darkness(pixels: Tensor, boxes: Tensor) -> Tensor:
    """How open the mouth looks in each frame, [B, T]: the share of the lip crop that is dark.

    No network takes part: an open mouth shows its dark inside.  Only the course over time counts
    (it is correlated with the true opening), so lip and skin colour do not matter.
    """
    luma = crop_lips(pixels, boxes).mean(dim=2)  # [B, T, 24, 32]
    skin = luma.flatten(2).quantile(0.8, dim=-1)[..., None, None]
    return ((skin - luma) / (skin + 1).clamp(min=0.2)).clamp(min=0).square().mean(dim=(2, 3))


def correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Pearson correlation of two curves; 0 where one of them is flat."""
    a, b = first.astype(np.float64), second.astype(np.float64)  # fp32 would find spread in none
    if min(a.std(), b.std()) < 1e-7:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
