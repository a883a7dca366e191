"""From noise to latents along a velocity field.

Every solver is called as `solver(velocity, noise, sigmas, on_step) -> latents` with the levels it
has to use, already shifted.
"""

from collections.abc import Callable

import torch
from torch import Tensor

VelocityFunction = Callable[[Tensor, Tensor], Tensor]  # (noisy latents, sigma []) -> velocity
OnStep = Callable[[int, Tensor], None]  # (step, latents after it)
Solver = Callable[[VelocityFunction, Tensor, Tensor, OnStep | None], Tensor]


@torch.no_grad()
def sample_euler(
    velocity: VelocityFunction,
    noise: Tensor,
    sigmas: Tensor,
    on_step: OnStep | None = None,
) -> Tensor:
    """Follow `velocity` from `noise` [B, C, F, H, W] over `sigmas` [steps + 1], in fp32.

    Euler's method, of first order.  `on_step(step, latents)` is told of every step.
    """
    latents = noise.float()
    levels = sigmas.float().to(latents.device)
    for step, (sigma, lower) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        latents = latents + (lower - sigma) * velocity(latents, sigma).float()
        if on_step is not None:
            on_step(step, latents)
    return latents
