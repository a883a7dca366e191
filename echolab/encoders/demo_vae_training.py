"""Fitting the small video autoencoder on clips in memory."""

from pathlib import Path

import torch
from torch import Tensor

from echolab.encoders.demo_vae import CausalAutoencoder
from echolab.fitting import Report, fit, work_dtype

SPAN = 9  # frames of a training crop
LATENT_NOISE = 0.2  # at most, while training: what a sampler nearly hits must look right
LIP_WEIGHT = 9.0
WIDTH = 192
BASIS_VALUES = 50_000_000  # of pixels, for the principal components: 160 clips of the demo


def lip_weight(lips: Tensor, height: int, width: int) -> Tensor:
    """1, and more at the lips: [B, 1, T, Y, X] from boxes [B, T, 4] in pixels."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    x0, y0, x1, y1 = (lips[..., k, None, None] for k in range(4))
    inside = (rows >= y0) & (rows <= y1) & (columns >= x0) & (columns <= x1)
    return 1 + LIP_WEIGHT * inside[:, None].float()


def fit_autoencoder(
    pixels: Tensor,
    lips: Tensor,
    *,
    steps: int,
    seed: int,
    progress: Path,
    report: Report,
    batch: int = 16,
) -> CausalAutoencoder:
    """A fitted, normalised autoencoder for clips uint8 [N, 3, T, Y, X] with lip boxes [N, T, 4]."""
    torch.manual_seed(seed)
    net = CausalAutoencoder(width=WIDTH)
    enough = max(1, BASIS_VALUES // pixels[0].numel())
    net.fit_basis(pixels[:enough].float() / 127.5 - 1)
    count, frames = pixels.shape[0], pixels.shape[2]
    span, dtype = min(SPAN, frames), work_dtype()

    def loss_of(generator: torch.Generator) -> Tensor:
        which = torch.randint(count, (batch,), generator=generator)
        start = int(torch.randint(frames - span + 1, (), generator=generator))
        truth = pixels[which, :, start : start + span].float() / 127.5 - 1
        weight = lip_weight(lips[which, start : start + span], *truth.shape[-2:])
        with torch.autocast(truth.device.type, dtype, enabled=dtype != torch.float32):
            raw = net.raw_latents(truth)
            level = LATENT_NOISE * torch.rand(batch, 1, 1, 1, 1, generator=generator)
            noise = level * torch.randn(raw.shape, generator=generator)
            error = net.raw_pixels(raw + noise).float() - truth
        # The last term holds the latents near unit size, so that LATENT_NOISE keeps its meaning.
        return (weight * (error.abs() + 2 * error.square())).mean() + 1e-3 * raw.square().mean()

    fit(net, loss_of, steps=steps, learning_rate=3e-3, seed=seed, progress=progress, report=report)
    set_normalisation(net, pixels[:200])
    return net


@torch.no_grad()
def set_normalisation(net: CausalAutoencoder, pixels: Tensor) -> None:
    """Set each channel's mean, and one spread for all, from clips uint8 [N, 3, T, Y, X]."""
    raw = torch.cat([net.raw_latents(part.float() / 127.5 - 1) for part in pixels.split(16)])
    net.mean.copy_(raw.mean(dim=(0, 2, 3, 4)))
    net.std.fill_((raw - net.mean[:, None, None, None]).square().mean().sqrt())
