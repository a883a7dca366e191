"""Classifier-free guidance over text and audio, as a velocity function.

Three branches share the known latents and the reference picture (EchoMimicV3's pipeline):

    u  negative text, silence      n  text, silence      c  text, audio
    v = v_u + s_t (v_n - v_u) + s_a (v_c - v_n)
      = (1 - s_t) v_u + (s_t - s_a) v_n + s_a v_c

so a branch is worth running only where its coefficient is not zero.  With s_t = 1 branch u is not
run: those are the two passes of EchoMimicV3's Flash, the same text in silence and with sound.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from echolab.diffusion.flow import to_timesteps
from echolab.diffusion.teacache import Net, branch_of
from echolab.errors import ConfigError
from echolab.types import Conditions

VelocityFunction = Callable[[Tensor, Tensor], Tensor]  # (noisy latents, sigma []) -> velocity
Branches = dict[str, Conditions]  # u, n, c: those whose coefficient is not zero
Run = Callable[[Net, Tensor, Tensor, Branches], list[Tensor]]
T = TypeVar("T")
OfSigma = Callable[[float], T]


def constant(value: T) -> OfSigma[T]:
    """The same at every sigma."""
    return lambda sigma: value


def _of_sigma(value: T | OfSigma[T]) -> OfSigma[T]:
    return value if callable(value) else constant(value)


def decaying(scale: float, steps: int) -> list[float]:
    """For each step a scale from `scale` down to half of it, most of the way in the first third.

    EchoMimicV3's dynamic guidance, s/2 + s/2 (1 - cos(pi r^5)) / 2 with r the share of the steps
    still to do.
    """
    shares = [(steps - step) / steps for step in range(steps)]
    return [scale / 2 * (1 + (1 - math.cos(math.pi * share**5)) / 2) for share in shares]


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
    """The same as the released code does it, for parity: 1.5, 2.25, 3.375, and 3.375 to the end.

    Its product is written back at each of the steps, and never taken back.
    """
    return [scale ** (step + 1) for step in range(steps)] or [1.0]


def whole_timesteps(sigmas: Tensor) -> Tensor:
    """What Wan's own UniPC and DPM++ tell the network: 1000 sigmas, cut to whole numbers."""
    return to_timesteps(sigmas).floor()


def as_one_batch(
    net: Net, noisy_latents: Tensor, timestep: Tensor, branches: Branches
) -> list[Tensor]:
    """The branches' velocities [B, C, F, H, W] from one call: fastest, with the most memory."""
    told = zip(*branches.values(), strict=True)
    stacked = Conditions(*(torch.cat(part) for part in told))
    many = noisy_latents.repeat(len(branches), *[1] * (noisy_latents.ndim - 1))
    whole = branch_of(net, "".join(branches))
    return list(whole(many, timestep.expand(len(many)), stacked).float().chunk(len(branches)))


def one_by_one(
    net: Net, noisy_latents: Tensor, timestep: Tensor, branches: Branches
) -> list[Tensor]:
    """The same from a call for each branch: the memory of one."""
    timesteps = timestep.expand(len(noisy_latents))
    return [
        branch_of(net, name)(noisy_latents, timesteps, told).float()
        for name, told in branches.items()
    ]


RUNS: dict[str, Run] = {"batch": as_one_batch, "sequence": one_by_one}


def guided(
    net: Net,
    conditions: Conditions,
    *,
    text_negative: Tensor | OfSigma[Tensor] | None = None,
    text_scale: float | OfSigma[float] = 1.0,
    audio_scale: float | OfSigma[float] = 1.0,
    run: Run = as_one_batch,
    told_timesteps: Callable[[Tensor], Tensor] = to_timesteps,
) -> VelocityFunction:
    """The guided velocity of `net` for `conditions`; `run` calls it for the branches needed.

    `text_negative` [B, L, D] is the text of branch u, wanted whenever `text_scale` is not 1.
    The scales and the negative text may be functions of sigma (`stepwise`).
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
        # They sum to 1, so that one branch is left at least.
        factors = {"u": 1 - by_text, "n": by_text - by_audio, "c": by_audio}
        told = {"u": negative, "n": constant(silent), "c": constant(conditions)}
        branches = {name: told[name](level) for name, factor in factors.items() if factor}
        timestep = told_timesteps(sigma).to(noisy_latents.device)
        velocities = run(net, noisy_latents, timestep, branches)
        weights = velocities[0].new_tensor([factors[name] for name in branches])
        return torch.einsum("n,nb...->b...", weights, torch.stack(velocities))

    return velocity
