"""The mapping of file tensors to parameters: names, and strict loading."""

import pytest
import tiny
import torch

from echolab.errors import CheckpointError
from echolab.models.state_dict import (
    AUDIO_PARTS,
    IMAGE_PARTS,
    MARKS,
    from_diffusers,
    initialize,
    load_weights,
    model_of,
    released_shapes,
    to_diffusers,
)
from echolab.models.transformer import EchoTransformer

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
    ("blocks.0.cross_attn.v_audio.bias", "blocks.0.attn2.add_v_audio_proj.bias"),
    ("blocks.0.norm3.weight", "blocks.0.norm2.weight"),
    ("blocks.0.ffn.2.weight", "blocks.0.ffn.net.2.weight"),
]
TIMES = torch.tensor([5.0, 800.0])


@pytest.mark.parametrize(("original", "diffusers"), NAMES)
def test_released_names_map_to_parameters(original: str, diffusers: str) -> None:
    assert to_diffusers(original) == diffusers and from_diffusers(diffusers) == original


@pytest.mark.parametrize("model", tiny.MODELS)
def test_mapping_names_there_and_back_is_the_identity(model: str) -> None:
    names = list(released_shapes(tiny.model(model)))
    renamed = [to_diffusers(name) for name in names]
    assert [from_diffusers(name) for name in renamed] == names
    assert len(set(renamed)) == len(names)


@pytest.mark.parametrize("model", tiny.MODELS)
def test_a_file_identifies_its_model(model: str) -> None:
    assert model_of(tiny.model(model).state_dict()) == model
    assert model_of(["encoder.conv1.weight"]) is None
    assert set(MARKS) == set(tiny.MODELS)


@pytest.mark.parametrize("model", tiny.MODELS)
def test_loading_a_file_of_the_same_network_changes_nothing(model: str) -> None:
    source, net = tiny.model(model), tiny.model(model, trained=False)
    report = load_weights(net, source.state_dict())
    assert report.fresh == report.widened == report.unused == []
    assert report.loaded == [name for name, _ in net.named_parameters()]
    for (name, left), right in zip(net.named_parameters(), source.parameters(), strict=True):
        assert torch.equal(left, right) and left.requires_grad, name


def test_tensors_are_used_without_a_copy() -> None:
    tensors = {name: tensor.clone() for name, tensor in tiny.net().state_dict().items()}
    with torch.device("meta"):
        net = tiny.net(initialized=False)
    load_weights(net, tensors)
    for name, parameter in net.named_parameters():
        assert parameter.data_ptr() == tensors[name].data_ptr(), name


def test_flash_names_its_dead_query_as_unused() -> None:
    net = tiny.model("echomimicv3_flash")
    file = {name: torch.randn(shape) for name, shape in released_shapes(net).items()}
    dead = [name for name in file if "q_audio" in name]
    report = load_weights(net, file)
    assert report.unused == dead and len(dead) == 4
    assert len(report.loaded) + len(report.unused) == len(file)
    assert "blocks.*.cross_attn.q_audio.weight" in report.lines()[-1]
    with pytest.raises(CheckpointError, match="lacks"):
        load_weights(net, {name: t for name, t in file.items() if "proj1_vf" not in name})


