"""Guidance as a sum of branches: ends, skipped branches, scales over the steps."""

import pytest
import tiny
import torch
from torch import Tensor

from echolab.diffusion.guidance import (
    compounding_factors,
    decaying,
    guided,
    negative_factors,
    stepwise,
)
from echolab.diffusion.sampling import sample_euler
from echolab.diffusion.sigmas import sampling_sigmas
from echolab.errors import ConfigError

NOISY, SIGMA = tiny.latents(), torch.tensor(0.7)
TOLD = tiny.conditions()
NEGATIVE = torch.full_like(TOLD.text[:1], 0.3)  # one text for every clip
NET = tiny.net(trained=True)


def branch(*, text: bool = True, audio: bool = True) -> Tensor:
    told = TOLD if text else TOLD._replace(text=NEGATIVE.expand_as(TOLD.text))
    told = told if audio else told._replace(audio=torch.zeros_like(told.audio))
    return NET(NOISY, torch.full((2,), 700.0), told)


def counting(calls: list[int]):
    def net(noisy: Tensor, timesteps: Tensor, conditions) -> Tensor:
        calls.append(len(noisy))
        return NET(noisy, timesteps, conditions)

    return net


@torch.no_grad()
def test_scales_of_one_are_the_conditional_and_of_zero_the_unconditional() -> None:
    torch.testing.assert_close(guided(NET, TOLD)(NOISY, SIGMA), branch())
    nothing = guided(NET, TOLD, text_negative=NEGATIVE, text_scale=0.0, audio_scale=0.0)
    torch.testing.assert_close(nothing(NOISY, SIGMA), branch(text=False, audio=False))
    silent = guided(NET, TOLD, audio_scale=0.0)
    torch.testing.assert_close(silent(NOISY, SIGMA), branch(audio=False))


@torch.no_grad()
def test_it_is_the_released_sum_of_three_branches() -> None:
    u, n, c = branch(text=False, audio=False), branch(audio=False), branch()
    expected = u + 4.0 * (n - u) + 2.9 * (c - n)
    velocity = guided(NET, TOLD, text_negative=NEGATIVE, text_scale=4.0, audio_scale=2.9)
    torch.testing.assert_close(velocity(NOISY, SIGMA), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("text_scale", "audio_scale", "branches"),
    [(1, 1, 1), (1, 3, 2), (4, 1, 3), (4, 4, 2), (4, 3, 3)],
)
@torch.no_grad()
def test_only_branches_that_count_are_run(text_scale, audio_scale, branches) -> None:
    calls: list[int] = []
    velocity = guided(
        counting(calls),
        TOLD,
        text_negative=NEGATIVE,
        text_scale=text_scale,
        audio_scale=audio_scale,
    )
    velocity(NOISY, SIGMA)
    assert calls == [2 * branches], "one batch of the branches needed"


def test_text_guidance_without_a_negative_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="text_scale=4"):
        guided(NET, TOLD, text_scale=4.0)(NOISY, SIGMA)


def test_the_decaying_scale_has_the_published_factors() -> None:
    sigmas, scale = sampling_sigmas(25, 5.0), decaying(4.0, 5.0)
    factors = [scale(float(sigmas[step])) / 4.0 for step in (0, 2, 5, 10, 20)]
    assert factors == pytest.approx([1.00, 0.87, 0.62, 0.51, 0.50], abs=0.006)


def test_phase_aware_negative_guidance_fixed_and_as_released() -> None:
    sigmas = sampling_sigmas(6, 5.0)
    fixed = stepwise(negative_factors(1.5, 3), sigmas)
    released = stepwise(compounding_factors(1.5, 3), sigmas)
    steps = [float(sigma) for sigma in sigmas[:-1]]
    assert [fixed(sigma) for sigma in steps] == [1.5, 1.5, 1.5, 1, 1, 1]
    assert [released(sigma) for sigma in steps] == [1.5, 2.25, *[3.375] * 4]


@torch.no_grad()
def test_the_negative_text_may_change_with_the_step() -> None:
    sigmas = sampling_sigmas(4, 3.0)
    texts = stepwise([factor * NEGATIVE for factor in negative_factors(2.0, 2)], sigmas)
    changing = guided(NET, TOLD, text_negative=texts, text_scale=3.0)
    early = guided(NET, TOLD, text_negative=2 * NEGATIVE, text_scale=3.0)
    late = guided(NET, TOLD, text_negative=NEGATIVE, text_scale=3.0)
    for step, same in enumerate([early, early, late, late]):
        assert torch.equal(changing(NOISY, sigmas[step]), same(NOISY, sigmas[step]))


def test_it_samples() -> None:
    velocity = guided(NET, TOLD, text_negative=NEGATIVE, text_scale=decaying(4.0, 5.0))
    found = sample_euler(velocity, tiny.latents(), sampling_sigmas(2, 5.0))
    assert found.shape == NOISY.shape and found.isfinite().all()
