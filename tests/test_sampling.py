"""Euler's method: exact where it must be, first order elsewhere."""

import pytest
import torch

from echolab.diffusion.sampling import sample_euler

START = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)


def error(steps: int) -> float:
    """dx / dsigma = x from sigma 1 to 0 ends at x / e."""
    found = sample_euler(lambda x, sigma: x, START, torch.linspace(1, 0, steps + 1))
    return abs(found.item() - 1 / torch.e)


def test_halving_the_step_halves_the_error() -> None:
    assert error(20) / error(40) == pytest.approx(2, rel=0.05)
    assert error(40) / error(80) == pytest.approx(2, rel=0.05)


def test_a_field_that_depends_on_sigma_alone_is_summed_on_the_grid_given() -> None:
    sigmas = torch.tensor([1.0, 0.7, 0.1, 0.0])
    found = sample_euler(lambda x, sigma: sigma.expand_as(x), START, sigmas)
    expected = 1 - (0.3 * 1.0 + 0.6 * 0.7 + 0.1 * 0.1)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_every_step_is_reported_and_nothing_keeps_a_graph() -> None:
    seen = []
    weight = torch.ones(1, requires_grad=True)
    found = sample_euler(
        lambda x, sigma: weight * x, START, torch.linspace(1, 0, 4), lambda i, x: seen.append(i)
    )
    assert seen == [0, 1, 2] and not found.requires_grad
