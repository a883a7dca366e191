"""LoRA files between programs: every format is read, and other programs read the files written.

Oracles: peft and diffusers themselves, and ComfyUI's rules for keys, restated here from its
`comfy/lora.py`: a model's `diffusion_model.X.weight` is patched by keys `diffusion_model.X` or
`lora_unet_X` with underscores, each with `.lora_A|.lora_down` and `.alpha`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_diffusers_parity import net_of, theirs_of
from torch import Tensor, nn

from echolab.errors import WeightsError
from echolab.models.state_dict import to_diffusers
from echolab.models.transformer import EchoTransformer
from echolab.training.adapters.lora import Lora, add_adapters, base_fingerprint, merge
from echolab.training.adapters.lora_files import (
    audio_file_of,
    is_audio,
    merge_adapters,
    read_adapters,
    save_adapters,
    save_single_file,
    trained_tensors,
)

# The rank and the alpha of a layer, by its place in the list: every layer has its own.
LAYERS = (
    "blocks.0.self_attn.q", "blocks.1.self_attn.q", "blocks.0.self_attn.o", "blocks.1.ffn.0",
    "blocks.0.ffn.2", "blocks.1.cross_attn.k", "blocks.0.cross_attn.v_img", "text_embedding.0",
    "time_projection.1", "img_emb.proj.1", "head.head",
)  # fmt: skip
RANKS = {name: 1 + number % 3 for number, name in enumerate(LAYERS)}
ALPHAS = {name: 0.5 + 1.5 * number for number, name in enumerate(LAYERS)}

Pairs = dict[str, tuple[Tensor, Tensor]]
Tensors = dict[str, Tensor]


def pairs(net: nn.Module, dtype: torch.dtype = torch.float32) -> Pairs:
    """Return random factors [rank, in] and [out, rank] of every layer."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, rank in RANKS.items():
        outputs, inputs = net.get_parameter(f"{name}.weight").shape
        down = torch.randn(rank, inputs, generator=generator)
        up = torch.randn(outputs, rank, generator=generator)
        made[name] = (down.to(dtype), up.to(dtype))
    return made


def expected(net: EchoTransformer, halves: Pairs, alphas: dict[str, float] | None) -> Tensors:
    """Compute W + alpha / rank B A by hand; without alphas the scale is 1."""
    state = {name: value.clone() for name, value in net.state_dict().items()}
    for name, (down, up) in halves.items():
        scale = alphas[name] / down.shape[0] if alphas else 1.0
        state[f"{name}.weight"] += scale * up.float() @ down.float()
    return state


def kohya(halves: Pairs) -> Tensors:
    content = {}
    for name, (down, up) in halves.items():
        stem = "lora_unet_" + name.replace(".", "_")
        content |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        alpha = ALPHAS[name]
        content[f"{stem}.alpha"] = torch.tensor(int(alpha) if alpha % 1 == 0 else alpha)
    return content


def comfyui(halves: Pairs) -> Tensors:
    content = {}
    for name, (down, up) in halves.items():
        stem = f"diffusion_model.{name}"
        content |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        content[f"{stem}.alpha"] = torch.tensor(ALPHAS[name], dtype=down.dtype)
    return content


def diffusers_stem(name: str) -> str:
    return to_diffusers(f"{name}.weight").removesuffix(".weight")


def diffusers(halves: Pairs) -> Tensors:
    content = {}
    for name, (down, up) in halves.items():
        stem = f"transformer.{diffusers_stem(name)}"
        content |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    return content


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [kohya, comfyui], ids=lambda form: form.__name__)
def test_single_files_are_read_with_their_alphas(
    form: Callable[[Pairs], Tensors], dtype: torch.dtype, tmp_path: Path
) -> None:
    net = tiny.net(trained=True)
    halves = pairs(net, dtype)
    save_file(form(halves), file := tmp_path / "lora.safetensors")
    wanted = expected(net, halves, ALPHAS)
    merge_adapters(net, read_adapters(file, net))
    torch.testing.assert_close(dict(net.state_dict()), wanted)


