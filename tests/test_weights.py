"""Names of parameters in released files, and loading them strictly."""

import pytest
import tiny
import torch

from echolab.errors import CheckpointError
from echolab.models.weights import (
    AUDIO_PARTS,
    IMAGE_PARTS,
    from_diffusers,
    load_weights,
    to_diffusers,
)

NAMES = [
    ("patch_embedding.weight", "patch_embedding.weight"),
    ("text_embedding.2.bias", "condition_embedder.text_embedder.linear_2.bias"),
    ("time_projection.1.weight", "condition_embedder.time_proj.weight"),
    ("img_emb.proj.1.weight", "condition_embedder.image_embedder.ff.net.0.proj.weight"),
    ("img_emb.proj.4.bias", "condition_embedder.image_embedder.norm2.bias"),
    ("head.modulation", "scale_shift_table"),
    ("head.head.weight", "proj_out.weight"),
    ("blocks.7.modulation", "blocks.7.scale_shift_table"),
    ("blocks.12.self_attn.norm_q.weight", "blocks.12.attn1.norm_q.weight"),
    ("blocks.0.cross_attn.o.bias", "blocks.0.attn2.to_out.0.bias"),
    ("blocks.0.cross_attn.k_img.weight", "blocks.0.attn2.add_k_proj.weight"),
    ("blocks.0.cross_attn.norm_k_img.weight", "blocks.0.attn2.norm_added_k.weight"),
    ("blocks.0.cross_attn.k_audio.weight", "blocks.0.attn2.add_k_audio_proj.weight"),
    ("blocks.0.norm3.weight", "blocks.0.norm2.weight"),
    ("blocks.0.ffn.2.weight", "blocks.0.ffn.net.2.weight"),
]


@pytest.mark.parametrize(("original", "diffusers"), NAMES)
def test_names_of_the_table(original: str, diffusers: str) -> None:
    assert to_diffusers(original) == diffusers and from_diffusers(diffusers) == original


def test_there_and_back_is_the_identity() -> None:
    names = list(tiny.net().state_dict())
    renamed = [to_diffusers(name) for name in names]
    assert [from_diffusers(name) for name in renamed] == names
    assert len(set(renamed)) == len(names)


def test_loading_is_the_identity_on_a_file_of_the_same_network() -> None:
    source, net = tiny.net(trained=True), tiny.net()
    report = load_weights(net, source.state_dict())
    assert report.fresh == report.widened == []
    for (name, left), right in zip(net.named_parameters(), source.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_a_text_to_video_file_starts_the_whole_network() -> None:
    """Same output as its source, whatever picture, sound and known pixels are told."""
    source = tiny.net(trained=True, in_channels=tiny.CHANNELS, image_dim=None, audio_dim=None)
    net, told, times = tiny.net(), tiny.conditions(), torch.tensor([5.0, 800.0])
    report = load_weights(net, source.state_dict(), fresh=AUDIO_PARTS + IMAGE_PARTS)
    assert report.widened == ["patch_embedding.weight"]
    assert set(report.fresh) == set(net.state_dict()) - set(source.state_dict())
    for block in net.blocks:
        torch.nn.init.zeros_(block.cross_attn.v_img.weight)
    torch.testing.assert_close(
        net(tiny.latents(), times, told), source(tiny.latents(), times, told), rtol=1e-4, atol=1e-5
    )


def test_a_base_with_pictures_starts_the_network_unchanged() -> None:
    source = tiny.net(trained=True, audio_dim=None)
    net, times = tiny.net(), torch.tensor([5.0, 800.0])
    load_weights(net, source.state_dict(), fresh=AUDIO_PARTS)
    told, noisy = tiny.conditions(), tiny.latents()
    torch.testing.assert_close(net(noisy, times, told), source(noisy, times, told))


def test_what_does_not_fit_is_named_and_changes_nothing() -> None:
    net = tiny.net(trained=True)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    missing = {name: t + 1 for name, t in before.items() if "k_audio" not in name}
    with pytest.raises(CheckpointError, match=r"lacks blocks\.0\.cross_attn\.k_audio\.weight \(4"):
        load_weights(net, missing)
    with pytest.raises(CheckpointError, match=r"has blocks\.0\.cross_attn\.q_audio\.weight"):
        load_weights(net, {**before, "blocks.0.cross_attn.q_audio.weight": torch.zeros(1)})
    misshapen = {**missing, **before, "blocks.1.ffn.0.bias": torch.zeros(65)}
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.0\.bias: shape \[65\].*\[64\]"):
        load_weights(net, misshapen)
    narrower = {**before, "patch_embedding.weight": torch.zeros(48, 13, 1, 2, 2)}
    with pytest.raises(CheckpointError, match="patch_embedding"):
        load_weights(net, narrower)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_half_precision_files_are_read_as_the_network_is() -> None:
    source, net = tiny.net(trained=True).bfloat16(), tiny.net()
    load_weights(net, source.state_dict())
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    assert torch.equal(net.head.head.weight, source.head.head.weight.float())
