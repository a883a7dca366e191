"""Tiny random encoders in the file formats of the released ones, with both kinds of names.

The authors' names are written out here independently of the loaders that they test.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import Unigram
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
)

VIDEO, TEXT = "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"
IMAGE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
WORDS = ("talking", "person", "blue", "a", "b", "-", ",", '"')
HEADS, CLIP_LAYERS, TEXT_LAYERS = 16, 3, 2


def vae(**changed: object) -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(**{"base_dim": 4, **changed}).eval()


def vae_names() -> list[str]:
    """Return the names in Wan2.1_VAE.pth, from the layout in `wan/modules/vae.py`."""
    block = [f"residual.{n}.{k}" for n, k in ((0, "gamma"), (2, "weight"), (2, "bias"),
             (3, "gamma"), (6, "weight"), (6, "bias"))]  # fmt: skip
    short, resample = ("shortcut.weight", "shortcut.bias"), ("resample.1.weight", "resample.1.bias")
    in_time = ("time_conv.weight", "time_conv.bias")
    middle = {0: block, 2: block}
    middle[1] = [
        "norm.gamma",
        *(f"{a}.{k}" for a in ("to_qkv", "proj") for k in ("weight", "bias")),
    ]
    down = {n: list(block) for n in (0, 1, 3, 4, 6, 7, 9, 10)}
    down |= {2: [*resample], 5: [*resample, *in_time], 8: [*resample, *in_time]}
    up = {n: list(block) for n in (0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14)}
    up |= {3: [*resample, *in_time], 7: [*resample, *in_time], 11: [*resample]}
    for blocks, widened in ((down, (3, 6)), (up, (4,))):
        for number in widened:
            blocks[number] += short
    names = [f"{c}.{k}" for c in ("conv1", "conv2") for k in ("weight", "bias")]
    for half, part, blocks in (("encoder", "downsamples", down), ("decoder", "upsamples", up)):
        names += [f"{half}.conv1.weight", f"{half}.conv1.bias", f"{half}.head.0.gamma"]
        names += [f"{half}.head.2.weight", f"{half}.head.2.bias"]
        names += [f"{half}.middle.{n}.{rest}" for n in middle for rest in middle[n]]
        names += [f"{half}.{part}.{n}.{rest}" for n in blocks for rest in blocks[n]]
    return names


def vae_original(net: AutoencoderKLWan) -> dict[str, Tensor]:
    """Return the tensors by the authors' names, as diffusers' own converter pairs them."""
    pairs = {name: next(iter(convert_wan_vae_to_diffusers({name: 0}))) for name in vae_names()}
    state = net.state_dict()
    assert sorted(pairs.values()) == sorted(state)
    return {old: state[new].clone() for old, new in pairs.items()}


def umt5() -> UMT5EncoderModel:
    torch.manual_seed(1)
    config = UMT5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=24, num_heads=4,
                        num_layers=TEXT_LAYERS, feed_forward_proj="gated-gelu")  # fmt: skip
    net = UMT5EncoderModel(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.3)
    return net


def umt5_original(net: UMT5EncoderModel) -> dict[str, Tensor]:
    state = net.state_dict()
    named = {
        "token_embedding.weight": state["shared.weight"],
        "norm.weight": state["encoder.final_layer_norm.weight"],
    }
    for n in range(TEXT_LAYERS):
        attention, forward = (f"encoder.block.{n}.layer.{k}." for k in (0, 1))
        block = {
            "norm1": attention + "layer_norm",
            **{f"attn.{k}": f"{attention}SelfAttention.{k}" for k in "qkvo"},
            "pos_embedding.embedding": attention + "SelfAttention.relative_attention_bias",
            "norm2": forward + "layer_norm",
            "ffn.gate.0": forward + "DenseReluDense.wi_0",
            "ffn.fc1": forward + "DenseReluDense.wi_1",
            "ffn.fc2": forward + "DenseReluDense.wo",
        }
        named |= {f"blocks.{n}.{old}.weight": state[f"{new}.weight"] for old, new in block.items()}
    return {name: tensor.clone() for name, tensor in named.items()}


def clip() -> CLIPVisionModel:
    torch.manual_seed(2)
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=CLIP_LAYERS,
                              num_attention_heads=HEADS, image_size=224, patch_size=14,
                              hidden_act="gelu")  # fmt: skip
    net = CLIPVisionModel(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.2)
    return net


def clip_original(net: CLIPVisionModel) -> dict[str, Tensor]:
    """Return the tensors by the authors' names, with a text tower, as in the released file."""
    state = {name.removeprefix("vision_model."): value for name, value in net.state_dict().items()}
    embeddings = "embeddings."
    named = {
        "cls_embedding": state[embeddings + "class_embedding"][None, None],
        "pos_embedding": state[embeddings + "position_embedding.weight"][None],
        "patch_embedding.weight": state[embeddings + "patch_embedding.weight"],
        "head": torch.randn(32, 8),
    }
    for kind in ("weight", "bias"):
        named[f"pre_norm.{kind}"] = state[f"pre_layrnorm.{kind}"]
        named[f"post_norm.{kind}"] = state[f"post_layernorm.{kind}"]
        for n in range(CLIP_LAYERS):
            old, new = f"transformer.{n}.", f"encoder.layers.{n}."
            named[f"{old}attn.to_qkv.{kind}"] = torch.cat(
                [state[f"{new}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            )
            named[f"{old}attn.proj.{kind}"] = state[f"{new}self_attn.out_proj.{kind}"]
            for a, b in (("norm1", "layer_norm1"), ("norm2", "layer_norm2"),
                         ("mlp.0", "mlp.fc1"), ("mlp.2", "mlp.fc2")):  # fmt: skip
                named[f"{old}{a}.{kind}"] = state[f"{new}{b}.{kind}"]
    visual = {f"visual.{name}": tensor.clone() for name, tensor in named.items()}
    return {**visual, "log_scale": torch.ones([]), "textual.norm.weight": torch.ones(4)}


def tokenizer() -> Tokenizer:
    """Build a vocabulary of a few words that ends each text as umT5 does."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -1.0) for word in WORDS] + [(word, -3.0) for word in WORDS]
    made = Tokenizer(Unigram(pieces, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 1)]
    )
    return made


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True)
    tokenizer().save(str(folder / "tokenizer.json"))


def wav2vec_config() -> Wav2Vec2Config:
    return Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=12, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
        vocab_size=8, codevector_dim=8, proj_codevector_dim=8, num_codevectors_per_group=4,
    )  # fmt: skip


def write_base_960h(folder: Path) -> None:
    """Write facebook/wav2vec2-base-960h: a network with a head of words, as safetensors."""
    torch.manual_seed(3)
    Wav2Vec2ForCTC(wav2vec_config()).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)


def write_chinese_base(folder: Path) -> None:
    """Write TencentGameMate/chinese-wav2vec2-base: a pickle, with the weight norm's old names."""
    torch.manual_seed(4)
    net = Wav2Vec2ForPreTraining(wav2vec_config())
    net.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    old = {"parametrizations.weight.original0": "weight_g",
           "parametrizations.weight.original1": "weight_v"}  # fmt: skip
    named = {}
    for name, tensor in net.state_dict().items():
        for new, word in old.items():
            name = name.replace(new, word)
        named[name] = tensor
    torch.save(named, folder / "pytorch_model.bin")
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)


def write_release(folder: Path) -> None:
    """Write Wan2.1-Fun-V1.1-1.3B-InP: the authors' files."""
    folder.mkdir(parents=True)
    torch.save(vae_original(vae()), folder / VIDEO)
    torch.save(umt5_original(umt5()), folder / TEXT)
    torch.save(clip_original(clip()), folder / IMAGE)
    write_tokenizer(folder / "google" / "umt5-xxl")


def write_pipeline(folder: Path) -> None:
    """Write the same networks as the folders of a diffusers pipeline; umT5 in shards.

    The names of CLIP are those of published folders, with a prefix and the position indices.
    """
    vae().save_pretrained(folder / "vae")
    umt5().save_pretrained(folder / "text_encoder", max_shard_size="4KB")
    image = clip()
    image.save_pretrained(folder / "image_encoder")
    named = {f"vision_model.{name}": tensor for name, tensor in image.state_dict().items()}
    named["vision_model.embeddings.position_ids"] = torch.arange(257)[None]
    save_file(named, folder / "image_encoder" / "model.safetensors", {"format": "pt"})
    write_tokenizer(folder / "tokenizer")


def edit_json(path: Path, **changed: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
