"""Small networks for the `_demo` scores and their training: SyncNet, frame and clip features.

Shapes: B clips, T frames, L windows, D features; crops are [B, T, 3, 24, 32] in [-1, 1].
"""

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from echolab.errors import DataError
from echolab.fitting import Report, fit

# Windows of SyncNet, as published: 5 frames at 25 Hz and 20 cepstra at 100 Hz.
FRAMES_PER_WINDOW = 5
CEPSTRA_PER_WINDOW = 20
CEPSTRA_PER_FRAME = 4
CROP_HEIGHT, CROP_WIDTH = 24, 32
CROP_MARGIN = 1.3  # size of the crop / lip box, because the head moves and the crop does not


def convolution(inputs: int, outputs: int, stride: int = 2) -> nn.Sequential:
    """Return a 3 x 3 convolution with group norm and SiLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


def crop_lips(pixels: Tensor, boxes: Tensor) -> Tensor:
    """Crop clips [B, 3, T, Y, X] at one box [B, 4] per clip (x0 y0 x1 y1) to [B, T, 3, 24, 32]."""
    # Sampling grid of each clip, in grid_sample's coordinates.
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
    # Apply the same grid to all frames of a clip.
    clips, frames = pixels.shape[0], pixels.shape[2]
    stacked = rearrange(pixels, "b c t y x -> b (t c) y x")
    crops = functional.grid_sample(stacked, grid, align_corners=False, padding_mode="border")
    return crops.view(clips, frames, 3, CROP_HEIGHT, CROP_WIDTH)


class SyncNetDemo(nn.Module):
    """A small SyncNet: maps lips and audio to unit vectors, which are close if in sync."""

    def __init__(self, *, dim: int = 64) -> None:
        super().__init__()
        # Encode each frame, then windows of five frames.
        self.frame = nn.Sequential(
            convolution(3, 32), convolution(32, 64), convolution(64, 64), nn.Flatten()
        )
        self.lips = nn.Sequential(
            nn.Conv1d(64 * 3 * 4, 128, FRAMES_PER_WINDOW), nn.SiLU(), nn.Conv1d(128, dim, 1)
        )
        # Encode windows of 20 cepstra, one window per frame.
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
        """Map lip crops [B, T, 3, 24, 32] to unit vectors [B, T - 4, D]."""
        clips = crops.shape[0]
        frames = self.frame(rearrange(crops, "b t c y x -> (b t) c y x"))
        windows = self.lips(rearrange(frames, "(b t) d -> b d t", b=clips))
        return functional.normalize(rearrange(windows, "b d l -> b l d"), dim=-1)

    def embed_audio(self, cepstra: Tensor) -> Tensor:
        """Map cepstra [B, columns, 13] to unit vectors [B, 1 + (columns - 20) // 4, D]."""
        scaled = (cepstra - self.cepstra_mean) / self.cepstra_std
        windows = self.sound(rearrange(scaled, "b t d -> b d t"))
        return functional.normalize(rearrange(windows, "b d l -> b l d"), dim=-1)


def check_size(pixels: Tensor, size: int) -> None:
    """Raise DataError unless frames have the size that the feature network was trained on."""
    height, width = pixels.shape[-2:]
    if (height, width) != (size, size):
        raise DataError(
            f"frames of {height} x {width} pixels: the feature network was trained on "
            f"{size} x {size}; prepare the clips with size={size}, or train it on such clips"
        )


class FrameFeatures(nn.Module):
    """Features of a frame, from a network that predicts a talker's pose and lips."""

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

    def forward(self, frames: Tensor) -> Tensor:
        """Map frames [N, 3, size, size] in [-1, 1] to features [N, D]."""
        check_size(frames, self.size)
        features: Tensor = self.features(frames)
        return features


class ClipFeatures(nn.Module):
    """Features of a clip, from a network that predicts the motion of lips and head."""

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
        """Map clips [B, 3, T, size, size] in [-1, 1] to [B, 2 D]: mean and std over time."""
        check_size(pixels, self.size)
        clips = pixels.shape[0]
        frames = self.frame(rearrange(pixels, "b c t y x -> (b t) c y x"))
        motion = self.time(rearrange(frames, "(b t) d -> b d t", b=clips))
        return torch.cat([motion.mean(-1), motion.std(-1)], dim=-1)


# -- training -------------------------------------------------------------------------------------


def jitter_boxes(boxes: Tensor, generator: torch.Generator) -> Tensor:
    """Move boxes [B, 4] by about 1 pixel and resize them by about 10 %."""
    # Detectors have variations of this size.
    center, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    center = center + torch.randn(center.shape, generator=generator)
    half = half * (1 + 0.1 * torch.randn(len(half), 1, generator=generator))
    return torch.cat([center - half, center + half], dim=1)


def augment_crops(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Vary contrast, brightness and noise of crops [B, T, 3, Y, X], as codecs and cameras do."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    # Draw contrast and brightness per clip, and noise per pixel.
    contrast = 1 + 0.15 * normal(len(crops), 1, 1, 1, 1)
    brightness = 0.1 * normal(len(crops), 1, 1, 1, 1)
    return crops * contrast + brightness + 0.05 * normal(*crops.shape)


def contrastive_loss(lips: Tensor, audio: Tensor, temperature: Tensor) -> Tensor:
    """Return the symmetric contrastive loss of lip and audio embeddings, both [B, L, D].

    Windows are compared within their clip, where only timing differs, and every fifth window across
    all clips.
    """
    # Within a clip: window i of the lips matches window i of the audio.
    clips, windows, _ = lips.shape
    within = temperature * torch.einsum("bid,bjd->bij", lips, audio)
    targets = torch.arange(windows, device=lips.device).repeat(clips)
    loss = functional.cross_entropy(within.flatten(0, 1), targets)
    loss = loss + functional.cross_entropy(within.transpose(1, 2).flatten(0, 1), targets)
    # Across clips: every fifth window of each clip.
    some_lips, some_audio = (x[:, ::5].flatten(0, 1) for x in (lips, audio))
    across = temperature * some_lips @ some_audio.T
    targets = torch.arange(len(some_lips), device=lips.device)
    return (
        loss
        + functional.cross_entropy(across, targets)
        + functional.cross_entropy(across.T, targets)
    )


def fit_sync(
    pixels: Tensor,
    lips: Tensor,
    cepstra: Tensor,
    *,
    steps: int,
    seed: int,
    progress: Path,
    report: Report,
    batch: int = 24,
) -> SyncNetDemo:
    """Train a SyncNet on clips uint8 [N, 3, T, Y, X], lips [N, T, 4], cepstra [N, columns, 13]."""
    # Standardize cepstra by the statistics of the training set.
    torch.manual_seed(seed)
    net = SyncNetDemo()
    net.cepstra_mean.copy_(cepstra.mean((0, 1)))
    net.cepstra_std.copy_(cepstra.std((0, 1)))

    def loss_of(generator: torch.Generator) -> Tensor:
        indices = torch.randint(len(pixels), (batch,), generator=generator)
        boxes = jitter_boxes(lips[indices, 0], generator)
        crops = augment_crops(crop_lips(pixels[indices].float() / 127.5 - 1, boxes), generator)
        lip_windows, audio = net.embed_lips(crops), net.embed_audio(cepstra[indices])
        windows = min(lip_windows.shape[1], audio.shape[1])
        temperature = net.log_temperature.exp().clamp(max=50)
        return contrastive_loss(lip_windows[:, :windows], audio[:, :windows], temperature)

    fit(net, loss_of, steps=steps, learning_rate=2e-3, seed=seed, progress=progress, report=report)
    return net


def fit_frame_features(
    pixels: Tensor,
    labels: Tensor,
    *,
    steps: int,
    seed: int,
    progress: Path,
    report: Report,
    batch: int = 64,
) -> FrameFeatures:
    """Train frame features to predict standardized labels [N, T, K] of clips [N, 3, T, Y, X]."""
    torch.manual_seed(seed)
    net = FrameFeatures(labels=labels.shape[-1], size=pixels.shape[-1])

    def loss_of(generator: torch.Generator) -> Tensor:
        clip = torch.randint(len(pixels), (batch,), generator=generator)
        frame = torch.randint(pixels.shape[2], (batch,), generator=generator)
        frames = pixels[clip, :, frame].float() / 127.5 - 1
        return functional.mse_loss(net.head(net(frames)), labels[clip, frame])

    fit(net, loss_of, steps=steps, learning_rate=2e-3, seed=seed, progress=progress, report=report)
    return net


def fit_clip_features(
    pixels: Tensor,
    labels: Tensor,
    *,
    steps: int,
    seed: int,
    progress: Path,
    report: Report,
    batch: int = 12,
) -> ClipFeatures:
    """Train clip features to predict the mean and the mean change of labels [N, T, K]."""
    torch.manual_seed(seed)
    # Scale the mean change over time to unit standard deviation, as the labels have.
    change = (labels[:, 1:] - labels[:, :-1]).abs().mean(1)
    targets = torch.cat([labels.mean(1), change / change.std(0).clamp(min=1e-3)], dim=-1)
    net = ClipFeatures(labels=targets.shape[-1], size=pixels.shape[-1])

    def loss_of(generator: torch.Generator) -> Tensor:
        indices = torch.randint(len(pixels), (batch,), generator=generator)
        clips = pixels[indices].float() / 127.5 - 1
        return functional.mse_loss(net.head(net(clips)), targets[indices])

    fit(net, loss_of, steps=steps, learning_rate=2e-3, seed=seed, progress=progress, report=report)
    return net


def talker_labels(face: Tensor, visemes: Tensor) -> Tensor:
    """Return the standardized face box and visemes of synthetic talkers per frame, [N, T, 6]."""
    labels = torch.cat([face, visemes], dim=-1)
    flat = labels.flatten(0, 1)
    return (labels - flat.mean(0)) / flat.std(0).clamp(min=1e-6)
