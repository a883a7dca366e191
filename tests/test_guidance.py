"""Guidance as a sum of branches: limits, skipped branches, scales over the steps."""

import pytest
import tiny
import torch
from torch import Tensor

from echolab.diffusion.guidance import (
    CFG_MODES,
    cfg_velocity,
    compounding_factors,
    dynamic_cfg_schedule,
    integer_timesteps,
    negative_factors,
    stepwise,
)
from echolab.diffusion.sigmas import SIGMA_SCHEDULES, sampling_sigmas
from echolab.diffusion.solvers import sample_euler
from echolab.errors import ConfigError

NOISY, SIGMA = tiny.latents(), torch.tensor(0.7)
CONDITIONS = tiny.conditions()
NEGATIVE = torch.full_like(CONDITIONS.text[:1], 0.3)  # one text for every clip
NET = tiny.net(trained=True)


def branch(*, text: bool = True, audio: bool = True) -> Tensor:
    context = CONDITIONS if text else CONDITIONS._replace(text=NEGATIVE.expand_as(CONDITIONS.text))
    context = context if audio else context._replace(audio=torch.zeros_like(context.audio))
    return NET(NOISY, torch.full((2,), 700.0), context)


def counting(calls: list[int]):
    def net(noisy: Tensor, timesteps: Tensor, conditions) -> Tensor:
        calls.append(len(noisy))
        return NET(noisy, timesteps, conditions)

    return net


@torch.no_grad()
def test_scales_of_one_are_the_conditional_and_of_zero_the_unconditional() -> None:
    torch.testing.assert_close(cfg_velocity(NET, CONDITIONS)(NOISY, SIGMA), branch())
    nothing = cfg_velocity(NET, CONDITIONS, text_negative=NEGATIVE, text_scale=0.0, audio_scale=0.0)
    torch.testing.assert_close(nothing(NOISY, SIGMA), branch(text=False, audio=False))
    silent = cfg_velocity(NET, CONDITIONS, audio_scale=0.0)
    torch.testing.assert_close(silent(NOISY, SIGMA), branch(audio=False))


@torch.no_grad()
def test_guidance_is_the_released_sum_of_three_branches() -> None:
    u, n, c = branch(text=False, audio=False), branch(audio=False), branch()
    expected = u + 4.0 * (n - u) + 2.9 * (c - n)
    velocity = cfg_velocity(
        NET, CONDITIONS, text_negative=NEGATIVE, text_scale=4.0, audio_scale=2.9
    )
    torch.testing.assert_close(velocity(NOISY, SIGMA), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("text_scale", "audio_scale", "branches"),
    [(1, 1, 1), (1, 3, 2), (4, 1, 3), (4, 4, 2), (4, 3, 3)],
)
@torch.no_grad()
def test_only_branches_with_a_weight_are_run(text_scale, audio_scale, branches) -> None:
    calls: list[int] = []
    velocity = cfg_velocity(
        counting(calls),
        CONDITIONS,
        text_negative=NEGATIVE,
        text_scale=text_scale,
        audio_scale=audio_scale,
    )
    velocity(NOISY, SIGMA)
    assert calls == [2 * branches], "one batch of the branches needed"


def test_text_guidance_without_a_negative_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="guidance_scale=4"):
        cfg_velocity(NET, CONDITIONS, text_scale=4.0)(NOISY, SIGMA)


@torch.no_grad()
def test_flash_guides_between_silence_and_audio_with_one_text() -> None:
    zero, real = branch(audio=False), branch()
    actual = cfg_velocity(NET, CONDITIONS, audio_scale=3.0)(NOISY, SIGMA)
    torch.testing.assert_close(actual, zero + 3.0 * (real - zero), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("run", "sizes"), [("batched", [6]), ("sequential", [2, 2, 2])])
@torch.no_grad()
def test_batched_and_sequential_branches_are_equal(run: str, sizes: list[int]) -> None:
    calls: list[int] = []
    scales = {"text_negative": NEGATIVE, "text_scale": 4.0, "audio_scale": 2.9}
    actual = cfg_velocity(counting(calls), CONDITIONS, cfg=CFG_MODES[run], **scales)(NOISY, SIGMA)
    assert calls == sizes
    torch.testing.assert_close(actual, cfg_velocity(NET, CONDITIONS, **scales)(NOISY, SIGMA))


@torch.no_grad()
def test_the_network_may_get_integer_timesteps_as_from_wans_solvers() -> None:
    seen: list[float] = []

    def net(noisy: Tensor, timesteps: Tensor, conditions) -> Tensor:
        seen.extend(timesteps.tolist())
        return noisy

    cfg_velocity(net, CONDITIONS, timestep_fn=integer_timesteps)(NOISY, torch.tensor(0.9998))
    cfg_velocity(net, CONDITIONS)(NOISY, torch.tensor(0.75))
    assert seen == [999.0, 999.0, 750.0, 750.0]


def test_the_dynamic_schedule_has_the_published_factors() -> None:
    factors = dynamic_cfg_schedule(1.0, 25)
    assert len(factors) == 25
    actual = [factors[step] for step in (0, 2, 5, 10, 20)]
    assert actual == pytest.approx([1.00, 0.87, 0.62, 0.51, 0.50], abs=0.005)
    assert dynamic_cfg_schedule(4.0, 25) == pytest.approx([4 * factor for factor in factors])


@pytest.mark.parametrize("grid", SIGMA_SCHEDULES)
def test_phase_aware_negative_guidance_fixed_and_as_released(grid: str) -> None:
    sigmas = SIGMA_SCHEDULES[grid](6, 5.0)
    fixed = stepwise(negative_factors(1.5, 3), sigmas)
    released = stepwise(compounding_factors(1.5, 3), sigmas)
    steps = [float(sigma) for sigma in sigmas[:-1]]
    assert [fixed(sigma) for sigma in steps] == [1.5, 1.5, 1.5, 1, 1, 1]
    assert [released(sigma) for sigma in steps] == [1.5, 2.25, *[3.375] * 4]
    assert negative_factors(1.5, 0) == compounding_factors(1.5, 0) == [1.0]


@torch.no_grad()
def test_the_negative_text_may_change_with_the_step() -> None:
    sigmas = sampling_sigmas(4, 3.0)
    texts = stepwise([factor * NEGATIVE for factor in negative_factors(2.0, 2)], sigmas)
    changing = cfg_velocity(NET, CONDITIONS, text_negative=texts, text_scale=3.0)
    early = cfg_velocity(NET, CONDITIONS, text_negative=2 * NEGATIVE, text_scale=3.0)
    late = cfg_velocity(NET, CONDITIONS, text_negative=NEGATIVE, text_scale=3.0)
    for step, same in enumerate([early, early, late, late]):
        assert torch.equal(changing(NOISY, sigmas[step]), same(NOISY, sigmas[step]))


def test_a_guided_network_is_sampled() -> None:
    sigmas = sampling_sigmas(2, 5.0)
    scale = stepwise(dynamic_cfg_schedule(4.0, 2), sigmas)
    velocity = cfg_velocity(NET, CONDITIONS, text_negative=NEGATIVE, text_scale=scale)
    actual = sample_euler(velocity, tiny.latents(), sigmas)
    assert actual.shape == NOISY.shape and actual.isfinite().all()
