"""Classifier-free guidance over text and audio, as a velocity function.

Three branches share the known latents and the reference image (EchoMimicV3's pipeline):

    u  negative text, silence      n  text, silence      c  text, audio
    v = v_u + s_t (v_n - v_u) + s_a (v_c - v_n)
      = (1 - s_t) v_u + (s_t - s_a) v_n + s_a v_c

so a branch is only worth running if its coefficient is not zero.  With s_t = 1 branch u is not
run: those are the two passes of EchoMimicV3's Flash, the same text in silence and with audio.
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

Branches = dict[str, Conditions]  # u, n, c: those whose coefficient is not zero
CfgMode = Callable[[Net, Tensor, Tensor, Branches], list[Tensor]]
T = TypeVar("T")
OfSigma = Callable[[float], T]


def constant(value: T) -> OfSigma[T]:
    """Return a function that is `value` at every sigma."""
    return lambda sigma: value


def _of_sigma(value: T | OfSigma[T]) -> OfSigma[T]:
    """Return `value` if it is a function of sigma, else the constant function."""
    return value if callable(value) else constant(value)


def dynamic_cfg_schedule(scale: float, steps: int) -> list[float]:
    """Return a scale for each step, from `scale` down to half of it, mostly in the first third.

    EchoMimicV3's dynamic guidance, s/2 + s/2 (1 - cos(pi r^5)) / 2 with r the share of the steps
    that are left.
    """
    # The share of the steps that are left, from 1 down.
    shares = [(steps - step) / steps for step in range(steps)]
    return [scale / 2 * (1 + (1 - math.cos(math.pi * share**5)) / 2) for share in shares]


def stepwise(values: Sequence[T], sigmas: Tensor) -> OfSigma[T]:
    """Return `values[i]` at step i of the grid `sigmas` [steps + 1]; the last value stays."""

    def at(sigma: float) -> T:
        step = int((sigmas[:-1] > sigma + 1e-6).sum())
        return values[min(step, len(values) - 1)]

    return at


def negative_factors(scale: float, steps: int) -> list[float]:
    """Return the factors of the negative text in phase-aware negative guidance: `scale`, then 1."""
    return [scale] * steps + [1.0]


def compounding_factors(scale: float, steps: int) -> list[float]:
    """Return the factors as the released code has them: 1.5, 2.25, 3.375, and 3.375 to the end.

    The release writes the product back at each of the steps, and never takes it back.
    """
    return [scale ** (step + 1) for step in range(steps)] or [1.0]


def integer_timesteps(sigmas: Tensor) -> Tensor:
    """Return the timesteps of Wan's own UniPC and DPM++: 1000 sigmas, cut to integers."""
    return to_timesteps(sigmas).floor()


def batched_cfg(
    net: Net, noisy_latents: Tensor, timestep: Tensor, branches: Branches
) -> list[Tensor]:
    """Return the branches' velocities [B, C, F, H, W] by one call: fastest, with most memory."""
    # Stack each kind of condition over the branches, and repeat the latents to match.
    columns = zip(*branches.values(), strict=True)
    stacked = Conditions(*(torch.cat(column) for column in columns))
    repeated = noisy_latents.repeat(len(branches), *[1] * (noisy_latents.ndim - 1))
    batched = branch_of(net, "".join(branches))
    velocities = batched(repeated, timestep.expand(len(repeated)), stacked).float()
    return list(velocities.chunk(len(branches)))


def sequential_cfg(
    net: Net, noisy_latents: Tensor, timestep: Tensor, branches: Branches
) -> list[Tensor]:
    """Return the branches' velocities by a call for each: the memory of one."""
    timesteps = timestep.expand(len(noisy_latents))
    return [
        branch_of(net, name)(noisy_latents, timesteps, conditions).float()
        for name, conditions in branches.items()
    ]


CFG_MODES: dict[str, CfgMode] = {"batched": batched_cfg, "sequential": sequential_cfg}


def _branch_conditions(
    conditions: Conditions,
    text_negative: Tensor | OfSigma[Tensor] | None,
    text_scale: OfSigma[float],
) -> dict[str, OfSigma[Conditions]]:
    """Return the conditions of each branch as functions of sigma."""
    # Silence is features of zeros, as in training when audio is dropped.
    silent = conditions._replace(audio=torch.zeros_like(conditions.audio))

    def negative(sigma: float) -> Conditions:
        if text_negative is None:
            scale = f"guidance_scale={text_scale(sigma):g}"
            raise ConfigError(f"{scale}: needs a negative text; give one, or set guidance_scale=1")
        text = _of_sigma(text_negative)(sigma)
        return silent._replace(text=text.expand_as(conditions.text))

    return {"u": negative, "n": constant(silent), "c": constant(conditions)}


def guided(
    net: Net,
    conditions: Conditions,
    *,
    text_negative: Tensor | OfSigma[Tensor] | None = None,
    text_scale: float | OfSigma[float] = 1.0,
    audio_scale: float | OfSigma[float] = 1.0,
    cfg: CfgMode = batched_cfg,
    timestep_fn: Callable[[Tensor], Tensor] = to_timesteps,
) -> VelocityFunction:
    """Return the guided velocity of `net` for `conditions`; `cfg` calls it for the branches.

    `text_negative` [B, L, D] is the text of branch u, needed whenever `text_scale` is not 1.
    The scales and the negative text may be functions of sigma (`stepwise`).
    Raises ConfigError if branch u is needed and there is no negative text.
    """
    text_scale_at, audio_scale_at = _of_sigma(text_scale), _of_sigma(audio_scale)
    branch_conditions = _branch_conditions(conditions, text_negative, text_scale_at)

    def velocity(noisy_latents: Tensor, sigma: Tensor) -> Tensor:
        # The factors sum to 1, so that at least one branch is left.
        level = float(sigma)
        by_text, by_audio = text_scale_at(level), audio_scale_at(level)
        factors = {"u": 1 - by_text, "n": by_text - by_audio, "c": by_audio}
        branches = {
            name: branch_conditions[name](level) for name, factor in factors.items() if factor
        }

        # Run the branches and mix their velocities.
        timestep = timestep_fn(sigma).to(noisy_latents.device)
        velocities = cfg(net, noisy_latents, timestep, branches)
        weights = velocities[0].new_tensor([factors[name] for name in branches])
        return torch.einsum("n,nb...->b...", weights, torch.stack(velocities))

    return velocity