def test_a_text_to_video_file_starts_the_full_network() -> None:
    """The output equals its source's for any image, audio and known pixels."""
    source = tiny.net(trained=True, in_channels=tiny.CHANNELS, image_dim=None, audio_dim=None)
    net, conditions = tiny.net(), tiny.conditions()
    report = load_weights(net, source.state_dict(), fresh=(AUDIO_PARTS, IMAGE_PARTS))
    assert report.widened == ["patch_embedding.weight"]
    assert set(report.fresh) == set(net.state_dict()) - set(source.state_dict())
    for block in net.blocks:
        torch.nn.init.zeros_(block.cross_attn.v_img.weight)
    torch.testing.assert_close(
        net(tiny.latents(), TIMES, conditions),
        source(tiny.latents(), TIMES, conditions),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("layers", [None, 3])
def test_a_base_with_image_parts_starts_the_network_unchanged(layers: int | None) -> None:
    """A new audio branch adds nothing to the base, for any audio."""
    source = tiny.net(trained=True, audio_dim=None)
    net = tiny.net(audio_layers=layers)
    load_weights(net, source.state_dict(), fresh=(AUDIO_PARTS,))
    conditions = tiny.conditions(layers=layers)
    for audible in (conditions, conditions._replace(audio=conditions.audio * 9)):
        torch.testing.assert_close(
            net(tiny.latents(), TIMES, audible), source(tiny.latents(), TIMES, conditions)
        )


def test_tensors_that_do_not_fit_are_named_and_change_nothing() -> None:
    net = tiny.net(trained=True)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    missing = {name: t + 1 for name, t in before.items() if "k_audio" not in name}
    with pytest.raises(CheckpointError, match=r"lacks blocks\.0\.cross_attn\.k_audio\.weight \(4"):
        load_weights(net, missing)
    with pytest.raises(CheckpointError, match=r"lacks blocks\.0\.cross_attn\.k_audio\.weight \(4"):
        load_weights(net, missing, fresh=(AUDIO_PARTS,))  # a part is there, or it is not
    with pytest.raises(CheckpointError, match=r"has blocks\.0\.cross_attn\.w\.weight"):
        load_weights(net, {**before, "blocks.0.cross_attn.w.weight": torch.zeros(1)})
    misshapen = {**missing, **before, "blocks.1.ffn.0.bias": torch.zeros(65)}
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.0\.bias: shape \[65\].*\[64\]"):
        load_weights(net, misshapen)
    narrower = {**before, "patch_embedding.weight": torch.zeros(48, 13, 1, 2, 2)}
    with pytest.raises(CheckpointError, match="patch_embedding"):
        load_weights(net, narrower)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("given", tiny.MODELS)
@pytest.mark.parametrize("wanted", tiny.MODELS)
def test_a_file_of_another_model_is_identified(given: str, wanted: str) -> None:
    if given != wanted:
        with pytest.raises(CheckpointError, match=f"holds {given} .*is {wanted}.*model={given}"):
            load_weights(tiny.model(wanted), tiny.model(given).state_dict(), source="f")


def test_half_precision_files_are_read_in_the_networks_dtype() -> None:
    source, net = tiny.net(trained=True).bfloat16(), tiny.net()
    load_weights(net, source.state_dict())
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    assert torch.equal(net.head.head.weight, source.head.head.weight.float())


def test_initializing_one_part_leaves_the_rest() -> None:
    net = tiny.net(trained=True)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    part = {name for name in before if any(piece in name for piece in AUDIO_PARTS)}
    initialize(net, torch.Generator().manual_seed(3), only=part)
    changed = {name for name, t in net.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == part
    for block in net.blocks:
        assert not block.cross_attn.k_audio.weight.any()
        assert torch.equal(block.cross_attn.norm_k_audio.weight, torch.ones(48))


def test_each_kind_of_parameter_has_its_initialization() -> None:
    """The initialization is Wan's `init_weights`:

    Xavier but for text, time (0.02), modulations, zeros.
    """
    net = EchoTransformer(dim=96, ffn_dim=128, num_heads=2, num_layers=1, text_dim=64, freq_dim=64)
    initialize(net.requires_grad_(False), torch.Generator().manual_seed(0))
    bound = (6 / (96 + 128)) ** 0.5
    ffn = net.blocks[0].ffn[0].weight
    assert ffn.abs().max() <= bound and ffn.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert net.text_embedding[0].weight.std() == pytest.approx(0.02, rel=0.05)
    assert net.blocks[0].modulation.std() == pytest.approx(96**-0.5, rel=0.1)
    assert not net.head.head.weight.any() and not net.patch_embedding.bias.any()
    assert torch.equal(net.img_emb.proj[0].weight, torch.ones(1280))
    assert not net.img_emb.proj[0].bias.any()
