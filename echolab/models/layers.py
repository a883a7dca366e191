"""Pieces of the transformer: patches, times, positions, attention.

Shapes: B clips, S tokens of a clip, D width, N heads, d = D / N.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class PatchEmbedding(nn.Conv3d):
    """Tokens from patches that do not overlap, with the parameters of Wan's Conv3d.

    A convolution whose stride is its kernel is a matrix product; as one it is several times faster
    on CPUs, and in bf16 on GPUs it does not depend on a 3-D convolution kernel being there.
    """

    def __init__(self, channels: int, dim: int, patch: tuple[int, int, int]):
        super().__init__(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, S, D], row-major over (frames, rows, columns)."""
        p, q, r = self.kernel_size
        patches = rearrange(latents, "b c (f p) (h q) (w r) -> b (f h w) (c p q r)", p=p, q=q, r=r)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class Linear32(nn.Linear):
    """A linear layer that computes in fp32, whatever its parameters and autocast say."""

    def forward(self, values: Tensor) -> Tensor:
        """[..., in] -> [..., out], fp32."""
        with torch.autocast(values.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(values.float(), self.weight.float(), bias)


class RMSNorm(nn.RMSNorm):
    """Over all channels, before they are split into heads; the weight follows the values' dtype.

    Under autocast the two differ, for which torch has no fused kernel.
    """

    def forward(self, values: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return F.rms_norm(values, self.normalized_shape, self.weight.type_as(values), self.eps)


def sinusoid(timesteps: Tensor, dim: int) -> Tensor:
    """Wan's embedding of timesteps [B] in 0..1000: cosines, then sines.  [B, dim], fp32.

    In fp64 within: 1000 radians in fp32 would be off by 3e-5, and this is B numbers.
    """
    half = dim // 2
    powers = torch.arange(half, dtype=torch.float64, device=timesteps.device) / half
    angles = timesteps.double()[:, None] * torch.pow(10000.0, -powers)
    return torch.cat([angles.cos(), angles.sin()], 1).float()


def rope_split(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that turn with time, row and column: 44, 42, 42 of 128."""
    third = 2 * (head_dim // 6)
    return head_dim - 2 * third, third, third


@lru_cache(maxsize=32)
def rope_table(head_dim: int, grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """Unit complex numbers that turn channel pairs by their position.  [S, 1, head_dim / 2]."""
    axes = []
    with torch.inference_mode(False):  # made in validation, it must still serve in training
        for axis, (channels, length) in enumerate(zip(rope_split(head_dim), grid, strict=True)):
            powers = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
            positions = torch.arange(length, dtype=torch.float64, device=device)
            angles = torch.outer(positions, torch.pow(10000.0, -powers))
            shape = [1, 1, 1, -1]
            shape[axis] = length
            axes.append(angles.reshape(shape).expand(*grid, -1))
        angles = torch.cat(axes, -1).flatten(0, 2)[:, None]
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def turn(heads: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding of adjacent channel pairs.  [B, S, N, d] and [S, 1, d / 2]."""
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).type_as(heads)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention over heads: [B, S, N, d], [B, K, N, d] twice -> [B, S, N * d]."""
    q, k, v = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    if values.device.type == "cpu":
        # torch's bf16 attention on CPUs takes several times as long backwards as fp32's.
        with torch.autocast("cpu", enabled=False):
            mixed = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    else:
        mixed = F.scaled_dot_product_attention(q, k, v)
    return mixed.transpose(1, 2).flatten(2).type_as(values)
