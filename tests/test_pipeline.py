"""Clips from a network: noise by key, guidance, and independence of the batch."""

import pytest
import tiny
import torch
from torch import Tensor

from echolab.diffusion.pipeline import generate
from echolab.diffusion.sigmas import draw_noise
from echolab.models.transformer import EchoTransformer
from echolab.types import Conditions

KEYS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def net() -> EchoTransformer:
    return tiny.net(trained=True).eval()


def made(
    net: EchoTransformer, conditions: Conditions, keys: list[str] = KEYS, **changes: object
) -> Tensor:
    settings = {"steps": 3, "shift": 5.0, "audio_scale": 1.0, "seed": 0, **changes}
    return generate(net, conditions, keys, **settings)  # type: ignore[arg-type]


def rows(conditions: Conditions, indices: list[int]) -> Conditions:
    return Conditions(*(tensor[indices] for tensor in conditions))


def test_a_clip_depends_on_its_key_and_not_on_its_batch(net: EchoTransformer) -> None:
    context = tiny.conditions(3)
    full = made(net, context)
    assert full.shape == (3, *tiny.SHAPE) and full.dtype == torch.float32
    assert not full.requires_grad
    turned = made(net, rows(context, [2, 0, 1]), ["c", "a", "b"])
    torch.testing.assert_close(turned, full[[2, 0, 1]], rtol=1e-4, atol=1e-4)
    alone = made(net, rows(context, [1]), ["b"])
    torch.testing.assert_close(alone, full[1:2], rtol=1e-4, atol=1e-4)
    torch.manual_seed(77)
    assert torch.equal(made(net, context), full)


@pytest.mark.parametrize("change", [{"seed": 1}, {"draw_index": 1}, {"keys": ["a", "b", "d"]}])
def test_other_noise_gives_another_clip(net: EchoTransformer, change: dict[str, object]) -> None:
    context = tiny.conditions(3)
    differs = (made(net, context) - made(net, context, **change)).flatten(1).abs().amax(1)  # type: ignore[arg-type]
    assert differs[2] > 0.1
    assert bool((differs[:2] > 0.1).all()) is ("keys" not in change)


def test_the_audio_scale_matters_and_one_means_no_guidance(net: EchoTransformer) -> None:
    context = tiny.conditions(3)
    plain = made(net, context)
    assert not torch.allclose(made(net, context, audio_scale=3.0), plain, atol=1e-3)
    silent = context._replace(audio=torch.zeros_like(context.audio))
    unheard = made(net, silent)
    assert not torch.allclose(unheard, plain, atol=1e-4)
    # Guidance goes from the silent branch to the other: where both agree its size is nothing.
    torch.testing.assert_close(made(net, silent, audio_scale=3.0), unheard, rtol=1e-4, atol=1e-4)


def test_a_perfect_network_is_followed_to_its_clip() -> None:
    """The straight path from this noise ends exactly at the known clip."""
    context, truth = tiny.conditions(3), tiny.latents(3)
    noise = draw_noise(KEYS, tiny.SHAPE, seed=4, epoch=0).noise

    def exact(
        noisy: Tensor, timesteps: Tensor, conditions: Conditions, weights: object = None
    ) -> Tensor:
        return noise - truth

    actual = made(exact, context, seed=4)  # type: ignore[arg-type]
    torch.testing.assert_close(actual, truth, rtol=1e-5, atol=1e-5)


def test_half_precision_stays_close_and_steps_are_reported(net: EchoTransformer) -> None:
    context, seen = tiny.conditions(3), []
    half = made(net, context, dtype=torch.bfloat16, on_step=lambda step, latents: seen.append(step))
    assert seen == [0, 1, 2] and half.dtype == torch.float32
    torch.testing.assert_close(half, made(net, context), rtol=0.1, atol=0.2)
