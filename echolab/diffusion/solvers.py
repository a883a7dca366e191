"""ODE solvers from noise to latents along a velocity field: Euler, UniPC and DPM-Solver++.

Every solver is called as `solver(velocity, noise, sigmas, on_step) -> latents` with shifted levels.
UniPC and DPM-Solver++ are multistep solvers, implemented by diffusers' schedulers.  For windows of
a long video the velocities are blended first (`long_video.windowed_velocity`), so that a solver
integrates one velocity field with one history.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

VelocityFunction = Callable[[Tensor, Tensor], Tensor]  # (noisy latents, sigma []) -> velocity
OnStep = Callable[[int, Tensor], None]  # (step, latents after the step)
Solver = Callable[[VelocityFunction, Tensor, Tensor, OnStep | None], Tensor]

ORDER = 2  # order of UniPC and DPM-Solver++, as in Wan
PURE_NOISE = 1 - 1e-6  # maximum level for diffusers' schedulers, which compute log(1 - level)


@torch.no_grad()
def sample_euler(
    velocity: VelocityFunction,
    noise: Tensor,
    sigmas: Tensor,
    on_step: OnStep | None = None,
) -> Tensor:
    """Integrate `velocity` from `noise` [B, C, F, H, W] over `sigmas` [steps + 1], in fp32.

    Use Euler's first-order method; call `on_step(step, latents)` after every step.
    """
    latents = noise.float()
    levels = sigmas.float().to(latents.device)
    for step, (sigma, lower) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        # The velocity is d latents / d sigma, so a step to a lower sigma subtracts it.
        latents = latents + (lower - sigma) * velocity(latents, sigma).float()
        if on_step is not None:
            on_step(step, latents)
    return latents


def sample_unipc(
    velocity: VelocityFunction,
    noise: Tensor,
    sigmas: Tensor,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample like `sample_euler`, by second-order UniPC (arXiv 2302.04867), diffusers."""
    # Import here, because training samples only by Euler steps and does not need diffusers.
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        solver_order=ORDER, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )
    return _sample_with(scheduler, velocity, noise, sigmas, on_step)


def sample_dpmpp(
    velocity: VelocityFunction,
    noise: Tensor,
    sigmas: Tensor,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample like `sample_euler`, by second-order DPM-Solver++ (arXiv 2211.01095), diffusers."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        solver_order=ORDER, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )
    return _sample_with(scheduler, velocity, noise, sigmas, on_step)


@torch.no_grad()
def _sample_with(
    scheduler: Any,
    velocity: VelocityFunction,
    noise: Tensor,
    sigmas: Tensor,
    on_step: OnStep | None,
) -> Tensor:
    """Integrate `velocity` with a diffusers scheduler over exactly `sigmas`."""
    # Keep latents in fp32 between steps, for a network of any dtype.
    latents = noise.float()
    levels = sigmas.float().to(latents.device)
    # Replace the scheduler's levels, so that the shift is not applied twice.
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas.float().cpu().clamp(max=PURE_NOISE)
    scheduler.set_begin_index(0)
    for step, (timestep, sigma) in enumerate(zip(scheduler.timesteps, levels[:-1], strict=True)):
        output = velocity(latents, sigma).float()
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
        if on_step is not None:
            on_step(step, latents)
    return latents
