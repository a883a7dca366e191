"""The released image and video encoders, wrong files and true sizes, on tiny checkpoints."""

from pathlib import Path

import pytest
import released
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionModel

from echolab.encoders import clip, umt5, wan_vae
from echolab.encoders.clip import MEAN, STD, load_image_encoder, resize
from echolab.encoders.umt5 import load_text_encoder
from echolab.encoders.wan_vae import load_autoencoder
from echolab.errors import WeightsError

CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "Wan2.1-Fun-V1.1-1.3B-InP"
    released.write_release(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    released.write_pipeline(folder)
    return folder


def pixels(clips: int = 2, frames: int = 5, height: int = 32, width: int = 48) -> Tensor:
    shape = (clips, 3, frames, height, width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(5)) * 2 - 1


def same_state(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The autoencoder


def test_latents_are_the_mode_normalized_by_the_published_statistics(pipeline: Path) -> None:
    mean = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]  # fmt: skip
    std = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]  # fmt: skip
    oracle = AutoencoderKLWan.from_pretrained(pipeline / "vae").eval()
    ours = load_autoencoder(pipeline / "vae", CPU, FP32)
    with torch.no_grad():
        raw = oracle.encode(pixels()).latent_dist.mode()
    latents = ours.encode(pixels())
    assert latents.shape == (2, 16, 2, 4, 6) and latents.dtype == FP32
    for channel in range(16):
        expected = (raw[:, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(latents[:, channel], expected)
    with torch.no_grad():
        decoded = oracle.decode(raw).sample
    torch.testing.assert_close(ours.decode(latents), decoded, rtol=1e-3, atol=1e-4)


def test_denormalization_inverts_normalization(pipeline: Path) -> None:
    ours = load_autoencoder(pipeline / "vae", CPU, FP32)
    latents = ours.encode(pixels())
    reached = []
    ours.net.post_quant_conv.register_forward_hook(lambda net, given, out: reached.append(given[0]))
    ours.decode(latents)
    with torch.no_grad():
        raw = ours.net.encode(pixels()).latent_dist.mode()
    torch.testing.assert_close(torch.cat(reached), raw, rtol=1e-5, atol=1e-6)


def test_slicing_changes_nothing_and_tiling_only_clips_with_several_tiles(pipeline: Path) -> None:
    folder = pipeline / "vae"
    at_once = load_autoencoder(folder, CPU, FP32, slicing=False).encode(pixels())
    torch.testing.assert_close(load_autoencoder(folder, CPU, FP32).encode(pixels()), at_once)
    tiled = load_autoencoder(folder, CPU, FP32, tiling=True)
    torch.testing.assert_close(tiled.encode(pixels()), at_once)
    wide = pixels(1, 1, 32, 272)
    full = load_autoencoder(folder, CPU, FP32).encode(wide)
    assert tiled.encode(wide).shape == full.shape
    assert not torch.equal(tiled.encode(wide), full)


def test_the_authors_names_give_the_same_autoencoder(
    release: Path, pipeline: Path, tmp_path: Path
) -> None:
    folder = load_autoencoder(pipeline / "vae", CPU, FP32)
    original = load_autoencoder(release / released.VIDEO, CPU, FP32)
    save_file(released.vae_original(released.vae()), tmp_path / "vae.safetensors")
    other = load_autoencoder(tmp_path / "vae.safetensors", CPU, FP32)
    assert same_state(folder.net, original.net) and same_state(folder.net, other.net)
    assert same_state(folder.net, released.vae())
    assert torch.equal(folder.encode(pixels()), original.encode(pixels()))


def test_an_autoencoder_in_bf16_still_gives_fp32(release: Path) -> None:
    exact = load_autoencoder(release / released.VIDEO, CPU, FP32).encode(pixels())
    ours = load_autoencoder(release / released.VIDEO, CPU, torch.bfloat16)
    assert next(ours.net.parameters()).dtype == torch.bfloat16
    latents = ours.encode(pixels())
    assert latents.dtype == FP32
    assert float((latents - exact).abs().mean()) < 0.02 * float(exact.abs().mean())
    assert not any(parameter.requires_grad for parameter in ours.net.parameters())


def test_an_autoencoder_of_other_channels_is_refused_in_one_line(tmp_path: Path) -> None:
    wide = released.vae(z_dim=48, latents_mean=[0.0] * 48, latents_std=[1.0] * 48)
    wide.save_pretrained(tmp_path / "vae")
    with pytest.raises(WeightsError, match=r"config.json: z_dim is 48, need 16.*Wan 2.1") as caught:
        load_autoencoder(tmp_path / "vae", CPU, FP32)
    assert "\n" not in str(caught.value)
    torch.save(released.vae_original(wide), tmp_path / "vae.pth")
    with pytest.raises(WeightsError, match=r"vae.pth: channels of post_quant_conv is 48, need 16"):
        load_autoencoder(tmp_path / "vae.pth", CPU, FP32)
    released.vae().save_pretrained(tmp_path / "short")
    released.edit_json(tmp_path / "short" / "config.json", latents_mean=[0.0] * 12)
    with pytest.raises(WeightsError, match=r"length of latents_mean is 12, need 16"):
        load_autoencoder(tmp_path / "short", CPU, FP32)


# The image encoder


def wan_image_states(tensors: dict[str, Tensor], pixels: Tensor, blocks: int) -> Tensor:
    """Compute Wan's vision tower by its own names, as `wan/modules/clip.py` does: [N, D]."""
    named = {name.removeprefix("visual."): value for name, value in tensors.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = named[f"{name}.weight"], named[f"{name}.bias"]
        return functional.layer_norm(x, weight.shape, weight, bias, 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ named[f"{name}.weight"].T + named[f"{name}.bias"]

    patches = functional.conv2d(pixels, named["patch_embedding.weight"], stride=14)
    x = torch.cat([named["cls_embedding"][0], patches[0].flatten(1).T]) + named["pos_embedding"][0]
    x = norm(x, "pre_norm")
    for n in range(blocks):
        block = f"transformer.{n}."
        parts = linear(norm(x, block + "norm1"), block + "attn.to_qkv")
        q, k, v = parts.unflatten(-1, (3, released.HEADS, -1)).permute(1, 2, 0, 3)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        x = x + linear(mixed, block + "attn.proj")
        hidden = functional.gelu(linear(norm(x, block + "norm2"), block + "mlp.0"))
        x = x + linear(hidden, block + "mlp.2")
    return x


def photo(height: int = 64, width: int = 96) -> Tensor:
    return pixels(1, 1, height, width)[0, :, 0]


def test_image_tokens_are_the_output_of_the_second_to_last_block(
    release: Path, pipeline: Path
) -> None:
    oracle = CLIPVisionModel.from_pretrained(pipeline / "image_encoder").eval()
    ours = load_image_encoder(pipeline / "image_encoder", CPU, FP32)
    with torch.no_grad():
        states = oracle(resize(photo(), 224), output_hidden_states=True).hidden_states
    tokens = ours(photo())
    assert tokens.shape == (257, 32) and tokens.dtype == FP32
    torch.testing.assert_close(tokens, states[-2][0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tokens, states[-1][0], atol=1e-2)
    tensors = released.clip_original(released.clip())
    expected = wan_image_states(tensors, resize(photo(), 224), released.CLIP_LAYERS - 1)
    original = load_image_encoder(release / released.IMAGE, CPU, FP32)
    torch.testing.assert_close(original(photo()), expected, rtol=1e-4, atol=1e-4)


def test_the_authors_names_give_the_same_image_encoder(release: Path, pipeline: Path) -> None:
    original = load_image_encoder(release / released.IMAGE, CPU, FP32)
    folder = load_image_encoder(pipeline / "image_encoder", CPU, FP32)
    assert same_state(original.net, folder.net)
    assert torch.equal(original(photo()), folder(photo()))


def test_no_image_is_zeros_of_the_same_shape(release: Path) -> None:
    ours = load_image_encoder(release / released.IMAGE, CPU, torch.bfloat16)
    assert torch.equal(ours(None), torch.zeros(257, 32))
    assert ours(photo()).shape == (257, 32)


def test_an_image_of_any_shape_is_resized() -> None:
    scale = torch.tensor(STD).view(1, 3, 1, 1)
    gray = -torch.tensor(MEAN).view(1, 3, 1, 1) / scale
    for height, width in ((64, 96), (832, 480), (224, 224), (17, 300)):
        black = resize(torch.full((3, height, width), -1.0), 224)
        torch.testing.assert_close(black, gray.expand(1, 3, 224, 224), rtol=1e-4, atol=1e-4)
    exact = photo(224, 224)
    expected = (exact[None] / 2 + 0.5) / scale + gray
    torch.testing.assert_close(resize(exact, 224), expected, rtol=1e-4, atol=1e-4)
    # Nothing is cut off: a mark in the last columns of a wide picture is in the last columns still.
    wide = torch.full((3, 224, 896), -1.0)
    wide[..., -40:] = 1
    columns = resize(wide, 224)[0, 0].mean(0)
    assert bool((columns[-8:] > 1).all()) and bool((columns[:-14] < -1).all())


# Wrong files


def test_a_faulty_file_gives_one_line(release: Path, tmp_path: Path) -> None:
    tensors = released.umt5_original(released.umt5())
    words = release / "google/umt5-xxl"
    path = tmp_path / "t5.pth"
    eight = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    torch.save(eight, path)
    with pytest.raises(WeightsError, match="t5.pth: .* is float8_e4m3fn, a fp8 file; give"):
        load_text_encoder(path, words, CPU, FP32)
    del tensors["blocks.1.ffn.fc1.weight"]
    torch.save(tensors, path)
    with pytest.raises(WeightsError, match=r"t5.pth: lacks encoder.block.1.*wi_1.weight;"):
        load_text_encoder(path, words, CPU, FP32)
    with pytest.raises(WeightsError, match=r"lacks shared.weight \(.*give the encoder of umT5"):
        load_text_encoder(release / released.VIDEO, words, CPU, FP32)
    with pytest.raises(WeightsError, match=r"lacks embeddings.patch_embedding.*CLIP of Wan"):
        load_image_encoder(release / released.TEXT, CPU, FP32)
    with pytest.raises(WeightsError, match="post_quant_conv.weight.*VAE of Wan"):
        load_autoencoder(release / released.IMAGE, CPU, FP32)


def test_a_folder_that_lacks_a_tensor_or_a_shard_is_refused(tmp_path: Path) -> None:
    released.umt5().save_pretrained(tmp_path / "text", max_shard_size="4KB")
    shards = sorted((tmp_path / "text").glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    released.write_tokenizer(tmp_path / "words")
    with pytest.raises(WeightsError, match=f"{shards[1].name}: not there.*shard"):
        load_text_encoder(tmp_path / "text", tmp_path / "words", CPU, FP32)
    net = released.clip()
    net.save_pretrained(tmp_path / "image")
    state = {name: value for name, value in net.state_dict().items() if "fc1.bias" not in name}
    save_file(state, tmp_path / "image" / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"image: lacks .*fc1.bias \(3 missing\)") as caught:
        load_image_encoder(tmp_path / "image", CPU, FP32)
    assert "\n" not in str(caught.value)
    released.edit_json(tmp_path / "image" / "config.json", hidden_size=64)
    with pytest.raises(WeightsError, match="image: "):
        load_image_encoder(tmp_path / "image", CPU, FP32)


# The true sizes


def test_the_released_sizes_are_read_from_the_released_shapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shapes on the meta device have the authors' names and the published sizes."""

    def meta(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    def parameters(net: torch.nn.Module) -> int:
        assert all(parameter.is_meta for parameter in net.parameters())
        return sum(parameter.numel() for parameter in net.parameters())

    text = {"token_embedding.weight": (256384, 4096), "norm.weight": (4096,)}
    for n in range(24):
        text |= {f"blocks.{n}.attn.{k}.weight": (4096, 4096) for k in "qkvo"}
        text |= {f"blocks.{n}.ffn.{k}.weight": (10240, 4096) for k in ("gate.0", "fc1")}
        text |= {f"blocks.{n}.ffn.fc2.weight": (4096, 10240)}
        text |= {f"blocks.{n}.pos_embedding.embedding.weight": (32, 64)}
        text |= {f"blocks.{n}.norm{k}.weight": (4096,) for k in (1, 2)}
    monkeypatch.setattr(umt5, "read_file", lambda path: meta(text))
    net = umt5._from_file(Path("t5"), torch.device("meta"), torch.bfloat16)
    assert (net.config.d_kv, net.config.num_heads, net.config.num_layers) == (64, 64, 24)
    assert parameters(net) == 5_680_910_336  # 11.4 GB in bf16, as the released file
    with torch.device("meta"):
        vae = AutoencoderKLWan()
    original = {name: tuple(value.shape) for name, value in released.vae_original(vae).items()}
    monkeypatch.setattr(wan_vae, "read_file", lambda path: meta(original))
    loaded = wan_vae._from_file(Path("vae"), torch.device("meta"), FP32)
    assert parameters(loaded) == parameters(vae) == 126_892_531
    image = {"cls_embedding": (1, 1, 1280), "pos_embedding": (1, 257, 1280), "head": (1280, 1024)}
    image |= {"patch_embedding.weight": (1280, 3, 14, 14)}
    for norm in ("pre_norm", "post_norm"):
        image |= {f"{norm}.{k}": (1280,) for k in ("weight", "bias")}
    for n in range(32):
        block = {"attn.to_qkv": (3840, 1280), "attn.proj": (1280, 1280)}
        block |= {"mlp.0": (5120, 1280), "mlp.2": (1280, 5120)}
        for name, shape in block.items():
            image |= {f"transformer.{n}.{name}.weight": shape}
            image |= {f"transformer.{n}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            image |= {f"transformer.{n}.{name}.{k}": (1280,) for k in ("weight", "bias")}
    visual = {f"visual.{name}": shape for name, shape in image.items()}
    monkeypatch.setattr(clip, "read_file", lambda path: meta(visual))
    tower = clip._from_file(Path("clip"), torch.device("meta"), FP32)
    assert parameters(tower) == 630_766_080 and tower.config.image_size == 224
