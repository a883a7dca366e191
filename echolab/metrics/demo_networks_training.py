"""Fitting the small networks behind the `_demo` scores on clips in memory."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from echolab.fitting import Report, fit
from echolab.metrics.demo_networks import ClipFeatures, FrameFeatures, SyncNetDemo, crop_lips


def jittered(boxes: Tensor, generator: torch.Generator) -> Tensor:
    """Boxes [B, 4] moved by a pixel and resized by a tenth, as a crop never sits exactly."""
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    centre = centre + torch.randn(centre.shape, generator=generator)
    half = half * (1 + 0.1 * torch.randn(len(half), 1, generator=generator))
    return torch.cat([centre - half, centre + half], dim=1)


def disturbed(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Crops [B, T, 3, Y, X] with other light and grain, so that a codec's blur is no surprise."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    contrast, light = (
        1 + 0.15 * normal(len(crops), 1, 1, 1, 1),
        0.1 * normal(len(crops), 1, 1, 1, 1),
    )
    return crops * contrast + light + 0.05 * normal(*crops.shape)


def contrast(lips: Tensor, sound: Tensor, temperature: Tensor) -> Tensor:
    """Each window must find its own sound, and each sound its window, [B, L, D] both.

    Within the clip, where only timing tells them apart, and among a fifth of all clips' windows.
    """
    clips, windows, _ = lips.shape
    within = temperature * torch.einsum("bid,bjd->bij", lips, sound)
    own = torch.arange(windows).repeat(clips)
    loss = functional.cross_entropy(within.flatten(0, 1), own)
    loss = loss + functional.cross_entropy(within.transpose(1, 2).flatten(0, 1), own)
    few_lips, few_sounds = (x[:, ::5].flatten(0, 1) for x in (lips, sound))
    across = temperature * few_lips @ few_sounds.T
    own = torch.arange(len(few_lips))
    return loss + functional.cross_entropy(across, own) + functional.cross_entropy(across.T, own)


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
    """A SyncNet for clips uint8 [N, 3, T, Y, X], lips [N, T, 4], cepstra [N, columns, 13]."""
    torch.manual_seed(seed)
    net = SyncNetDemo()
    net.cepstra_mean.copy_(cepstra.mean((0, 1)))
    net.cepstra_std.copy_(cepstra.std((0, 1)))

    def loss_of(generator: torch.Generator) -> Tensor:
        which = torch.randint(len(pixels), (batch,), generator=generator)
        boxes = jittered(lips[which, 0], generator)
        crops = disturbed(crop_lips(pixels[which].float() / 127.5 - 1, boxes), generator)
        seen, heard = net.embed_lips(crops), net.embed_sound(cepstra[which])
        windows = min(seen.shape[1], heard.shape[1])
        temperature = net.log_temperature.exp().clamp(max=50)
        return contrast(seen[:, :windows], heard[:, :windows], temperature)

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
    """Features of pictures that tell labels [N, T, K] (standardised) of clips [N, 3, T, Y, X]."""
    torch.manual_seed(seed)
    net = FrameFeatures(labels=labels.shape[-1], size=pixels.shape[-1])

    def loss_of(generator: torch.Generator) -> Tensor:
        clip = torch.randint(len(pixels), (batch,), generator=generator)
        frame = torch.randint(pixels.shape[2], (batch,), generator=generator)
        pictures = pixels[clip, :, frame].float() / 127.5 - 1
        return functional.mse_loss(net.head(net(pictures)), labels[clip, frame])

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
    """Features of clips that tell the mean and the mean step of labels [N, T, K]."""
    torch.manual_seed(seed)
    steps_of = (labels[:, 1:] - labels[:, :-1]).abs().mean(1)
    targets = torch.cat([labels.mean(1), steps_of / steps_of.std(0).clamp(min=1e-3)], dim=-1)
    net = ClipFeatures(labels=targets.shape[-1], size=pixels.shape[-1])

    def loss_of(generator: torch.Generator) -> Tensor:
        which = torch.randint(len(pixels), (batch,), generator=generator)
        clips = pixels[which].float() / 127.5 - 1
        return functional.mse_loss(net.head(net(clips)), targets[which])

    fit(net, loss_of, steps=steps, learning_rate=2e-3, seed=seed, progress=progress, report=report)
    return net


def talker_labels(face: Tensor, visemes: Tensor) -> Tensor:
    """What a drawn talker does in each frame, standardised: face box and visemes, [N, T, 6]."""
    labels = torch.cat([face, visemes], dim=-1)
    flat = labels.flatten(0, 1)
    return (labels - flat.mean(0)) / flat.std(0).clamp(min=1e-6)
