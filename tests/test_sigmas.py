"""Noise levels and the randomness of a step."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from echolab.diffusion.sigmas import (
    SIGMA_SCHEDULES,
    draw_noise,
    flow_match_sigmas,
    sampling_sigmas,
    shift_sigmas,
    wan_sigmas,
)
from echolab.errors import ConfigError

SHAPE = (2, 1, 2, 2)


def test_shift_fixes_the_ends_and_is_monotone() -> None:
    u = torch.linspace(0, 1, 101)
    for shift in (1.0, 3.0, 5.0):
        sigmas = shift_sigmas(u, shift)
        assert sigmas[0] == 0 and sigmas[-1] == 1 and (sigmas.diff() > 0).all()
    assert torch.equal(shift_sigmas(u, 1.0), u)


def test_sampling_goes_from_noise_to_data_once_shifted() -> None:
    sigmas = sampling_sigmas(4, 5.0)
    expected = [1.0, 5 * 0.75 / (1 + 4 * 0.75), 5 * 0.5 / 3, 5 * 0.25 / 2, 0.0]
    assert sigmas.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("grid", SIGMA_SCHEDULES)
def test_every_grid_decreases_to_zero(grid: str) -> None:
    for steps in (1, 8, 25):
        sigmas = SIGMA_SCHEDULES[grid](steps, 5.0)
        assert len(sigmas) == steps + 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
        assert sigmas[0] > 0.999 and sigmas.dtype == torch.float32
    with pytest.raises(ConfigError, match="steps=0"):
        SIGMA_SCHEDULES[grid](0, 5.0)


def test_the_grid_of_the_released_preview_equals_the_schedulers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(25)
    torch.testing.assert_close(flow_match_sigmas(25, 5.0), scheduler.sigmas)


def test_the_grid_of_wan_equals_the_schedulers() -> None:
    """The oracle is diffusers' DPM++, which has Wan's levels by its own shift or by ours."""
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    scheduler.set_timesteps(8)
    torch.testing.assert_close(wan_sigmas(8, 5.0), scheduler.sigmas)
    eighth = 0.999 / 8
    by_hand = [5 * k * eighth / (1 + 4 * k * eighth) for k in range(8, -1, -1)]
    assert wan_sigmas(8, 5.0).tolist() == pytest.approx(by_hand)


def test_draws_depend_on_the_key_and_not_on_the_batch() -> None:
    together = draw_noise(["a", "b", "c"], SHAPE, seed=1, epoch=2)
    alone = draw_noise(["b"], SHAPE, seed=1, epoch=2)
    for many, one in zip(together, alone, strict=True):
        assert torch.equal(many[1:2], one)


@pytest.mark.parametrize("change", [{"seed": 2}, {"epoch": 3}, {"draw_index": 1}])
def test_draws_differ_by_seed_epoch_and_index(change: dict[str, int]) -> None:
    usual = {"seed": 1, "epoch": 2, "draw_index": 0}
    one, other = draw_noise(["a"], SHAPE, **usual), draw_noise(["a"], SHAPE, **(usual | change))
    assert not torch.equal(one.noise, other.noise)
    assert not torch.equal(one.uniforms, other.uniforms)


def test_draws_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw_noise(["a"], SHAPE, seed=1, epoch=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_have_their_distribution() -> None:
    draws = draw_noise([str(index) for index in range(4000)], (1, 1, 1, 4), seed=0, epoch=0)
    assert draws.sigmas.min() > 0 and draws.sigmas.max() <= 1
    u = draws.sigmas / (5 - 4 * draws.sigmas)  # before the shift
    assert u.mean().item() == pytest.approx(0.5, abs=0.02)
    assert (draws.sigmas > 5 / 6).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert draws.noise.mean().item() == pytest.approx(0, abs=0.03)
    assert draws.noise.std().item() == pytest.approx(1, abs=0.03)
    assert draws.uniforms.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    # the numbers of a clip do not lean on each other
    columns = torch.cat([u[:, None], draws.uniforms, draws.noise.flatten(1)], 1)
    off_diagonal = torch.corrcoef(columns.T) - torch.eye(columns.shape[1])
    assert off_diagonal.abs().max() < 0.06


def test_a_clip_keeps_its_sigma_when_its_size_changes() -> None:
    small, large = (draw_noise(["a"], shape, seed=1, epoch=1) for shape in (SHAPE, (16, 2, 4, 4)))
    assert torch.equal(small.sigmas, large.sigmas)
    assert torch.equal(small.uniforms, large.uniforms)
