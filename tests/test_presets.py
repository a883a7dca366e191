"""The released presets, and their effect on guidance and on long clips."""

import math

import pytest
import tiny
import torch
from torch import Tensor

from echolab.diffusion.guidance import cfg_velocity
from echolab.diffusion.long_video import sample_windows, window_latents
from echolab.diffusion.pipeline import (
    DEMO,
    FLASH,
    PRESETS,
    PREVIEW,
    SOLVERS,
    check_sampler,
    guided_velocity,
    sampler_sigmas,
)
from echolab.diffusion.solvers import sample_euler
from echolab.errors import ConfigError

NET, CONDITIONS, NOISY = tiny.net(trained=True), tiny.conditions(1), tiny.latents(1)
NEGATIVE = torch.full_like(CONDITIONS.text, 0.3)


def test_the_presets_equal_the_released_settings() -> None:
    assert PREVIEW[:7] == ("euler", "flow_match", 25, 5.0, 4.0, 2.9, True)
    assert PREVIEW.negative_scale == 1.5 and PREVIEW.negative_steps == 3
    assert FLASH[:7] == ("unipc", "wan", 8, 5.0, 1.0, 3.0, False)
    assert (PREVIEW.window, PREVIEW.overlap, window_latents(PREVIEW)) == (113, 8, 29)
    assert all(check_sampler(recipe) is recipe for recipe in PRESETS.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_steps": 0}, "num_steps=0"), ({"flow_shift": 0.0}, "flow_shift=0"),
     ({"window": 24}, "window=24"), ({"flow_shift": 200.0}, "flow_shift=200.0: must lie between"),
     ({"audio_guidance_scale": -1.0}, "audio_guidance_scale=-1"),
     ({"guidance_scale": float("nan")}, "guidance_scale=nan")],
)  # fmt: skip
def test_values_out_of_range_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sampler(DEMO._replace(**change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "factors"),
    [("phase", [1.5, 1.5, 1.5, 1.0]), ("compounding", [1.5, 2.25, 3.375, 3.375])],
)
@torch.no_grad()
def test_the_previews_guidance_holds_at_every_step(mode: str, factors: list[float]) -> None:
    recipe, sigmas = PREVIEW._replace(negative_mode=mode), sampler_sigmas(PREVIEW)
    actual = guided_velocity(NET, CONDITIONS, recipe, NEGATIVE, "batched")
    for step in range(4):
        r = 1 - step / 25
        share = 0.5 + (1 - math.cos(math.pi * r**5)) / 4
        expected = cfg_velocity(
            NET, CONDITIONS, text_negative=factors[step] * NEGATIVE,
            text_scale=4.0 * share, audio_scale=2.9 * share,
        )  # fmt: skip
        torch.testing.assert_close(
            actual(NOISY, sigmas[step]), expected(NOISY, sigmas[step]), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cfg", ["batched", "sequential"])
@pytest.mark.parametrize("length", [1, 3, 7])
def test_clips_of_any_length_are_sampled(solver: str, cfg: str, length: int) -> None:
    """The lengths are less than one window, one window, and several."""
    recipe = PREVIEW._replace(solver=solver, num_steps=2, window=tiny.FRAMES, overlap=1)
    conditions = CONDITIONS._replace(
        audio=torch.randn(1, 2 * (4 * length - 3), 6),
        known=torch.zeros(1, 4, length, *tiny.SHAPE[2:]),
        known_latents=torch.zeros(1, tiny.CHANNELS, length, *tiny.SHAPE[2:]),
    )
    noise = torch.randn(conditions.known_latents.shape)
    actual = sample_windows(NET, conditions, recipe, noise, negative=NEGATIVE, cfg=cfg)
    assert actual.shape == noise.shape and actual.isfinite().all()


def test_one_window_equals_plain_sampling() -> None:
    recipe, steps = DEMO._replace(num_steps=3, window=tiny.FRAMES), []
    plain = sample_euler(
        cfg_velocity(NET, CONDITIONS, audio_scale=2.0), NOISY, sampler_sigmas(recipe)
    )

    def on_step(step: int, latents: Tensor) -> None:
        steps.append(step)

    actual = sample_windows(NET, CONDITIONS, recipe, NOISY, on_step=on_step)
    assert steps == [0, 1, 2]
    torch.testing.assert_close(actual, plain)
