"""The network's parameters in files: names of Wan and of diffusers, loading, first values."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from echolab.errors import CheckpointError
from echolab.models.transformer import EchoTransformer

# Parts that a base checkpoint may lack: `load_weights(net, tensors, fresh=...)`.
AUDIO_PARTS = ("audio2token.", ".k_audio.", ".v_audio.", ".norm_k_audio.")
IMAGE_PARTS = ("img_emb.", ".k_img.", ".v_img.", ".norm_k_img.")

_TOP = {
    "text_embedding.0.": "condition_embedder.text_embedder.linear_1.",
    "text_embedding.2.": "condition_embedder.text_embedder.linear_2.",
    "time_embedding.0.": "condition_embedder.time_embedder.linear_1.",
    "time_embedding.2.": "condition_embedder.time_embedder.linear_2.",
    "time_projection.1.": "condition_embedder.time_proj.",
    "img_emb.proj.0.": "condition_embedder.image_embedder.norm1.",
    "img_emb.proj.1.": "condition_embedder.image_embedder.ff.net.0.proj.",
    "img_emb.proj.3.": "condition_embedder.image_embedder.ff.net.2.",
    "img_emb.proj.4.": "condition_embedder.image_embedder.norm2.",
    "head.head.": "proj_out.",
    "head.modulation": "scale_shift_table",
    "audio2token.": "condition_embedder.audio_embedder.",  # ours: diffusers has no sound
}
_ATTENTION = {
    "q.": "to_q.",
    "k.": "to_k.",
    "v.": "to_v.",
    "o.": "to_out.0.",
    "norm_q.": "norm_q.",
    "norm_k.": "norm_k.",
    "k_img.": "add_k_proj.",
    "v_img.": "add_v_proj.",
    "norm_k_img.": "norm_added_k.",
    "k_audio.": "add_k_audio_proj.",  # these three are ours too
    "v_audio.": "add_v_audio_proj.",
    "norm_k_audio.": "norm_added_k_audio.",
}
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3.": "norm2.",  # diffusers counts the norms in the order they are used
    "ffn.0.": "ffn.net.0.proj.",
    "ffn.2.": "ffn.net.2.",
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in _ATTENTION.items()},
}


def _renamed(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    number = re.match(r"blocks\.\d+\.", name)
    start, rest = (number[0], name[number.end() :]) if number else ("", name)
    for ours, theirs in (block if number else top).items():
        if rest.startswith(ours):
            return start + theirs + rest[len(ours) :]
    return name  # patch_embedding is called the same


def to_diffusers(name: str) -> str:
    """A parameter's name in diffusers' WanTransformer3DModel."""
    return _renamed(name, _TOP, _BLOCK)


def from_diffusers(name: str) -> str:
    """The original name of a parameter of WanTransformer3DModel."""
    return _renamed(
        name, {new: old for old, new in _TOP.items()}, {new: old for old, new in _BLOCK.items()}
    )


class LoadReport(NamedTuple):
    """What a checkpoint did not decide."""

    fresh: list[str]  # parameters that keep their values
    widened: list[str]  # parameters whose extra input channels were set to zero


def load_weights(
    net: EchoTransformer, tensors: Mapping[str, Tensor], *, fresh: Sequence[str] = ()
) -> LoadReport:
    """Copy `tensors`, by original names, into `net`; all of them, and nothing missing.

    `fresh` names parts (`AUDIO_PARTS`, `IMAGE_PARTS`) that the file may lack.  Where the network's
    patch embedding takes more channels than the file's, the extra ones become zero, so that a
    text-to-video checkpoint can start an inpainting network (VideoX-Fun's rule).
    Raises CheckpointError naming the first tensor that does not fit; `net` is then unchanged.
    """
    parameters = dict(net.named_parameters())
    missing = [name for name in parameters if name not in tensors]
    lacking = [name for name in missing if not any(part in name for part in fresh)]
    unknown = [name for name in tensors if name not in parameters]
    if lacking or unknown:
        what = f"lacks {lacking[0]}" if lacking else f"has {unknown[0]}, which the network lacks"
        raise CheckpointError(
            f"checkpoint {what} ({len(lacking)} missing, {len(unknown)} unknown): "
            "choose the model this file is of"
        )
    widened = []
    for name, parameter in parameters.items():
        have, need = tensors[name].shape if name in tensors else parameter.shape, parameter.shape
        wider = name == "patch_embedding.weight" and have[1] < need[1]
        if wider and have[:1] + have[2:] == need[:1] + need[2:]:
            widened.append(name)
        elif have != need:
            raise CheckpointError(
                f"checkpoint {name}: shape {list(have)}, the network has {list(need)}: "
                "choose the model this file is of"
            )
    with torch.no_grad():
        for name in parameters.keys() - set(missing):
            parameter, tensor = parameters[name], tensors[name]
            if name in widened:
                parameter.zero_()
            target = parameter[:, : tensor.shape[1]] if name in widened else parameter
            target.copy_(tensor)
    return LoadReport(fresh=missing, widened=widened)


def initialise(net: EchoTransformer, generator: torch.Generator) -> None:
    """Wan's first values, in the order of the parameters: the same net for the same generator.

    Xavier for linear layers, normal (0.02) for text and time, normal (1 / sqrt(D)) for
    modulations, zero for the head and for the sound's keys and values.
    """
    with torch.no_grad():
        for name, module in net.named_modules():
            if isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear | nn.Conv3d):
                _initialise_linear(name, module, generator)
        for name, parameter in net.named_parameters():
            if name.endswith("modulation"):
                parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]), generator=generator)


def _initialise_linear(name: str, layer: nn.Linear | nn.Conv3d, generator: torch.Generator) -> None:
    if layer.bias is not None:
        layer.bias.zero_()
    if name == "head.head" or name.endswith(("k_audio", "v_audio")):
        layer.weight.zero_()
    elif name.startswith(("text_embedding", "time_embedding")):
        layer.weight.normal_(0, 0.02, generator=generator)
    else:
        nn.init.xavier_uniform_(layer.weight.flatten(1), generator=generator)
