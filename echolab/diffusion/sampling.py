"""From noise to latents along a velocity field."""

from collections.abc import Callable

import torch
from torch import Tensor

VelocityFunction = Callable[[Tensor, Tensor], Tensor]  # (noisy latents, sigma []) -> velocity


@torch.no_grad()
def sample_euler(
    velocity: VelocityFunction,
    noise: Tensor,
    sigmas: Tensor,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Follow `velocity` from `noise` [B, C, F, H, W] over `sigmas` [steps + 1], in fp32.

    Euler's method: the local error is of second order, and it has no history to mix up when
    windows of a long video share a step.  `on_step(step, latents)` is told of every step.
    """
    latents = noise.float()
    levels = sigmas.float().to(latents.device)
    for step, (sigma, lower) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        latents = latents + (lower - sigma) * velocity(latents, sigma).float()
        if on_step is not None:
            on_step(step, latents)
    return latents
