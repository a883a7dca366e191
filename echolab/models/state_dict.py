"""Parameters of the network: names in files, matching with a file, initialization, assignment.

Files have the parameter names of Wan and EchoMimicV3 (original names) or of diffusers.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from echolab.errors import CheckpointError
from echolab.models.transformer import EchoTransformer

# Original names -> diffusers' names: outside of blocks, within an attention, within a block.
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
    "audio2token.": "condition_embedder.audio_embedder.",  # our names: diffusers has no audio
    "audio_injection.": "condition_embedder.audio_injection.",
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
    "q_audio.": "add_q_audio_proj.",  # our names too, also for the next three
    "k_audio.": "add_k_audio_proj.",
    "v_audio.": "add_v_audio_proj.",
    "norm_k_audio.": "norm_added_k_audio.",
}
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3.": "norm2.",  # diffusers numbers the norms in the order of use
    "ffn.0.": "ffn.net.0.proj.",
    "ffn.2.": "ffn.net.2.",
    **{f"self_attn.{old}": f"attn1.{new}" for old, new in _ATTENTION.items()},
    **{f"cross_attn.{old}": f"attn2.{new}" for old, new in _ATTENTION.items()},
}
_TOP_BACK = {new: old for old, new in _TOP.items()}
_BLOCK_BACK = {new: old for old, new in _BLOCK.items()}


def _rename(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    """Return a name with its prefix replaced by `top` or, after `blocks.N.`, by `block`."""
    # Names within a block do not depend on the block index.
    match = re.match(r"blocks\.\d+\.", name)
    start, rest = (match[0], name[match.end() :]) if match else ("", name)
    for old, new in (block if match else top).items():
        if rest.startswith(old):
            return start + new + rest[len(old) :]
    return name  # patch_embedding has the same name in both


def to_diffusers(name: str) -> str:
    """Return a parameter's name in diffusers' WanTransformer3DModel."""
    return _rename(name, _TOP, _BLOCK)


def from_diffusers(name: str) -> str:
    """Return the original name of a parameter of WanTransformer3DModel."""
    return _rename(name, _TOP_BACK, _BLOCK_BACK)


# Parts that may be missing from a base checkpoint: `load_weights(net, tensors, fresh=...)`.
AUDIO_PARTS = ("audio2token.", "audio_injection.", ".k_audio.", ".v_audio.", ".norm_k_audio.")
IMAGE_PARTS = ("img_emb.", ".k_img.", ".v_img.", ".norm_k_img.")
# Flash's audio query, which its code computes and then overwrites with the shared query.
DEAD_PART = ".q_audio."

# Parameter that identifies each released model; the first match counts.
MARKS = {
    "echomimicv3_flash": "audio_injection.norm.weight",
    "echomimicv3_preview": "audio2token.norm.weight",
    "wan_fun_inp_1b3": "img_emb.proj.0.weight",
    "wan_t2v_1b3": "head.modulation",
}


def model_of(names: Collection[str]) -> str | None:
    """Return the released model, of any size, with these parameters (original names), or None."""
    return next((model for model, mark in MARKS.items() if mark in names), None)


class LoadReport(NamedTuple):
    """Names of a checkpoint's tensors and the network's parameters, by how they match."""

    loaded: list[str]  # loaded, converted to the parameter's dtype
    widened: list[str]  # loaded, with zeros for input channels that the file lacks
    fresh: list[str]  # not in the file, initialized
    unused: list[str]  # in the file, but without effect in the released model

    def lines(self) -> list[str]:
        """Return one line for each kind with all names; `*` replaces the block index."""
        reasons = {
            "widened": "loaded, zeros for the input channels that the file lacks",
            "fresh": "not in the file, keep their initialization",
            "unused": "in the file, without effect in the released model",
        }
        lines = [f"{len(self.loaded)} tensors loaded as they are"]
        for kind, reason in reasons.items():
            names = getattr(self, kind)
            patterns = dict.fromkeys(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names)
            if names:
                lines.append(f"{len(names)} {reason}: {', '.join(patterns)}")
        return lines


def load_weights(
    net: EchoTransformer,
    tensors: Mapping[str, Tensor],
    *,
    fresh: Sequence[Sequence[str]] = (),
    source: str = "checkpoint",
) -> LoadReport:
    """Set `tensors`, by original names, as the parameters of `net`; see `match_weights`.

    Tensors with the parameter's dtype are assigned without a copy, so that a network on the meta
    device shares the memory of a mapped file; other tensors are converted.
    If CheckpointError is raised, `net` is unchanged.
    """
    report = match_weights(net, tensors, fresh=fresh, source=source)
    assign_parameters(net, converted_tensors(net, tensors, report))
    return report


def converted_tensors(
    net: EchoTransformer,
    tensors: Mapping[str, Tensor],
    report: LoadReport,
    device: torch.device | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield a file's tensors by parameter name, in the parameters' shapes and dtypes.

    Each tensor is moved to `device` and converted there; None means the tensor's own device.
    """
    parameters = dict(net.named_parameters())
    for name in [*report.loaded, *report.widened]:
        yield name, _convert(tensors[name].detach(), parameters[name], device)


