"""Sampling of a clip: sampler settings, presets of the demo and the released models, `generate`."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from echolab.diffusion.flow import to_timesteps
from echolab.diffusion.guidance import (
    CFG_MODES,
    cfg_velocity,
    compounding_factors,
    dynamic_cfg_schedule,
    integer_timesteps,
    negative_factors,
    stepwise,
)
from echolab.diffusion.sigmas import SIGMA_SCHEDULES, draw_noise, sampling_sigmas
from echolab.diffusion.solvers import (
    OnStep,
    Solver,
    VelocityFunction,
    sample_dpmpp,
    sample_euler,
    sample_unipc,
)
from echolab.diffusion.teacache import Net
from echolab.errors import ConfigError
from echolab.geometry import WAN, LatentGeometry
from echolab.types import Conditions

SOLVERS: dict[str, Solver] = {
    "euler": sample_euler,
    "unipc": sample_unipc,
    "dpmpp": sample_dpmpp,
}
NEGATIVES = {"phase": negative_factors, "compounding": compounding_factors}
TIMESTEPS = {"exact": to_timesteps, "integer": integer_timesteps}


class SamplerConfig(NamedTuple):
    """Settings of a sampling run; most strings are keys of the tables above."""

    solver: str  # key of SOLVERS
    sigma_schedule: str  # key of sigmas.SIGMA_SCHEDULES: noise levels before the shift
    num_steps: int
    flow_shift: float
    guidance_scale: float  # text guidance; 1 disables it
    audio_guidance_scale: float
    dynamic_guidance: bool  # whether scales other than 1 decay to half of their value
    negative_prompt: str  # text of the negative branch
    negative_scale: float  # factor on the negative text's states in the first steps
    negative_steps: int  # number of steps with `negative_scale`
    negative_mode: str  # key of NEGATIVES
    timesteps: str  # key of TIMESTEPS: exact or rounded down
    window: int  # frames sampled at once, 4n + 1
    overlap: int  # latent frames shared by joint windows, frames shared by chunks
    by_clip: bool  # whether windows have equal length and separately encoded audio, as in training


# The sampler of the small demo models.
DEMO = SamplerConfig(
    solver="euler", sigma_schedule="even", num_steps=12, flow_shift=3.0, guidance_scale=1.0,
    audio_guidance_scale=2.0, dynamic_guidance=False, negative_prompt="", negative_scale=1.0,
    negative_steps=0, negative_mode="phase", timesteps="exact", window=25, overlap=2, by_clip=True,
)  # fmt: skip
# From infer_preview.py, which uses negative_mode="compounding".
PREVIEW = SamplerConfig(
    solver="euler", sigma_schedule="flow_match", num_steps=25, flow_shift=5.0, guidance_scale=4.0,
    audio_guidance_scale=2.9, dynamic_guidance=True,
    negative_prompt="Gesture is bad. Gesture is unclear. Strange and twisted hands. "
    "Bad hands. Bad fingers. Unclear and blurry hands. "
    "手部快速摆动, 手指频繁抽搐, 夸张手势, 重复机械性动作.",
    negative_scale=1.5, negative_steps=3, negative_mode="phase", timesteps="exact",
    window=113, overlap=8, by_clip=False,
)  # fmt: skip
# From run_flash.sh, whose pipeline does not apply its text scale of 6.
FLASH = SamplerConfig(
    solver="unipc", sigma_schedule="wan", num_steps=8, flow_shift=5.0, guidance_scale=1.0,
    audio_guidance_scale=3.0, dynamic_guidance=False, negative_prompt="", negative_scale=1.0,
    negative_steps=0, negative_mode="phase", timesteps="integer", window=81, overlap=8,
    by_clip=False,
)  # fmt: skip
PRESETS = {"demo": DEMO, "preview": PREVIEW, "flash": FLASH}


def check_clip_length(name: str, frames: int, geometry: LatentGeometry) -> None:
    """Raise ConfigError unless the number of frames is a valid clip length."""
    if not geometry.is_clip_length(frames):
        near = geometry.near_clip_length(frames)
        raise ConfigError(f"{name}={frames}: must be {geometry.clip_lengths} frames; {near} is one")


def check_sampler(config: SamplerConfig, geometry: LatentGeometry = WAN) -> SamplerConfig:
    """Return `config`; raise ConfigError for a value out of range."""
    # Check the range of each value, then the signs.
    if config.num_steps < 1:
        raise ConfigError(f"num_steps={config.num_steps}: must be 1 or more")
    if not 0 < config.flow_shift < 100:
        raise ConfigError(f"flow_shift={config.flow_shift}: must lie between 0 and 100; 5 is usual")
    for name in ("guidance_scale", "audio_guidance_scale", "negative_scale"):
        if not math.isfinite(getattr(config, name)):
            raise ConfigError(f"{name}={getattr(config, name)}: must be a number")
    check_clip_length("window", config.window, geometry)
    if config.guidance_scale < 0 or config.audio_guidance_scale < 0 or config.negative_steps < 0:
        raise ConfigError(
            f"guidance_scale={config.guidance_scale}, "
            f"audio_guidance_scale={config.audio_guidance_scale}, "
            f"negative_steps={config.negative_steps}: must be 0 or more"
        )
    return config


def sampler_sigmas(config: SamplerConfig) -> Tensor:
    """Return the shifted noise levels [steps + 1]."""
    return SIGMA_SCHEDULES[config.sigma_schedule](config.num_steps, config.flow_shift)


def sampler_timesteps(config: SamplerConfig) -> Tensor:
    """Return the network's timestep of each step.  [steps]."""
    return TIMESTEPS[config.timesteps](sampler_sigmas(config)[:-1])


def guided_velocity(
    net: Net, conditions: Conditions, config: SamplerConfig, negative: Tensor | None, cfg: str
) -> VelocityFunction:
    """Return the guided velocity function with the settings of `config`.

    `negative` [1, L, D] holds the states of the negative text; `cfg` is a key of
    `guidance.CFG_MODES`.
    """
    # Scales per step: constant, or decaying to half of their value.
    sigmas, steps = sampler_sigmas(config), config.num_steps
    dynamic = config.dynamic_guidance
    text, audio = (
        stepwise(dynamic_cfg_schedule(scale, steps) if dynamic and scale != 1 else [scale], sigmas)
        for scale in (config.guidance_scale, config.audio_guidance_scale)
    )
    # Negative text per step, scaled in the first steps.
    factors = NEGATIVES[config.negative_mode](config.negative_scale, config.negative_steps)
    texts = None if negative is None else stepwise([f * negative for f in factors], sigmas)
    return cfg_velocity(
        net, conditions, text_negative=texts, text_scale=text, audio_scale=audio,
        cfg=CFG_MODES[cfg], timestep_fn=TIMESTEPS[config.timesteps],
    )  # fmt: skip


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
    on_step: OnStep | None = None,
) -> Tensor:
    """Return latents [B, C, F, H, W] for conditions of B clips; run the network in `dtype`.

    The noise of a clip is a pure function of (seed, key, draw index), so that two checkpoints
    evaluated on the same keys start from the same noise, in any batch.
    """
    # Draw the noise on the CPU, so that it does not depend on the device.
    shape = tuple(conditions.known_latents.shape[1:])
    device = conditions.known_latents.device
    noise = draw_noise(keys, shape, seed=seed, epoch=0, draw_index=draw_index).noise.to(device)
    # Use audio guidance only, and the Euler solver.
    velocity = cfg_velocity(net, conditions, audio_scale=audio_scale)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return sample_euler(velocity, noise, sampling_sigmas(steps, shift), on_step)
