"""Adapters: the base never changes, only adapters are trained, and merging is exact."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from echolab.errors import ConfigError, WeightsError
from echolab.models.transformer import EchoTransformer
from echolab.training.adapters.lora import (
    AdaptersOff,
    AverageAdapters,
    Lora,
    adapted_layers,
    add_adapters,
    base_fingerprint,
    layers_matching,
    merge,
)
from echolab.training.adapters.lora_files import (
    merge_adapters,
    read_adapters,
    save_adapters,
    trained_tensors,
)

LORA = Lora(("self_attn", "cross_attn", "ffn"), rank=3, alpha=6.0)
BASE = {name: value.clone() for name, value in tiny.net(trained=True).state_dict().items()}


def adapted(lora: Lora = LORA, *, moved: bool = True) -> EchoTransformer:
    """Return a trained base with adapters, moved away from zero."""
    net = tiny.net(trained=True)
    add_adapters(net, lora, seed=1)
    if moved:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net


def velocity(net: Callable[..., Tensor]) -> Tensor:
    return net(tiny.latents(), torch.tensor([200.0, 900.0]), tiny.conditions())


@pytest.mark.parametrize(
    ("target", "count", "one"),
    [
        ("blocks.*.self_attn.{q,k,v,o}", 8, "blocks.1.self_attn.o"),
        ("cross_attn", 16, "blocks.0.cross_attn.v_audio"),
        ("ffn", 4, "blocks.0.ffn.2"),
        ("cross_attn.{k,v}_audio", 4, "blocks.1.cross_attn.k_audio"),
        ("blocks.0", 14, "blocks.0.ffn.0"),
        ("head", 1, "head.head"),
        ("text_embedding.0", 1, "text_embedding.0"),
        ("audio2token", 1, "audio2token.proj"),
    ],
)
def test_targets_name_layers_by_complete_parts(target: str, count: int, one: str) -> None:
    result = layers_matching(tiny.net(), (target,))
    assert len(result) == len(set(result)) == count and one in result


@pytest.mark.parametrize("target", ["self_att", "norm_q", "patch_embedding", "blocks.2"])
def test_a_target_that_names_no_linear_layer_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match="names none of the network's 37 linear layers"):
        layers_matching(tiny.net(), ("ffn", target))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 0}, "lora.r=0: must be 1 or more"),
        ({"alpha": 0.0}, "lora.lora_alpha=0: must be above 0"),
        ({"dropout": 1.0}, "lora.dropout=1: must lie in"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add_adapters(tiny.net(), LORA._replace(**wrong), seed=0)


@pytest.mark.parametrize("target", ["blocks", "head", "time_projection", "img_emb", "audio2token"])
def test_any_linear_layer_can_be_adapted_trained_and_merged(target: str) -> None:
    net = adapted(Lora((target,), rank=2, alpha=4.0))
    velocity(net).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0, name
    with torch.no_grad():
        before = velocity(net)
        assert not torch.allclose(before, velocity(tiny.net(trained=True)), atol=1e-3)
        merge(net)
        torch.testing.assert_close(velocity(net), before, rtol=1e-5, atol=1e-5)


def test_new_adapters_change_no_output_and_depend_on_the_seed() -> None:
    net, again, other = adapted(moved=False), adapted(moved=False), tiny.net(trained=True)
    add_adapters(other, LORA, seed=2)
    with torch.no_grad():
        assert torch.equal(velocity(net), velocity(tiny.net(trained=True)))
    name = "blocks.1.ffn.0.lora_A.default.weight"
    first, second, third = (n.get_parameter(name) for n in (net, again, other))
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert first.abs().max() <= 48**-0.5 and first.std().item() == pytest.approx(
        (48 * 3) ** -0.5, rel=0.2
    )


def test_adapters_do_not_touch_the_global_random_state() -> None:
    net = tiny.net()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    add_adapters(net, LORA, seed=0)
    assert torch.equal(torch.rand(2), expected)


def test_an_adapted_layer_follows_the_published_formula() -> None:
    net = adapted()
    layer: Any = net.blocks[0].ffn[0]  # type: ignore[index,union-attr]
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias)
    expected = expected + 6.0 / 3 * x @ down.T @ up.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_merging_restores_the_networks_names() -> None:
    net = adapted()
    merge(net)
    assert {name: v.shape for name, v in net.named_parameters()} == {
        name: v.shape for name, v in tiny.net().named_parameters()
    }
    changed = {
        name for name, value in net.state_dict().items() if not torch.equal(value, BASE[name])
    }
    assert changed == {f"{name}.weight" for name in layers_matching(tiny.net(), LORA.targets)}
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_the_base_and_its_fingerprint_survive_training() -> None:
    net, plain = adapted(LORA._replace(dropout=0.5)), tiny.net(trained=True)
    assert base_fingerprint(net) == base_fingerprint(plain) == base_fingerprint(adapted())
    off = AdaptersOff(net)
    with torch.no_grad():
        expected = velocity(plain)
    assert torch.equal(
        off(tiny.latents(), torch.tensor([200.0, 900.0]), tiny.conditions()), expected
    )
    loss = (velocity(net) - velocity(off)).square().mean()  # the policy's graph is already there
    assert torch.equal(velocity(off), expected) and not velocity(off).requires_grad
    loss.backward()
    trained = [p for p in net.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(list(adapted_layers(net)))
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    with torch.no_grad():
        plain.head.head.weight[0, 0] += 1e-3
    assert base_fingerprint(net) != base_fingerprint(plain)


def test_a_network_of_earlier_averages_shares_the_base() -> None:
    net = adapted(LORA._replace(dropout=0.5))
    net.eval()
    tensors = {name: tensor.clone() for name, tensor in trained_tensors(net)[0].items()}
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    with torch.no_grad():
        expected = velocity(net)
        reference = AverageAdapters(net, LORA._replace(dropout=0.5))
        assert [name for name, p in net.named_parameters() if p.requires_grad] == trained
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    reference.load(tensors)
    net.train()
    assert torch.equal(velocity(reference), expected)
    assert not torch.equal(velocity(net), expected)
    assert [name for name, p in net.named_parameters() if p.requires_grad] == trained
    merge(net)
    assert set(net.state_dict()) == set(BASE)


def test_a_network_without_adapters_has_no_base_as_reference() -> None:
    with pytest.raises(ConfigError, match="ref_model=base: the network has no adapters"):
        AdaptersOff(tiny.net())


def write(folder: Path, net: EchoTransformer) -> None:
    tensors, layers = trained_tensors(net)
    save_adapters(folder, LORA, tensors, layers, base_fingerprint(net))


def test_folders_are_exchanged_with_peft_both_ways(tmp_path: Path) -> None:
    net = adapted()
    write(tmp_path / "ours", net)
    base: Any = tiny.net(trained=True)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "ours"))
    with torch.no_grad():
        assert torch.equal(velocity(theirs.model), velocity(net))
    read = tiny.net(trained=True)
    merge_adapters(read, read_adapters(tmp_path / "ours", read))
    with torch.no_grad():
        torch.testing.assert_close(velocity(read), velocity(net), rtol=1e-5, atol=1e-5)

    written = get_peft_model(tiny.net(trained=True), LoraConfig(  # type: ignore[arg-type]
        r=2, lora_alpha=8, target_modules=["q", "ffn.0"], init_lora_weights=False))  # fmt: skip
    written.save_pretrained(str(tmp_path / "theirs"))
    read = tiny.net(trained=True)
    merge_adapters(read, read_adapters(tmp_path / "theirs", read))
    with torch.no_grad():
        torch.testing.assert_close(velocity(read), velocity(written.model), rtol=1e-5, atol=1e-5)


def test_wrong_adapters_give_a_one_line_error(tmp_path: Path) -> None:
    write(tmp_path, adapted())

    def refused(net: EchoTransformer, words: str) -> None:
        with pytest.raises(WeightsError, match=words) as caught:
            read_adapters(tmp_path, net)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)

    refused(
        tiny.net(trained=True, num_layers=1),
        r"another model: .*blocks\.1\..* no layer of this network",
    )
    refused(tiny.net(trained=True, ffn_dim=80), r"\(64, 3\) x \(3, 48\), the layer is 80 x 48")
    refused(tiny.net(), "another base: [0-9a-f]{32} there, [0-9a-f]{32} here")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    refused(tiny.net(trained=True), "has rank 3, its settings say 4")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    refused(tiny.net(trained=True), "use_dora=True: not read here")
    for change, words in (
        ({"r": 0}, "with r=0: no plain LoRA"),
        ({"peft_type": "LOHA"}, "adapters of LOHA"),
        ({"bias": "all"}, "bias=all: not read here"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True: not read here"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
        refused(tiny.net(trained=True), words)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop("base_model.model.blocks.0.ffn.0.lora_B.weight")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    refused(tiny.net(trained=True), r"blocks\.0\.ffn\.0: its up half is missing there")
    save_file({}, tmp_path / "adapter_model.safetensors")
    refused(tiny.net(trained=True), "0 tensors")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"pickle")
    refused(tiny.net(trained=True), "no adapters that can be read")
