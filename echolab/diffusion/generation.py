"""Clips from a network: noise by key, guidance, the sampler.

The noise of a clip is a pure function of (seed, key, draw), so two checkpoints judged on the same
keys start from the same noise, whatever the batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from echolab.diffusion.guidance import Net, guided
from echolab.diffusion.sampling import sample_euler
from echolab.diffusion.sigmas import draw, sampling_sigmas
from echolab.types import Conditions


@torch.no_grad()
def generate(
    net: Net,
    conditions: Conditions,
    keys: list[str],
    *,
    steps: int,
    shift: float,
    audio_scale: float,
    seed: int,
    draw_index: int = 0,
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Latents [B, C, F, H, W] for conditions of B clips; the network runs in `dtype`."""
    shape = tuple(conditions.known_latents.shape[1:])
    device = conditions.known_latents.device
    noise = draw(keys, shape, seed=seed, epoch=0, draw_index=draw_index).noise.to(device)
    velocity = guided(net, conditions, audio_scale=audio_scale)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return sample_euler(velocity, noise, sampling_sigmas(steps, shift), on_step)
