"""A video of any length by a recipe, in windows that share every denoising step."""

from collections.abc import Callable

import torch
from torch import Tensor

from echolab.diffusion.pipeline import SOLVERS, Recipe, sigmas_of, velocity_of
from echolab.diffusion.sampling import OnStep
from echolab.diffusion.teacache import Net, branch_of
from echolab.diffusion.windows import window_conditions, windowed, windows
from echolab.geometry import WAN, LatentGeometry
from echolab.types import Conditions


def window_latents(recipe: Recipe, geometry: LatentGeometry = WAN) -> int:
    """Return the latent frames of a window."""
    return geometry.latent_frames(recipe.window)


@torch.no_grad()
def sample_windows(
    net: Net,
    conditions: Conditions,
    recipe: Recipe,
    noise: Tensor,
    *,
    negative: Tensor | None = None,
    branches: str = "batch",
    told: Callable[[Conditions, int, int], Conditions] = window_conditions,
    dtype: torch.dtype = torch.float32,
    on_step: OnStep | None = None,
) -> Tensor:
    """Latents [B, C, F, H, W] from noise of that shape; the network runs in `dtype`.

    One window where the clip is not longer.  `negative` [1, L, D] are the states of the recipe's
    negative text; `branches` is a key of `guidance.RUNS`; `told` gives the conditions of latent
    frames [start, stop).
    """
    geometry = WAN._replace(time_stride=conditions.known.shape[1])
    spans = windows(noise.shape[2], window_latents(recipe, geometry), recipe.overlap)
    velocities = [
        velocity_of(
            branch_of(net, f"window {start}"), told(conditions, start, stop),
            recipe, negative, branches,
        )
        for start, stop in spans
    ]  # fmt: skip
    with torch.autocast(noise.device.type, dtype, enabled=dtype != torch.float32):
        solver = SOLVERS[recipe.solver]
        return solver(windowed(velocities, spans), noise, sigmas_of(recipe), on_step)
