"""Solvers: exact on fields they solve exactly, of their order on others, on the given noise
levels.
"""

import math

import pytest
import tiny
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from echolab.diffusion.pipeline import (
    DEMO,
    FLASH,
    PREVIEW,
    SOLVERS,
    sampler_sigmas,
    sampler_timesteps,
)
from echolab.diffusion.sigmas import sampling_sigmas
from echolab.diffusion.solvers import sample_euler

START = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)


def error(steps: int) -> float:
    """Solve dx / dsigma = x from sigma 1 to 0, which ends at x / e."""
    actual = sample_euler(lambda x, sigma: x, START, torch.linspace(1, 0, steps + 1))
    return abs(actual.item() - 1 / torch.e)


def test_halving_the_step_halves_the_error() -> None:
    assert error(20) / error(40) == pytest.approx(2, rel=0.05)
    assert error(40) / error(80) == pytest.approx(2, rel=0.05)


def test_a_field_of_sigma_alone_is_summed_on_the_given_grid() -> None:
    sigmas = torch.tensor([1.0, 0.7, 0.1, 0.0])
    actual = sample_euler(lambda x, sigma: sigma.expand_as(x), START, sigmas)
    expected = 1 - (0.3 * 1.0 + 0.6 * 0.7 + 0.1 * 0.1)
    assert actual.item() == pytest.approx(expected, rel=1e-6)


def test_every_step_is_reported_and_nothing_keeps_a_graph() -> None:
    seen = []
    weight = torch.ones(1, requires_grad=True)
    actual = sample_euler(
        lambda x, sigma: weight * x, START, torch.linspace(1, 0, 4), lambda i, x: seen.append(i)
    )
    assert seen == [0, 1, 2] and not actual.requires_grad


def curved_error(solver: str, steps: int) -> float:
    """Solve a curved path: dx / dsigma = x + sigma from 1 at sigma 0.9 to sigma 0.1."""
    sigmas, start = torch.linspace(0.9, 0.1, steps + 1), torch.ones(1, 1, 1, 1, 1)
    actual = SOLVERS[solver](lambda x, sigma: x + sigma, start, sigmas, None)
    truth = 2.9 * math.exp(-0.8) - 0.1 - 1  # x = c e^sigma - sigma - 1
    return abs(actual.item() - truth)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("unipc", 2), ("dpmpp", 2)])
def test_solvers_converge_with_their_order(solver: str, order: int) -> None:
    falls = math.log2(curved_error(solver, 10) / curved_error(solver, 40)) / 2
    assert falls > order - 0.3
    if order > 1:
        assert curved_error(solver, 10) < 0.2 * curved_error("euler", 10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_straight_path_is_followed_to_its_end(solver: str) -> None:
    noise, data = tiny.latents(1, 2), tiny.latents(1, 3)
    actual = SOLVERS[solver](lambda x, sigma: noise - data, noise, sampling_sigmas(8, 5.0), None)
    torch.testing.assert_close(actual, data, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("recipe", [DEMO, PREVIEW, FLASH], ids=["demo", "preview", "flash"])
def test_the_shift_is_applied_once(solver: str, recipe) -> None:
    """The levels equal the formula by hand, and those of the latents."""
    seen: list[tuple[float, float]] = []
    noise, data = torch.tensor(2.0).reshape(1, 1, 1, 1, 1), 0.0

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        seen.append((float(sigma), latents.item() / 2))
        return noise - data

    SOLVERS[solver](velocity, noise, sampler_sigmas(recipe), None)
    shift, count = recipe.flow_shift, recipe.num_steps
    lowest = shift / 1000 / (1 + (shift - 1) / 1000)
    even = {
        "even": [1 - k / count for k in range(count)],
        "wan": [0.999 * (1 - k / count) for k in range(count)],
        "flow_match": [1 - (1 - lowest) * k / (count - 1) for k in range(count)],
    }[recipe.sigma_schedule]
    by_hand = [shift * u / (1 + (shift - 1) * u) for u in even]
    assert [level for level, _ in seen] == pytest.approx(by_hand, abs=1e-6)
    assert [level for _, level in seen] == pytest.approx(by_hand, abs=1e-3)


def test_unipc_equals_the_scheduler_on_its_own_levels() -> None:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    scheduler.set_timesteps(8)
    noise, net = tiny.latents(), torch.nn.Conv3d(tiny.CHANNELS, tiny.CHANNELS, 1)
    latents, levels = noise, scheduler.sigmas.clone()
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            latents = scheduler.step(net(latents).tanh(), timestep, latents).prev_sample
    actual = SOLVERS["unipc"](lambda x, sigma: net(x).tanh(), noise, levels, None)
    torch.testing.assert_close(actual, latents)


def test_flash_has_eight_integer_timesteps() -> None:
    assert sampler_timesteps(FLASH).tolist() == [999, 972, 937, 892, 833, 749, 624, 416]
    assert FLASH.solver == "unipc" and len(sampler_sigmas(FLASH)) == 9