@pytest.mark.parametrize("settings", ["metadata", "alphas", "nothing"])
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_diffusers_files_are_read_with_their_scale(
    settings: str, folder: bool, tmp_path: Path
) -> None:
    """The scale is in the metadata that diffusers writes, or in `.alpha`, or is 1."""
    net = tiny.net(trained=True)
    halves = pairs(net)
    content, metadata = diffusers(halves), {"format": "pt"}
    if settings == "alphas":
        for name in halves:
            content[f"transformer.{diffusers_stem(name)}.alpha"] = torch.tensor(ALPHAS[name])
    if settings == "metadata":
        ranks = {diffusers_stem(name): rank for name, rank in RANKS.items() if rank != 2}
        alphas = {diffusers_stem(name): alpha for name, alpha in ALPHAS.items() if alpha != 2.0}
        report = {"r": 2, "lora_alpha": 2.0, "rank_pattern": ranks, "alpha_pattern": alphas}
        packed = {f"transformer.{key}": value for key, value in report.items()}
        metadata["lora_adapter_metadata"] = json.dumps(packed)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(content, file, metadata)
    wanted = expected(net, halves, None if settings == "nothing" else ALPHAS)
    merge_adapters(net, read_adapters(tmp_path if folder else file, net))
    torch.testing.assert_close(dict(net.state_dict()), wanted)


@pytest.mark.parametrize("stabilized", [False, True], ids=["plain", "rank-stabilized"])
def test_peft_folders_with_rank_patterns_are_read(stabilized: bool, tmp_path: Path) -> None:
    """The file of uneven layers is peft's own, and its own merge is the oracle."""
    config = LoraConfig(
        r=2, lora_alpha=8, target_modules=["q", "ffn.0", "blocks.1.ffn.2"],
        rank_pattern={"blocks.1.self_attn.q": 4, "ffn.0": 3},
        alpha_pattern={"ffn.0": 5, "blocks.0.cross_attn.q": 1}, use_rslora=stabilized,
        init_lora_weights=False,
    )  # fmt: skip
    made: Any = get_peft_model(tiny.net(trained=True), config)  # type: ignore[arg-type]
    made.save_pretrained(str(tmp_path))
    net = tiny.net(trained=True)
    merge_adapters(net, read_adapters(tmp_path, net))
    wanted = made.merge_and_unload().state_dict()
    torch.testing.assert_close(dict(net.state_dict()), dict(wanted), rtol=1e-5, atol=1e-6)


def test_changes_of_biases_and_norms_are_added(tmp_path: Path) -> None:
    net = tiny.net(trained=True)
    names = {
        "diffusion_model.blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "diffusion_model.blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
        "diffusion_model.blocks.1.self_attn.norm_q.diff": "blocks.1.self_attn.norm_q.weight",
        "diffusion_model.blocks.1.ffn.0.diff_b": "blocks.1.ffn.0.bias",
        "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
    }
    wanted = {name: value.clone() for name, value in net.state_dict().items()}
    content = {}
    for key, name in names.items():
        content[key] = torch.randn(wanted[name].shape, generator=torch.Generator().manual_seed(1))
        wanted[name] += content[key]
    save_file(content, tmp_path / "lora.safetensors")
    merge_adapters(net, read_adapters(tmp_path / "lora.safetensors", net))
    torch.testing.assert_close(dict(net.state_dict()), wanted)


# -- what is written --------------------------------------------------------------------------

TARGETS = ("blocks", "head", "text_embedding", "time_embedding.2", "time_projection")


