"""Classifier-free guidance over text and audio, as a velocity function.

Three branches share the known latents and the reference image (EchoMimicV3's pipeline):

    u  negative text, silence      n  text, silence      c  text, audio
    v = v_u + s_t (v_n - v_u) + s_a (v_c - v_n)
      = (1 - s_t) v_u + (s_t - s_a) v_n + s_a v_c

Branches with coefficient zero are not run.  With s_t = 1 branch u is skipped, which yields the two
passes of EchoMimicV3's Flash: the same text with silence and with audio.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from echolab.diffusion.flow import to_timesteps
from echolab.diffusion.solvers import VelocityFunction
from echolab.diffusion.teacache import Net, branch_of
from echolab.errors import ConfigError
from echolab.types import Conditions

Branches = dict[str, Conditions]  # name (u, n, c) -> conditions, for nonzero coefficients only
CfgMode = Callable[[Net, Tensor, Tensor, Branches], list[Tensor]]
T = TypeVar("T")
SigmaFunction = Callable[[float], T]  # a setting that depends on the noise level


def constant(value: T) -> SigmaFunction[T]:
    """Return a function that is `value` at every sigma."""
    return lambda sigma: value


def _as_function(value: T | SigmaFunction[T]) -> SigmaFunction[T]:
    """Return `value` if it is a function of sigma, else the constant function."""
    return value if callable(value) else constant(value)


def dynamic_cfg_schedule(scale: float, steps: int) -> list[float]:
    """Return a scale per step, which decays to half of `scale`, mostly in the first third.

    EchoMimicV3's dynamic guidance is s/2 + s/2 (1 - cos(pi r^5)) / 2, where r is the fraction of
    remaining steps.
    """
    # Fraction of remaining steps, from 1 down.
    shares = [(steps - step) / steps for step in range(steps)]
    return [scale / 2 * (1 + (1 - math.cos(math.pi * share**5)) / 2) for share in shares]


def stepwise(values: Sequence[T], sigmas: Tensor) -> SigmaFunction[T]:
    """Return a function of sigma: `values[i]` at step i of `sigmas` [steps + 1].

    Later steps use the last value.
    """

    def at(sigma: float) -> T:
        # Levels above the current sigma are completed steps.
        step = int((sigmas[:-1] > sigma + 1e-6).sum())
        return values[min(step, len(values) - 1)]

    return at


def negative_factors(scale: float, steps: int) -> list[float]:
    """Return the factors of phase-aware negative guidance: `scale` for `steps` steps, then 1."""
    return [scale] * steps + [1.0]


def compounding_factors(scale: float, steps: int) -> list[float]:
    """Return the factors of the released code: for 1.5 and 3 steps 1.5, 2.25, then 3.375.

    The release multiplies the stored states at each of the first steps and never restores them.
    """
    return [scale ** (step + 1) for step in range(steps)] or [1.0]


def integer_timesteps(sigmas: Tensor) -> Tensor:
    """Return the timesteps of Wan's UniPC and DPM++: 1000 sigmas, rounded down to integers."""
    return to_timesteps(sigmas).floor()


def batched_cfg(
    net: Net, noisy_latents: Tensor, timestep: Tensor, branches: Branches
) -> list[Tensor]:
    """Return the branches' velocities [B, C, F, H, W] by one batched call: fastest, most memory."""
    # Concatenate each condition over the branches, and repeat the latents to match.
    columns = zip(*branches.values(), strict=True)
    stacked = Conditions(*(torch.cat(column) for column in columns))
    repeated = noisy_latents.repeat(len(branches), *[1] * (noisy_latents.ndim - 1))
    batched = branch_of(net, "".join(branches))
    velocities = batched(repeated, timestep.expand(len(repeated)), stacked).float()
    return list(velocities.chunk(len(branches)))


def sequential_cfg(
    net: Net, noisy_latents: Tensor, timestep: Tensor, branches: Branches
) -> list[Tensor]:
    """Return the branches' velocities by one call per branch: slower, least memory."""
    # With step caching, each branch has a separate cache.
    timesteps = timestep.expand(len(noisy_latents))
    return [
        branch_of(net, name)(noisy_latents, timesteps, conditions).float()
        for name, conditions in branches.items()
    ]


CFG_MODES: dict[str, CfgMode] = {"batched": batched_cfg, "sequential": sequential_cfg}


def _branch_conditions(
    conditions: Conditions,
    text_negative: Tensor | SigmaFunction[Tensor] | None,
    text_scale: SigmaFunction[float],
) -> dict[str, SigmaFunction[Conditions]]:
    """Return the conditions of each branch as functions of sigma."""
    # Silence is represented by zero features, as for dropped audio in training.
    silent = conditions._replace(audio=torch.zeros_like(conditions.audio))

    def negative(sigma: float) -> Conditions:
        if text_negative is None:
            scale = f"guidance_scale={text_scale(sigma):g}"
            raise ConfigError(f"{scale}: needs a negative text; give one, or set guidance_scale=1")
        text = _as_function(text_negative)(sigma)
        return silent._replace(text=text.expand_as(conditions.text))

    return {"u": negative, "n": constant(silent), "c": constant(conditions)}


def cfg_velocity(
    net: Net,
    conditions: Conditions,
    *,
    text_negative: Tensor | SigmaFunction[Tensor] | None = None,
    text_scale: float | SigmaFunction[float] = 1.0,
    audio_scale: float | SigmaFunction[float] = 1.0,
    cfg: CfgMode = batched_cfg,
    timestep_fn: Callable[[Tensor], Tensor] = to_timesteps,
) -> VelocityFunction:
    """Return the guided velocity function of `net` for `conditions`; `cfg` runs the branches.

    `text_negative` [B, L, D] is the text of branch u, required unless `text_scale` is 1.
    The scales and the negative text may be functions of sigma (`stepwise`).
    The velocity function raises ConfigError if branch u lacks a negative text.
    """
    text_scale_at, audio_scale_at = _as_function(text_scale), _as_function(audio_scale)
    branch_conditions = _branch_conditions(conditions, text_negative, text_scale_at)

    def velocity(noisy_latents: Tensor, sigma: Tensor) -> Tensor:
        # The coefficients sum to 1, so at least one branch is run.
        level = float(sigma)
        s_t, s_a = text_scale_at(level), audio_scale_at(level)
        coefficients = {"u": 1 - s_t, "n": s_t - s_a, "c": s_a}
        branches = {
            name: branch_conditions[name](level) for name, value in coefficients.items() if value
        }

        # Run the branches, then combine their velocities linearly.
        timestep = timestep_fn(sigma).to(noisy_latents.device)
        velocities = cfg(net, noisy_latents, timestep, branches)
        weights = velocities[0].new_tensor([coefficients[name] for name in branches])
        return torch.einsum("n,nb...->b...", weights, torch.stack(velocities))

    return velocity
