"""The flow path: its ends, its derivative, and that following the derivative leads back to the
data.
"""

import torch

from echolab.diffusion.flow import denoised, interpolate, to_timesteps, velocity_target
from echolab.diffusion.sigmas import sampling_sigmas
from echolab.diffusion.solvers import sample_euler

LATENTS, NOISE = torch.randn(2, 3, 4, 2, 2, 2)  # each [3, 4, 2, 2, 2]


def test_the_paths_ends_are_data_and_noise() -> None:
    assert torch.equal(interpolate(LATENTS, NOISE, torch.zeros(3)), LATENTS)
    assert torch.equal(interpolate(LATENTS, NOISE, torch.ones(3)), NOISE)


def test_the_target_is_the_derivative_of_the_path() -> None:
    below, above = (interpolate(LATENTS, NOISE, torch.full((3,), s)) for s in (0.25, 0.75))
    torch.testing.assert_close((above - below) / 0.5, velocity_target(LATENTS, NOISE))


def test_each_clip_has_its_own_sigma_and_denoised_inverts() -> None:
    sigmas = torch.tensor([0.1, 0.5, 1.0])
    noisy = interpolate(LATENTS, NOISE, sigmas)
    for clip in range(3):
        alone = interpolate(
            LATENTS[clip : clip + 1], NOISE[clip : clip + 1], sigmas[clip : clip + 1]
        )
        assert torch.equal(alone[0], noisy[clip])
    actual = denoised(noisy, velocity_target(LATENTS, NOISE), sigmas)
    torch.testing.assert_close(actual, LATENTS, atol=1e-5, rtol=1e-5)


def test_the_path_is_fp32_for_any_input_dtype() -> None:
    half = interpolate(LATENTS.bfloat16(), NOISE, torch.full((3,), 0.3))
    assert half.dtype == velocity_target(LATENTS.bfloat16(), NOISE).dtype == torch.float32


def test_following_the_true_velocity_returns_the_latents() -> None:
    actual = sample_euler(lambda noisy, sigma: NOISE - LATENTS, NOISE, sampling_sigmas(7, 5.0))
    torch.testing.assert_close(actual, LATENTS, atol=1e-5, rtol=1e-5)


def test_timesteps_are_1000_times_sigma() -> None:
    assert to_timesteps(torch.tensor([0.0, 0.25, 1.0])).tolist() == [0.0, 250.0, 1000.0]
