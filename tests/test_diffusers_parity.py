"""The same weights in diffusers' `WanTransformer3DModel` and here give equal outputs and
gradients.
"""

import math
import re

import pytest
import tiny
import torch
from torch import Tensor, nn

from echolab.models.state_dict import to_diffusers
from echolab.models.transformer import EchoTransformer
from echolab.types import Conditions

TIMESTEPS = torch.tensor([123.0, 987.0])
TEXT, IMAGE = 512, 257  # diffusers counts the text tokens from the end to locate the image tokens


def net_of(image: bool) -> EchoTransformer:
    """Return a wider network, with heads of Wan's 128 channels, moved from its initialization."""
    shape: dict[str, object] = {} if image else {"in_channels": tiny.CHANNELS, "image_dim": None}
    return tiny.net(trained=True, dim=256, ffn_dim=384, freq_dim=64, audio_dim=None, **shape)


def theirs_of(net: EchoTransformer) -> nn.Module:
    """Return diffusers' network with the same weights."""
    from diffusers import WanTransformer3DModel

    image = net.img_emb is not None
    theirs = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, in_channels=net.patch_embedding.in_channels,
        out_channels=4, text_dim=10, freq_dim=64, ffn_dim=384, num_layers=2,
        image_dim=12 if image else None, added_kv_proj_dim=256 if image else None,
    )  # fmt: skip
    theirs.load_state_dict({to_diffusers(name): p for name, p in net.state_dict().items()})
    return theirs


def context() -> Conditions:
    generator = torch.Generator().manual_seed(2)
    return tiny.conditions()._replace(
        text=torch.randn(2, TEXT, 10, generator=generator),
        image=torch.randn(2, IMAGE, 12, generator=generator),
    )


def both(net: EchoTransformer, theirs: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the velocities of both, for the same clips."""
    conditions = Conditions(*(part.to(dtype) for part in context()))
    noisy = tiny.latents().to(dtype)
    image = net.img_emb is not None
    given = torch.cat([noisy, conditions.known, conditions.known_latents], 1) if image else noisy
    expected = theirs(
        hidden_states=given, timestep=TIMESTEPS, encoder_hidden_states=conditions.text,
        encoder_hidden_states_image=conditions.image if image else None,
    ).sample  # fmt: skip
    return net(noisy, TIMESTEPS, conditions), expected


def relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().float(), expected.detach().float()
    return float((actual - expected).norm() / expected.norm())


def gradients(velocity: Tensor, net: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of every parameter, along one direction of the velocity."""
    net.zero_grad()
    (velocity.float() * tiny.latents(seed=5)).sum().backward()
    actual = {name: parameter.grad for name, parameter in net.named_parameters()}
    assert all(gradient is not None for gradient in actual.values())
    return {name: gradient for name, gradient in actual.items() if gradient is not None}


@pytest.mark.parametrize("image", [False, True], ids=["text to video", "image to video"])
def test_output_and_every_gradient_agree_in_fp32(image: bool) -> None:
    net = net_of(image)
    theirs = theirs_of(net)
    ours, expected = both(net, theirs, torch.float32)
    assert relative(ours, expected) < 1e-5
    mine, known = gradients(ours, net), gradients(expected, theirs)
    assert {to_diffusers(name) for name in mine} == set(known)
    errors = {name: relative(grad, known[to_diffusers(name)]) for name, grad in mine.items()}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < 1e-4, f"{worst}: {errors[worst]:.1e}"
    # All but the biases of keys, which hardly change the softmax: there rounding dominates.
    assert max(e for n, e in errors.items() if not re.search(r"k(_img)?\.bias", n)) < 1e-5


@pytest.mark.parametrize("image", [False, True], ids=["text to video", "image to video"])
def test_bf16_is_as_near_to_fp32_as_theirs(image: bool) -> None:
    """Parameters and clips are bf16, as released; the truth is fp32 with the rounded weights."""
    net = net_of(image).bfloat16().float()
    theirs = theirs_of(net)
    exact, _ = both(net, theirs, torch.float32)
    truth = gradients(exact, net)
    actual, expected = both(net.bfloat16(), _half(theirs), torch.bfloat16)
    assert relative(actual, exact) < 1.5 * relative(expected, exact) < 0.05
    mine, known = gradients(actual, net), gradients(expected, theirs)
    ratios = [
        relative(mine[name], truth[name]) / relative(known[to_diffusers(name)], truth[name])
        for name in truth
    ]
    assert math.prod(ratios) ** (1 / len(ratios)) < 1.5  # the geometric mean
    assert max(relative(mine[name], truth[name]) for name in truth) < 0.1


def _half(theirs: nn.Module) -> nn.Module:
    """Convert to bf16, except the modules that diffusers itself keeps in fp32 when it loads
    bf16.
    """
    kept = theirs._keep_in_fp32_modules
    for name, module in theirs.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if not any(part in f"{name}.{leaf}" for part in kept):
                parameter.data = parameter.data.bfloat16()
    return theirs
