"""The curve of the paper's figure, and the two modes in which it acts."""

import pytest
import torch
from tiny import conditions

from echolab.diffusion.phases import (
    FLAT,
    PHDA,
    PHDA_BY_PROGRESS,
    ModalityDropout,
    ModalityScaling,
    Ramp,
    without_dropout,
)

TIMESTEPS = torch.linspace(0, 1000, 1001)


def test_the_curve_has_the_corners_of_the_figure() -> None:
    at = PHDA(torch.tensor([0.0, 300, 450, 600, 650, 800, 1000]))
    assert at.text.tolist() == [1.0] * 7
    assert at.image.tolist() == pytest.approx([0.5, 0.5, 0.75, 1, 1, 1, 1])
    assert at.audio.tolist() == pytest.approx([0.5, 0.5, 0.5, 0.5 + 1 / 6, 0.75, 1, 1])


def test_ramps_are_continuous_and_monotone() -> None:
    for ramp in PHDA:
        steps = ramp(TIMESTEPS).diff()
        assert (steps >= 0).all() and steps.max() < 0.01
    assert Ramp(0.2, 0.2, 0, 1000)(TIMESTEPS).unique().tolist() == pytest.approx([0.2])


def test_the_other_reading_of_the_axis_is_the_mirror_image() -> None:
    for ramp, mirrored in zip(PHDA, PHDA_BY_PROGRESS, strict=True):
        torch.testing.assert_close(ramp(TIMESTEPS), mirrored(1000 - TIMESTEPS))


def test_dropout_zeroes_if_the_uniform_is_not_below_the_weight() -> None:
    context = conditions(4)
    uniforms = torch.tensor([[0.4, 0.6], [0.6, 0.4], [0.6, 0.6], [0.4, 0.4]])
    kept, weights = ModalityDropout(PHDA)(context, torch.full((4,), 100.0), uniforms)
    assert weights is None
    assert kept.image.flatten(1).any(1).tolist() == [True, False, False, True]
    assert kept.audio.flatten(1).any(1).tolist() == [False, True, False, True]
    assert torch.equal(kept.image[0], context.image[0]) and torch.equal(kept.text, context.text)


def test_a_flat_curve_keeps_everything() -> None:
    context = conditions(2)
    kept, _ = ModalityDropout(FLAT)(context, torch.tensor([0.0, 999.0]), torch.full((2, 2), 0.9999))
    assert all(torch.equal(a, b) for a, b in zip(kept, context, strict=True))


def test_the_share_kept_is_the_weight() -> None:
    context = conditions(1)
    many = type(context)(*(part.expand(2000, *part.shape[1:]) for part in context))
    uniforms = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
    kept, _ = ModalityDropout(PHDA)(many, torch.full((2000,), 450.0), uniforms)
    assert kept.image.flatten(1).any(1).float().mean().item() == pytest.approx(0.75, abs=0.03)


def test_scaling_keeps_every_condition() -> None:
    context = conditions(2)
    same, weights = ModalityScaling(PHDA)(context, torch.tensor([0.0, 1000.0]), torch.zeros(2, 2))
    assert same is context and weights is not None
    assert weights.audio.tolist() == [0.5, 1.0]


def test_a_preference_is_trained_with_every_condition() -> None:
    context, uniforms = conditions(2), torch.full((2, 2), 0.999)
    for timesteps in (torch.zeros(2), torch.full((2,), 1000.0)):
        kept, weights = without_dropout(ModalityDropout(PHDA))(context, timesteps, uniforms)
        assert weights is None
        assert torch.equal(kept.image, context.image) and torch.equal(kept.audio, context.audio)
    assert without_dropout(ModalityScaling(PHDA)) == ModalityScaling(
        PHDA
    )  # nothing is zeroed there