def trained(net: EchoTransformer, targets: tuple[str, ...]) -> tuple[Lora, Tensors, str]:
    """Return adapters of `net` itself, moved from zero, and the fingerprint of its base."""
    lora, base = Lora(targets, rank=3, alpha=7.0), base_fingerprint(net)
    add_adapters(net, lora, seed=0)
    generator = torch.Generator().manual_seed(4)
    tensors, _ = trained_tensors(net)
    for tensor in tensors.values():
        tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    return lora, {name: tensor.clone() for name, tensor in tensors.items()}, base


@pytest.mark.parametrize("image", [False, True], ids=["text to video", "image to video"])
def test_the_file_loaded_by_diffusers_equals_merging(image: bool, tmp_path: Path) -> None:
    """`WanPipeline.load_lora_weights`, which users call, gives the same output to 1e-5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    net = net_of(image)
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=theirs_of(net),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    plain = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    targets = (*TARGETS, "img_emb") if image else TARGETS
    lora, tensors, base = trained(net, targets)
    files = save_single_file(tmp_path / "lora.safetensors", lora, tensors, base)
    assert files == [tmp_path / "lora.safetensors"]
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()
    merge(net)
    theirs = pipeline.transformer.state_dict()
    ours = {to_diffusers(name): value for name, value in net.state_dict().items()}
    assert sum(not torch.equal(plain[name], theirs[name]) for name in plain) == len(tensors) // 2
    torch.testing.assert_close(dict(theirs), ours, rtol=0, atol=1e-5)


def patched_by_comfyui(state: Tensors, content: Tensors) -> Tensors:
    """Patch a model as ComfyUI does; raise AssertionError for `lora key not loaded`."""
    state, used = dict(state), set()
    for name, weight in state.items():
        stem = f"diffusion_model.{name.removesuffix('.weight')}"
        for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
            keys = [f"{stem}.{down}.weight", f"{stem}.{up}.weight", f"{stem}.alpha"]
            if keys[1] in content:
                a, b = content[keys[0]], content[keys[1]]
                scale = float(content[keys[2]]) / a.shape[0] if keys[2] in content else 1.0
                state[name] = weight + scale * b @ a
                used |= set(keys) & set(content)
    assert used == set(content), set(content) - used
    return state


def test_every_key_maps_in_comfyui(tmp_path: Path) -> None:
    net = tiny.net(trained=True, audio_dim=None)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    lora, tensors, base = trained(net, (*TARGETS, "img_emb"))
    [file] = save_single_file(tmp_path / "lora.safetensors", lora, tensors, base)
    merge(net)
    result = patched_by_comfyui(before, load_file(file))
    torch.testing.assert_close(result, dict(net.state_dict()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [("blocks",), ("cross_attn.{k,v}_audio",)], ids=str)
def test_audio_layers_have_a_file_of_their_own(targets: tuple[str, ...], tmp_path: Path) -> None:
    """The file of Wan's layers and the one of audio layers are read together, or one is reported
    missing.
    """
    net = tiny.net(trained=True)
    lora, tensors, base = trained(net, targets)
    file = tmp_path / "lora.safetensors"
    files = save_single_file(file, lora, tensors, base)
    assert files == [file, audio_file_of(file)][: 1 + (targets == ("blocks",))]
    audio = {key for key in load_file(files[-1]) if key.endswith(".alpha")}
    assert {key.removeprefix("diffusion_model.").removesuffix(".alpha") for key in audio} == {
        name.split(".lora_")[0] for name in tensors if is_audio(name.split(".lora_")[0])
    }
    if len(files) == 2:
        assert not any("audio" in key for key in load_file(file))
    read = tiny.net(trained=True)
    merge_adapters(read, read_adapters(file, read))
    merge(net)
    torch.testing.assert_close(dict(read.state_dict()), dict(net.state_dict()))
    files[-1].unlink()
    with pytest.raises(WeightsError, match="no adapters that can be read"):
        read_adapters(file, tiny.net(trained=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_folder_and_the_file_hold_the_same_adapters(dtype: torch.dtype, tmp_path: Path) -> None:
    net = tiny.net(trained=True)
    lora, tensors, base = trained(net, ("blocks", "head"))
    layers = sorted({name.split(".lora_")[0] for name in tensors})
    save_adapters(tmp_path / "folder", lora, tensors, layers, base, dtype)
    save_single_file(tmp_path / "file.safetensors", lora, tensors, base, dtype)
    states = []
    for path in (tmp_path / "folder", tmp_path / "file.safetensors"):
        read = tiny.net(trained=True)
        merge_adapters(read, read_adapters(path, read))
        states.append(dict(read.state_dict()))
    tolerance = {"rtol": 0, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0, "atol": 1e-2}
    torch.testing.assert_close(states[0], states[1], **tolerance)


def test_a_weight_keeps_its_dtype_and_a_mapped_file_its_bytes(tmp_path: Path) -> None:
    from echolab.models.loading import load_released

    save_file(tiny.net(trained=True).bfloat16().state_dict(), tmp_path / "base.safetensors")
    before = (tmp_path / "base.safetensors").read_bytes()
    loaded = load_released(tmp_path / "base.safetensors", tiny.SIZES, dtype=torch.bfloat16)
    save_file(kohya(pairs(loaded.net)), tmp_path / "lora.safetensors")
    merge_adapters(loaded.net, read_adapters(tmp_path / "lora.safetensors", loaded.net))
    assert {p.dtype for p in loaded.net.parameters()} == {torch.bfloat16}
    assert (tmp_path / "base.safetensors").read_bytes() == before


# -- what is refused --------------------------------------------------------------------------


def without_half(content: Tensors) -> Tensors:
    content.pop("lora_unet_blocks_1_ffn_0.lora_down.weight")
    return content


def with_key(key: str) -> Callable[[Tensors], Tensors]:
    return lambda content: content | {key: torch.zeros(2, 2)}


def not_finite(content: Tensors) -> Tensors:
    content["lora_unet_head_head.lora_up.weight"][0, 0] = torch.nan
    return content


def transposed(content: Tensors) -> Tensors:
    key = "lora_unet_blocks_1_ffn_0.lora_down.weight"
    return content | {key: content[key].T.contiguous()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_half, "blocks_1_ffn_0: its down half is missing"),
        (with_key("lora_unet_blocks_7_ffn_0.alpha"), "another model: lora_unet_blocks_7_ffn_0"),
        (with_key("lora_te_text_model_0.lora_up.weight"), "another model: lora_te_text_model_0"),
        (with_key("lora_unet_blocks_0_ffn_0.dora_scale"), "dora_scale: no part of plain LoRA"),
        (with_key("lora_unet_blocks_0_ffn_0.lokr_w1"), "lokr_w1: no part of plain LoRA"),
        (with_key("lora_unet_blocks_0_ffn_0.hada_w1_a"), "hada_w1_a: no part of plain LoRA"),
        (with_key("lora_unet_blocks_0_norm3.diff_b"), r"change of blocks\.0\.norm3\.bias is \(2,"),
        (not_finite, "head_head.lora_up.weight: values that are not finite"),
        (transposed, r"blocks\.1\.ffn\.0: .* the layer is 64 x 48"),
    ],
)
def test_another_kind_of_file_gives_a_one_line_error(
    change: Callable[[Tensors], Tensors], message: str, tmp_path: Path
) -> None:
    net = tiny.net(trained=True)
    file = tmp_path / "lora.safetensors"
    save_file(change(kohya(pairs(net))), file)
    with pytest.raises(WeightsError, match=message) as caught:
        read_adapters(file, net)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    state = tiny.net(trained=True).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_a_second_file_has_a_plain_name(tmp_path: Path) -> None:
    net = tiny.net(trained=True)
    file = tmp_path / "lora.safetensors"
    save_file(kohya(pairs(net)), file, {"echolab_audio_layers": "../other.safetensors"})
    with pytest.raises(WeightsError, match="no plain file name"):
        read_adapters(file, net)