def match_weights(
    net: EchoTransformer,
    tensors: Mapping[str, Tensor],
    *,
    fresh: Sequence[Sequence[str]] = (),
    source: str = "checkpoint",
) -> LoadReport:
    """Match `tensors`, by original names, with the parameters of `net`; both must be complete.

    `fresh` lists parts (`AUDIO_PARTS`, `IMAGE_PARTS`) that may be missing, but only as a unit.  If
    `fresh` is not empty, a patch embedding for noisy latents only is widened with zeros for a
    network with known latents as input: a text-to-video checkpoint can initialize an inpainting
    network, as in VideoX-Fun.
    Raise a CheckpointError that names the first tensor that does not match.
    """
    # Allow Flash's unused query in the file, and missing parts that are in `fresh`.
    parameters = dict(net.named_parameters())
    dead = {name: s for name, s in released_shapes(net).items() if name not in parameters}
    unused = [name for name in tensors if name in dead and tensors[name].shape == dead[name]]
    absent = _may_be_absent(parameters, tensors, fresh)
    _check_names(parameters, set(tensors) - set(unused), absent, source)
    # Shapes must agree, except for input channels that a text-to-video base lacks.
    present = [name for name in parameters if name in tensors]
    masks = net.geometry.time_stride
    widened = [n for n in present if fresh and _widens(n, parameters[n], tensors[n], masks)]
    for name in present:
        shape, expected = list(tensors[name].shape), list(parameters[name].shape)
        if shape != expected and name not in widened:
            raise CheckpointError(
                f"{source}: {name}: shape {shape}, the network has {expected}; "
                "choose the model of this file"
            )
    loaded = [name for name in present if name not in widened]
    return LoadReport(loaded, widened, [n for n in parameters if n in absent], unused)


def _may_be_absent(
    parameters: Collection[str], present: Collection[str], fresh: Sequence[Sequence[str]]
) -> set[str]:
    """Return the parameters of the parts in `fresh` that have no tensor at all in `present`."""
    absent: set[str] = set()
    for part in fresh:
        names = {name for name in parameters if any(piece in name for piece in part)}
        if names.isdisjoint(present):
            absent |= names
    return absent


def _check_names(
    parameters: Collection[str], present: set[str], absent: set[str], source: str
) -> None:
    lacking = [name for name in parameters if name not in present and name not in absent]
    unknown = sorted(present - set(parameters))
    if not lacking and not unknown:
        return
    # The most common mistake is a file of another model: name that model.
    file_model, net_model = model_of(present), model_of(parameters)
    if file_model and file_model != net_model:
        raise CheckpointError(
            f"{source}: holds {file_model} (it has {MARKS[file_model]}), the network is "
            f"{net_model}; give model={file_model}, or a file of {net_model}"
        )
    fault = f"lacks {lacking[0]}" if lacking else f"has {unknown[0]}, which the network lacks"
    raise CheckpointError(
        f"{source}: {fault} ({len(lacking)} missing, {len(unknown)} unknown); "
        "choose the model of this file"
    )


def _widens(name: str, parameter: Tensor, tensor: Tensor, mask_channels: int) -> bool:
    """Return whether a patch embedding lacks only the channels of mask and known latents."""
    narrow, wide = tensor.shape, parameter.shape
    if name != "patch_embedding.weight" or len(narrow) != len(wide):
        return False
    # Full input: noisy latents, known latents and mask; all other dimensions must agree.
    fits = 2 * narrow[1] + mask_channels == wide[1]
    return fits and narrow[:1] + narrow[2:] == wide[:1] + wide[2:]


