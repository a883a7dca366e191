"""Noise levels, and all the random numbers of a training step.

A step's randomness is a pure function of (seed, epoch, sample key, draw index): the same clip meets
the same noise on any rank, in any batch, before and after a resume.
"""

from hashlib import blake2b

import torch
from torch import Tensor

from echolab.errors import ConfigError
from echolab.types import Draws

GRID = 1000  # training noise levels, as in Wan's scheduler


def shift_sigmas(u: Tensor, shift: float) -> Tensor:
    """Move uniform levels towards noise: s u / (1 + (s - 1) u).  Fixes 0 and 1, is monotone.

    With shift 5 half of all draws have sigma above 0.83.
    """
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """The inverse of `shift_sigmas`: how much of the sampling is still to be done."""
    return sigmas / (shift - (shift - 1) * sigmas)


def sampling_sigmas(steps: int, shift: float) -> Tensor:
    """The levels of a sampling run, from 1 down to 0.  [steps + 1]."""
    if steps < 1:
        raise ConfigError(f"steps={steps}: sampling needs at least one step; set steps=1 or more")
    return shift_sigmas(torch.linspace(1, 0, steps + 1), shift)


def _generator(seed: int, epoch: int, key: str, draw_index: int) -> torch.Generator:
    digest = blake2b(f"{seed}/{epoch}/{draw_index}/{key}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw(
    keys: list[str],
    shape: tuple[int, ...],
    *,
    seed: int,
    epoch: int,
    draw_index: int = 0,
    shift: float = 5.0,
) -> Draws:
    """Noise, sigmas and uniforms for the clips named by `keys`, on the CPU in fp32.

    `shape` is (C, F, H, W) of one clip.  Sigma is uniform over the shifted grid of 1000 levels
    (VideoX-Fun `train.py`, `--uniform_sampling`), so it lies in (0, 1].  The small numbers are
    drawn before the noise: a clip keeps its sigma when its size changes.
    """
    levels, uniforms, noise = [], [], []
    for key in keys:
        generator = _generator(seed, epoch, key, draw_index)
        levels.append(torch.randint(1, GRID + 1, (), generator=generator))
        uniforms.append(torch.rand(2, generator=generator))
        noise.append(torch.randn(shape, generator=generator))
    sigmas = shift_sigmas(torch.stack(levels).float() / GRID, shift)
    return Draws(torch.stack(noise), sigmas, torch.stack(uniforms))
