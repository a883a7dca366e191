"""The small video autoencoder is causal, keeps still clips still, and is a codec before
training.
"""

from pathlib import Path

import drawn
import pytest
import torch
from batch_scores import psnr

from echolab.encoders.demo import (
    LIP_WEIGHT,
    CausalAutoencoder,
    from_patches,
    lip_weight,
    set_normalization,
    to_patches,
)

WIDTH = 16


def random_net() -> CausalAutoencoder:
    """Return a network without zero weights, so that every path counts."""
    torch.manual_seed(0)
    net = CausalAutoencoder(channels=6, width=WIDTH, depth=1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        net.mean.normal_()
        net.std.uniform_(0.5, 2)
    return net.eval()


def random_clip(frames: int = 13, size: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, frames, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("frames", [1, 5, 9, 81])
def test_a_latent_frame_is_the_first_frame_or_four(frames: int) -> None:
    latents = random_net().encode(torch.zeros(1, 3, frames, 16, 24))
    assert latents.shape == (1, 6, (frames - 1) // 4 + 1, 2, 3)
    assert random_net().decode(latents).shape == (1, 3, frames, 16, 24)


def test_patching_only_reorders_values() -> None:
    clip = random_clip()
    assert torch.equal(from_patches(to_patches(clip), 2), clip)


@torch.no_grad()
@pytest.mark.parametrize("changed", range(13))
def test_no_latent_sees_a_later_frame(changed: int) -> None:
    net, clip = random_net(), random_clip()
    other = clip.clone()
    other[:, :, changed] += 0.5
    group = (changed + 3) // 4
    differs = (net.encode(clip) != net.encode(other)).any(-1).any(-1).any(1)  # [B, F]
    assert not differs[:, :group].any()
    assert differs[:, group].all()


@torch.no_grad()
@pytest.mark.parametrize("changed", range(4))
def test_no_frame_depends_on_a_later_latent(changed: int) -> None:
    net = random_net()
    latents = net.encode(random_clip())
    other = latents.clone()
    other[:, :, changed] += 0.5
    first = 4 * changed - 3 if changed else 0  # frame of pixels that this latent begins with
    differs = (net.decode(latents) != net.decode(other)).flatten(3).any(-1).any(1)  # [B, T]
    assert not differs[:, :first].any()
    assert differs[:, first].all()


@torch.no_grad()
def test_a_clip_does_not_depend_on_its_batch() -> None:
    net, clip = random_net(), random_clip()
    alone = torch.cat([net.encode(clip[:1]), net.encode(clip[1:])])
    torch.testing.assert_close(net.encode(clip), alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_still_clip_repeats_one_latent_frame() -> None:
    net = random_net()
    latents = net.encode(random_clip()[:, :, :1].expand(-1, -1, 13, -1, -1))
    torch.testing.assert_close(latents, latents[:, :, :1].expand_as(latents), rtol=0, atol=1e-5)
    one = net.encode(random_clip()[:, :, :1])  # a single image, too
    torch.testing.assert_close(latents[:, :, :1], one, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_first_frames_alone_are_encoded_as_in_the_full_clip() -> None:
    net, clip = random_net(), random_clip()
    torch.testing.assert_close(net.encode(clip[:, :, :9]), net.encode(clip)[:, :, :3])


@torch.no_grad()
def test_the_linear_basis_alone_is_a_codec_for_unseen_talkers() -> None:
    net = CausalAutoencoder(width=WIDTH)
    net.fit_basis(drawn.clips(24).float_pixels())
    unseen = drawn.clips(8, first=100).float_pixels()
    quality = psnr(net.decode(net.encode(unseen)), unseen)
    assert quality.min() > 20, quality


@torch.no_grad()
def test_the_basis_is_a_projection_that_loses_less_with_more_channels() -> None:
    clips = drawn.clips(8).float_pixels()
    lost = []
    for channels in (4, 16, 48):
        net = CausalAutoencoder(channels=channels, width=WIDTH)
        net.fit_basis(clips)
        once = net.raw_pixels(net.raw_latents(clips))
        lost.append(float((once - clips).square().mean()))
        # Encoding the first frame repeats it, so the projection shows in the other groups.
        again = net.raw_pixels(net.raw_latents(once))
        torch.testing.assert_close(again[:, :, 1:], once[:, :, 1:], rtol=0, atol=1e-3)
    assert lost == sorted(lost, reverse=True)


@torch.no_grad()
def test_normalized_latents_have_zero_mean_and_unit_variance() -> None:
    clips = drawn.clips(8)
    net = CausalAutoencoder(width=WIDTH)
    net.fit_basis(clips.float_pixels())
    set_normalization(net, clips.pixels)
    latents = net.encode(clips.float_pixels())
    assert latents.mean((0, 2, 3, 4)).abs().max() < 1e-3
    assert float(latents.square().mean()) == pytest.approx(1, rel=1e-3)


@torch.no_grad()
def test_the_loss_weighs_the_lips_more() -> None:
    boxes = torch.tensor([[[2.0, 3.0, 5.0, 4.0]]])
    weight = lip_weight(boxes, 8, 8)
    assert weight.shape == (1, 1, 1, 8, 8)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[3:5, 2:6] = True
    assert torch.equal(weight[0, 0, 0], torch.where(inside, 1 + LIP_WEIGHT, 1.0))


def test_a_few_steps_of_fitting_lower_the_error_of_the_basis(tmp_path: Path) -> None:
    from echolab.encoders import demo as fitting

    clips = drawn.clips(8, frames=5, size=32)
    losses: list[float] = []
    net = fitting.fit_autoencoder(
        clips.pixels, clips.lips, steps=40, seed=0, progress=tmp_path / "state", batch=4,
        report=lambda step, steps, loss: losses.append(loss),
    )  # fmt: skip
    assert losses[-1] < losses[0]
    assert not net.training and not (tmp_path / "state").exists()
