"""Two solvers that remember the step before, through diffusers' schedulers: UniPC and DPM-Solver++.

They are called as `sampling.sample_euler` is.  Where windows of a long video share a step their
velocities are blended first (`windows.windowed`), so that a solver sees one field of the whole
video and keeps one history.
"""

from typing import Any

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from echolab.diffusion.sampling import OnStep, VelocityFunction

ORDER = 2  # of both, as in Wan
PURE_NOISE = 1 - 1e-6  # the highest level for a scheduler: at 1 it takes the logarithm of 0


@torch.no_grad()
def _sample_with(
    scheduler: Any,
    velocity: VelocityFunction,
    noise: Tensor,
    sigmas: Tensor,
    on_step: OnStep | None,
) -> Tensor:
    """Follow `velocity` with a diffusers scheduler over exactly `sigmas`."""
    latents = noise.float()
    levels = sigmas.float().to(latents.device)
    scheduler.set_timesteps(len(sigmas) - 1)
    # Its own levels are replaced: only so is the shift in them once, and the grid ours to choose.
    scheduler.sigmas = sigmas.float().cpu().clamp(max=PURE_NOISE)
    scheduler.set_begin_index(0)
    for step, (timestep, sigma) in enumerate(zip(scheduler.timesteps, levels[:-1], strict=True)):
        told = velocity(latents, sigma).float()
        latents = scheduler.step(told, timestep, latents, return_dict=False)[0]
        if on_step is not None:
            on_step(step, latents)
    return latents


def sample_unipc(
    velocity: VelocityFunction,
    noise: Tensor,
    sigmas: Tensor,
    on_step: OnStep | None = None,
) -> Tensor:
    """As `sample_euler`, by UniPC of second order (arXiv 2302.04867) from diffusers."""
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
    """As `sample_euler`, by DPM-Solver++ of second order (arXiv 2211.01095) from diffusers."""
    scheduler = DPMSolverMultistepScheduler(
        solver_order=ORDER, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )
    return _sample_with(scheduler, velocity, noise, sigmas, on_step)
