"""Noise levels and the randomness of a step."""

import pytest
import torch

from echolab.diffusion.sigmas import draw, sampling_sigmas, shift_sigmas, unshift_sigmas
from echolab.errors import ConfigError

SHAPE = (2, 1, 2, 2)


def test_shift_fixes_the_ends_is_monotone_and_has_an_inverse() -> None:
    u = torch.linspace(0, 1, 101)
    for shift in (1.0, 3.0, 5.0):
        sigmas = shift_sigmas(u, shift)
        assert sigmas[0] == 0 and sigmas[-1] == 1 and (sigmas.diff() > 0).all()
        torch.testing.assert_close(unshift_sigmas(sigmas, shift), u)
    assert torch.equal(shift_sigmas(u, 1.0), u)


def test_sampling_goes_from_noise_to_data_once_shifted() -> None:
    sigmas = sampling_sigmas(4, 5.0)
    expected = [1.0, 5 * 0.75 / (1 + 4 * 0.75), 5 * 0.5 / 3, 5 * 0.25 / 2, 0.0]
    assert sigmas.tolist() == pytest.approx(expected)
    with pytest.raises(ConfigError, match="steps=0"):
        sampling_sigmas(0, 5.0)


def test_draws_depend_on_the_key_and_not_on_the_company() -> None:
    together = draw(["a", "b", "c"], SHAPE, seed=1, epoch=2)
    alone = draw(["b"], SHAPE, seed=1, epoch=2)
    for many, one in zip(together, alone, strict=True):
        assert torch.equal(many[1:2], one)


@pytest.mark.parametrize("change", [{"seed": 2}, {"epoch": 3}, {"draw_index": 1}])
def test_draws_differ_by_seed_epoch_and_index(change: dict[str, int]) -> None:
    usual = {"seed": 1, "epoch": 2, "draw_index": 0}
    one, other = draw(["a"], SHAPE, **usual), draw(["a"], SHAPE, **(usual | change))
    assert not torch.equal(one.noise, other.noise)
    assert not torch.equal(one.uniforms, other.uniforms)


def test_draws_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw(["a"], SHAPE, seed=1, epoch=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_have_the_laws_they_claim() -> None:
    draws = draw([str(index) for index in range(4000)], (1, 1, 1, 4), seed=0, epoch=0)
    assert draws.sigmas.min() > 0 and draws.sigmas.max() <= 1
    u = unshift_sigmas(draws.sigmas, 5.0)
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
    small, large = (draw(["a"], shape, seed=1, epoch=1) for shape in (SHAPE, (16, 2, 4, 4)))
    assert torch.equal(small.sigmas, large.sigmas)
    assert torch.equal(small.uniforms, large.uniforms)
