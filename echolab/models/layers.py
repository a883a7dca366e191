"""Layers of the transformer: patch embedding, norms, timestep embedding, RoPE.

Shapes: B clips, S tokens of a clip, D width, N heads, d = D / N.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class PatchEmbedding(nn.Conv3d):
    """Tokens from non-overlapping patches, with the parameters of Wan's Conv3d.

    A convolution whose stride equals its kernel is a matrix product, which is several times faster
    on CPUs, and in bf16 on GPUs needs no 3-D convolution kernel.
    """

    def __init__(self, channels: int, dim: int, patch: tuple[int, int, int]):
        super().__init__(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, latents: Tensor) -> Tensor:
        """Map [B, C, F, H, W] to [B, S, D], row-major over (frames, rows, columns)."""
        # Flatten patches in the layout of the convolution's weight, then multiply.
        p, q, r = self.kernel_size
        patches = rearrange(latents, "b c (f p) (h q) (w r) -> b (f h w) (c p q r)", p=p, q=q, r=r)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class ImageEmbedding(nn.Module):
    """CLIP tokens [B, N, image_dim] -> [B, N, D]."""

    def __init__(self, image_dim: int, dim: int):
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Project the tokens; zeros mean no image."""
        return self.proj(image)


class Linear32(nn.Linear):
    """A linear layer that computes in fp32, for parameters of any dtype and under autocast."""

    def forward(self, values: Tensor) -> Tensor:
        """Map [..., in] to [..., out], in fp32."""
        with torch.autocast(values.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(values.float(), self.weight.float(), bias)


class _RootMeanSquare(torch.autograd.Function):
    """RMS norm that saves only its input and one number per row for the backward pass.

    torch has a fused kernel only on GPUs; elsewhere autograd would save two more tensors of the
    input's size and access memory twice as often.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, eps: float) -> Tensor:
        # Compute in fp32 or more: fp64 inputs remain fp64, for gradient checks.
        dtype = torch.promote_types(values.dtype, torch.float32)
        length = torch.linalg.vector_norm(values, dim=-1, keepdim=True, dtype=dtype)
        inverse = length.square_().div_(values.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(values, weight, inverse)
        return torch.mul(values, inverse).mul_(weight).type_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return r w g - x r^3 mean(x w g), with r the inverse, and the sum of r x g over rows."""
        values, weight, inverse = ctx.saved_tensors
        gradient, factors = gradient.to(inverse.dtype), weight.to(inverse.dtype)
        # Row means of x w g by one matrix product.
        product = (gradient * values).flatten(0, -2)
        rows = inverse.view(-1)
        means = (product @ factors).mul_(rows.pow(3)).div_(values.shape[-1])
        to_values = torch.mul(gradient, factors).mul_(inverse)
        to_values.addcmul_(values, means.view_as(inverse), value=-1)
        return to_values.type_as(values), (rows @ product).type_as(weight), None


class RMSNorm(nn.RMSNorm):
    """RMS norm over all channels, before they are split into heads; computed in fp32.

    On GPUs the weight is cast to the values' dtype: if the two differ, as under autocast, torch
    does not use its fused kernel.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Normalize [..., D] over the last dimension."""
        if values.device.type == "cpu":
            normed: Tensor = _RootMeanSquare.apply(values, self.weight, self.eps)
            return normed
        return F.rms_norm(values, self.normalized_shape, self.weight.type_as(values), self.eps)


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Apply a layer norm without parameters, then scale and shift [B, 1, D] in fp32.  [B, S, D].

    1 + scale and shift are passed as weight and bias of the layer norm, so that each clip needs one
    kernel, which saves only its input for the backward pass.
    """
    # Use one layer norm per clip, since scale and shift differ between clips.
    shape = tokens.shape[-1:]
    clips = zip(tokens.float(), 1 + scale[:, 0], shift[:, 0], strict=True)
    normed = [F.layer_norm(clip, shape, weight, bias, eps) for clip, weight, bias in clips]
    return (normed[0][None] if len(normed) == 1 else torch.stack(normed)).type_as(tokens)


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Return Wan's embedding of timesteps [B] in 0..1000: cosines, then sines.  [B, dim], fp32.

    Compute in fp64, which is cheap for B values: in fp32, 1000 radians have an error of 3e-5.
    """
    # Frequencies from 1 down to 1 / 10000.
    half = dim // 2
    powers = torch.arange(half, dtype=torch.float64, device=timesteps.device) / half
    angles = timesteps.double()[:, None] * torch.pow(10000.0, -powers)
    return torch.cat([angles.cos(), angles.sin()], 1).float()


def rope_split(head_dim: int) -> tuple[int, int, int]:
    """Return the numbers of head channels for time, row and column: 44, 42, 42 of 128."""
    # Rows and columns get an even third each, time the rest.
    third = 2 * (head_dim // 6)
    return head_dim - 2 * third, third, third


@lru_cache(maxsize=32)
def rope_freqs(head_dim: int, grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """Return cosines and sines that rotate channel pairs by position.  [S, 1, head_dim / 2, 2]."""
    # Compute the angles of each axis in fp64, and expand them over the grid.
    axes = []
    with torch.inference_mode(False):  # a table cached in validation is reused in training
        for axis, (channels, length) in enumerate(zip(rope_split(head_dim), grid, strict=True)):
            powers = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
            positions = torch.arange(length, dtype=torch.float64, device=device)
            angles = torch.outer(positions, torch.pow(10000.0, -powers))
            shape = [1, 1, 1, -1]
            shape[axis] = length
            axes.append(angles.reshape(shape).expand(*grid, -1))
        angles = torch.cat(axes, -1).flatten(0, 2)[:, None]
        return torch.stack([angles.cos(), angles.sin()], -1).float()


def apply_rope(heads: Tensor, freqs: Tensor) -> Tensor:
    """Rotate adjacent channel pairs by their position.  [B, S, N, d] and [S, 1, d / 2, 2]."""
    pairs = heads.float().unflatten(-1, (-1, 2))
    # Inductor does not fuse complex arithmetic; in eager mode it needs only one pass over memory.
    if torch.compiler.is_compiling():
        (x, y), (cos, sin) = pairs.unbind(-1), freqs.unbind(-1)
        rotated = torch.stack([x * cos - y * sin, x * sin + y * cos], -1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(freqs))
    return rotated.flatten(-2).type_as(heads)
