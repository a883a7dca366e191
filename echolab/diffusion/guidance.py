"""Classifier-free guidance over text and audio, as a velocity function.

Three branches share the known latents and the reference picture (EchoMimicV3's pipeline):

    u  negative text, silence      n  text, silence      c  text, audio
    v = v_u + s_t (v_n - v_u) + s_a (v_c - v_n)
      = (1 - s_t) v_u + (s_t - s_a) v_n + s_a v_c

so a branch is worth running only where its coefficient is not zero.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from echolab.diffusion.flow import to_timesteps
from echolab.diffusion.sigmas import unshift_sigmas
from echolab.errors import ConfigError
from echolab.types import Conditions

Net = Callable[[Tensor, Tensor, Conditions], Tensor]
VelocityFunction = Callable[[Tensor, Tensor], Tensor]  # (noisy latents, sigma []) -> velocity
T = TypeVar("T")
OfSigma = Callable[[float], T]


def constant(value: T) -> OfSigma[T]:
    """The same at every sigma."""
    return lambda sigma: value


def _of_sigma(value: T | OfSigma[T]) -> OfSigma[T]:
    return value if callable(value) else constant(value)


def decaying(scale: float, shift: float) -> OfSigma[float]:
    """From `scale` at noise to half of it, most of the way in the first third of the steps.

    EchoMimicV3's dynamic guidance, s/2 + s/2 (1 - cos(pi r^5)) / 2 with r the share of the steps
    still to do; on a grid with this `shift`, r is the unshifted sigma.
    """

    def at(sigma: float) -> float:
        remaining = float(unshift_sigmas(torch.tensor(sigma, dtype=torch.float64), shift))
        return scale / 2 + scale / 2 * (1 - math.cos(math.pi * remaining**5)) / 2

    return at


def stepwise(values: Sequence[T], sigmas: Tensor) -> OfSigma[T]:
    """`values[i]` at step i of the grid `sigmas` [steps + 1]; the last value stays to the end."""

    def at(sigma: float) -> T:
        step = int((sigmas[:-1] > sigma + 1e-6).sum())
        return values[min(step, len(values) - 1)]

    return at


def negative_factors(scale: float, steps: int) -> list[float]:
    """What phase-aware negative guidance multiplies the negative text by: `scale`, then 1."""
    return [scale] * steps + [1.0]


def compounding_factors(scale: float, steps: int) -> list[float]:
    """The same as the released code does it: its product is written back at each of the steps."""
    return [scale ** (step + 1) for step in range(steps)]


def guided(
    net: Net,
    conditions: Conditions,
    *,
    text_negative: Tensor | OfSigma[Tensor] | None = None,
    text_scale: float | OfSigma[float] = 1.0,
    audio_scale: float | OfSigma[float] = 1.0,
) -> VelocityFunction:
    """The guided velocity of `net` for `conditions`; the branches needed run as one batch.

    `text_negative` [B, L, D] is the text of branch u, wanted whenever `text_scale` is not 1.
    The scales and the negative text may be functions of sigma (`decaying`, `stepwise`).
    Raises ConfigError if branch u is needed and there is no negative text.
    """
    text_scale_at, audio_scale_at = _of_sigma(text_scale), _of_sigma(audio_scale)
    silent = conditions._replace(audio=torch.zeros_like(conditions.audio))

    def negative(sigma: float) -> Conditions:
        if text_negative is None:
            scale = f"text_scale={text_scale_at(sigma):g}"
            raise ConfigError(f"{scale}: needs a negative text; give one, or set text_scale=1")
        text = _of_sigma(text_negative)(sigma)
        return silent._replace(text=text.expand_as(conditions.text))

    def velocity(noisy_latents: Tensor, sigma: Tensor) -> Tensor:
        level = float(sigma)
        by_text, by_audio = text_scale_at(level), audio_scale_at(level)
        branches = [(1 - by_text, negative), (by_text - by_audio, constant(silent))]
        branches += [(by_audio, constant(conditions))]
        needed = [(factor, at(level)) for factor, at in branches if factor]
        told = zip(*(conditions for _, conditions in needed), strict=True)
        stacked = Conditions(*(torch.cat(part) for part in told))
        many = noisy_latents.repeat(len(needed), *[1] * (noisy_latents.ndim - 1))
        timesteps = to_timesteps(sigma).to(many.device).expand(len(many))
        velocities = net(many, timesteps, stacked).float().chunk(len(needed))
        factors = velocities[0].new_tensor([factor for factor, _ in needed])
        return torch.einsum("n,nb...->b...", factors, torch.stack(velocities))

    return velocity
