"""A small causal video autoencoder with the strides of the Wan VAE (4 in time, 8 in space).

It stands in for the Wan VAE where 127 M parameters are too many.  Frames are taken as 1, 4, 4, ...;
the first frame is repeated four times, so that a still clip has the same latent in every place and
a network can copy the first frame forward.  No latent frame sees a later one.

A patch of 4 x 8 x 8 pixels is coded by a linear basis (principal components: a good codec from the
first step) plus what convolutions over neighbouring patches add to it.

Shapes: B clips, T frames, F latent frames (T = 4 (F - 1) + 1), C latent channels, H = Y / 8,
W = X / 8.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from echolab.geometry import WAN, LatentGeometry

FRAMES, SIDE = WAN.time_stride, WAN.space_stride  # a patch, in frames and in pixels
PATCH_VALUES = 3 * FRAMES * SIDE**2


class Residual(nn.Module):
    """Two 3x3 convolutions around a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_out(functional.silu(self.conv_in(functional.silu(self.norm(x)))))


def to_patches(pixels: Tensor) -> Tensor:
    """[B, 3, T, Y, X] to [B F, 768, H, W]; the first frame fills a group of its own."""
    padded = torch.cat([pixels[:, :, :1].expand(-1, -1, FRAMES - 1, -1, -1), pixels], dim=2)
    return rearrange(
        padded, "b c (f k) (h p) (w q) -> (b f) (k c p q) h w", k=FRAMES, p=SIDE, q=SIDE
    )


def from_patches(patches: Tensor, clips: int) -> Tensor:
    """The inverse of `to_patches`; of the first group only the last frame is kept."""
    padded = rearrange(
        patches, "(b f) (k c p q) h w -> b c (f k) (h p) (w q)", b=clips, k=FRAMES, p=SIDE, q=SIDE
    )
    return padded[:, :, FRAMES - 1 :]


class CausalAutoencoder(nn.Module):
    """Pixels [B, 3, T, Y, X] in [-1, 1] to latents [B, C, F, H, W] and back."""

    mean: Tensor
    std: Tensor

    def __init__(self, *, channels: int = 16, width: int = 192, depth: int = 2) -> None:
        super().__init__()
        self.basis_in = nn.Conv2d(PATCH_VALUES, channels, 1)
        self.basis_out = nn.Conv2d(channels, PATCH_VALUES, 1)
        self.encoder = nn.Sequential(
            nn.Conv2d(PATCH_VALUES, width, 1),
            *(Residual(width) for _ in range(depth)),
            nn.Conv2d(width, channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(2 * channels, width, 3, padding=1),
            *(Residual(width) for _ in range(depth)),
            nn.Conv2d(width, PATCH_VALUES, 1),
        )
        for last in (self.encoder[-1], self.decoder[-1]):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    @property
    def geometry(self) -> LatentGeometry:
        """Wan's strides, with the channels of this network."""
        return WAN._replace(channels=len(self.mean))

    @torch.no_grad()
    def fit_basis(self, pixels: Tensor) -> None:
        """Set the linear part to the principal components of clips [B, 3, T, Y, X]."""
        patches = rearrange(to_patches(pixels), "n d h w -> (n h w) d")
        centre = patches.mean(0)
        covariance = (patches - centre).T @ (patches - centre) / len(patches)
        values, vectors = torch.linalg.eigh(covariance)
        channels = len(self.mean)
        basis = vectors[:, -channels:]
        # Half-way to white: with white latents an error in a patch's brightness, the first
        # component, would weigh no more than one in its finest detail, and samples look tiled.
        spread = values[-channels:].clamp(min=1e-6) ** 0.25
        self.basis_in.weight.copy_((basis / spread).T[:, :, None, None])
        assert self.basis_in.bias is not None and self.basis_out.bias is not None
        self.basis_in.bias.copy_(-(centre @ basis) / spread)
        self.basis_out.weight.copy_((basis * spread)[:, :, None, None])
        self.basis_out.bias.copy_(centre)

    def raw_latents(self, pixels: Tensor) -> Tensor:
        """Latents [B, C, F, H, W], not normalised."""
        patches = to_patches(pixels)
        latents = self.basis_in(patches) + self.encoder(patches)
        return rearrange(latents, "(b f) c h w -> b c f h w", b=pixels.shape[0])

    def raw_pixels(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, T, Y, X] of latents that are not normalised."""
        before = torch.cat([latents[:, :, :1], latents[:, :, :-1]], dim=2)  # causal: one step back
        now, both = (
            rearrange(x, "b c f h w -> (b f) c h w")
            for x in (latents, torch.cat([latents, before], dim=1))
        )
        return from_patches(self.basis_out(now) + self.decoder(both), latents.shape[0])

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents with mean 0 in each channel, and variance 1 over all of them, in training."""
        raw = self.raw_latents(pixels)
        return (raw - self.mean[:, None, None, None]) / self.std[:, None, None, None]

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of normalised latents, clipped to [-1, 1]."""
        raw = latents * self.std[:, None, None, None] + self.mean[:, None, None, None]
        return self.raw_pixels(raw).clamp(-1, 1)