def _convert(tensor: Tensor, parameter: Tensor, device: torch.device | None) -> Tensor:
    """Convert a file's tensor to the parameter's dtype and shape; zero-fill missing channels."""
    if tensor.shape != parameter.shape:
        wide = torch.zeros(parameter.shape, dtype=parameter.dtype)
        wide[:, : tensor.shape[1]] = tensor
        return wide
    # Move before converting: a conversion in host memory would make one copy per rank.
    return tensor.to(device).to(parameter.dtype).contiguous()


def released_shapes(net: EchoTransformer) -> dict[str, torch.Size]:
    """Return names and shapes of the released file's tensors, in order, with Flash's dead query."""
    shapes: dict[str, torch.Size] = {}
    # Flash's files contain the dead query before each audio key.
    for name, parameter in net.named_parameters():
        if net.audio_injection is not None and ".k_audio." in name:
            shapes[name.replace(".k_audio.", DEAD_PART)] = parameter.shape
        shapes[name] = parameter.shape
    return shapes


def meta_network(architecture: Mapping[str, Any]) -> EchoTransformer:
    """Return a network on the meta device, without parameter values; see `assign_parameters`."""
    with torch.device("meta"):
        return EchoTransformer(**architecture)


@torch.no_grad()
def assign_parameters(
    net: nn.Module, values: Iterable[tuple[str, Tensor]], device: torch.device | None = None
) -> None:
    """Set the tensors of (parameter name, tensor) pairs as the parameters of `net`, on `device`.

    None keeps each tensor on its device.  Tensors are moved one by one, so that host memory holds
    only one at a time if `values` is a generator.
    """
    # `assign` replaces parameters, which may be on the meta device, without a copy.
    moved = {name: tensor.to(device) for name, tensor in values}
    net.load_state_dict(moved, strict=False, assign=True)


@torch.no_grad()
def initial_values(
    net: EchoTransformer, generator: torch.Generator, only: Collection[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield Wan's initialization by parameter name, one tensor at a time, in host memory.

    Xavier for linear layers, normal (std 0.02) for text and time embeddings, normal (1 / sqrt(D))
    for modulations, zero for the head and for the audio keys and values.  `only` names the
    parameters to draw; None means all.  `net` may be on any device, also on meta: values are drawn
    on the CPU, in the order of the parameters, and depend only on the generator's state.
    """
    # Draw modulations last, so that values for a seed do not depend on the nesting of the layers.
    for layer, name, parameter in sorted(_named_parameters(net), key=_is_modulation):
        if only is None or name in only:
            value = torch.empty(parameter.shape, dtype=parameter.dtype)
            _fill_initial(layer, name, value, generator)
            yield name, value


@torch.no_grad()
def initialize(
    net: EchoTransformer, generator: torch.Generator, only: Collection[str] | None = None
) -> None:
    """Set the parameters of `net` to Wan's initialization; see `initial_values`."""
    parameters = dict(net.named_parameters())
    for name, value in initial_values(net, generator, only):
        parameters[name].copy_(value)


def _named_parameters(net: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for path, layer in net.named_modules():
        for leaf, parameter in layer.named_parameters(recurse=False):
            yield layer, f"{path}.{leaf}".removeprefix("."), parameter


def _is_modulation(entry: tuple[nn.Module, str, Tensor]) -> bool:
    return entry[1].endswith("modulation")


def _fill_initial(layer: nn.Module, name: str, value: Tensor, generator: torch.Generator) -> None:
    # Norms: weight 1, bias 0.
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        value.fill_(float(name.endswith("weight")))
    elif name.endswith("modulation"):
        value.normal_(0, 1 / math.sqrt(value.shape[-1]), generator=generator)
    elif name.endswith("bias") or name.startswith("head.") or re.search(r"\.[kv]_audio\.", name):
        value.zero_()
    elif name.startswith(("text_embedding", "time_embedding")):
        value.normal_(0, 0.02, generator=generator)
    else:
        nn.init.xavier_uniform_(value.flatten(1), generator=generator)
