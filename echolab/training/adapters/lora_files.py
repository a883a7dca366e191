"""Write adapters: a folder as peft reads it, and one file for diffusers and ComfyUI.

    FOLDER/  adapter_config.json         rank, alpha, which layers
             adapter_model.safetensors   base_model.model.LAYER.lora_A.weight and lora_B.weight
    FOLDER.safetensors                   diffusion_model.LAYER.lora_A.weight, lora_B.weight, alpha
    FOLDER.audio.safetensors             the same of the audio layers, if these are adapted

The single file has the layers of the Wan network alone, since diffusers refuses a file with a layer
that it does not know; the audio layers have a file of their own, which the first one's metadata
names.  Metadata hold the fingerprint of the base too.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from echolab.atomic_io import write_atomic
from echolab.errors import WeightsError
from echolab.models.loading import check_precision
from echolab.models.state_dict import AUDIO_PARTS, to_diffusers
from echolab.training.adapters.lora import TRAINED, Lora, adapted_layers, base_fingerprint

PEFT_PREFIX, SINGLE_PREFIX = "base_model.model.", "diffusion_model."


def save_adapters(
    folder: Path,
    lora: Lora,
    tensors: Mapping[str, Tensor],
    layers: list[str],
    base: str,
    dtype: torch.dtype = torch.float32,
) -> list[Path]:
    """Write adapters, named as the parameters of an adapted network, as peft's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    # The settings as peft itself writes them.
    config = lora.peft_config(layers)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    named = {
        PEFT_PREFIX + name.replace(f".{TRAINED}.", "."): tensor.to(dtype).contiguous()
        for name, tensor in tensors.items()
    }
    write_atomic(folder / TENSORS, save(named, {"format": "pt", BASE: base}))
    return sorted(folder.iterdir())


def save_single_file(
    file: Path,
    lora: Lora,
    tensors: Mapping[str, Tensor],
    base: str,
    dtype: torch.dtype = torch.float32,
) -> list[Path]:
    """Write adapters as one file for diffusers and ComfyUI, and one of the audio layers if any.

    Return the files.  diffusers takes `.alpha` of layers within blocks only, so that the scale of
    the others is multiplied into their tensors.
    """
    # Two files: readers of Wan refuse layers that they do not know.
    audio_file = audio_file_of(file)
    layers: dict[Path, dict[str, Tensor]] = {file: {}, audio_file: {}}
    for name, tensor in tensors.items():
        layer, _, part = name.partition(".lora_")
        content = layers[audio_file if is_audio(layer) else file]
        # Outside of blocks diffusers ignores alpha, so the scale goes into the tensor.
        if layer.startswith("blocks."):
            content[f"{SINGLE_PREFIX}{layer}.alpha"] = torch.tensor(float(lora.alpha))
        elif part.startswith("B"):
            tensor = tensor * (lora.alpha / lora.rank)
        short = part.replace(f".{TRAINED}.", ".")
        content[f"{SINGLE_PREFIX}{layer}.lora_{short}"] = tensor.to(dtype).contiguous()
    # The fingerprint lets a reader refuse another base.
    metadata = {"format": "pt", BASE: base}
    if layers[file] and layers[audio_file]:  # the audio layers first: what names them comes last
        write_atomic(audio_file, save(layers[audio_file], metadata))
        write_atomic(file, save(layers[file], metadata | {AUDIO_FILE: audio_file.name}))
        return [file, audio_file]
    write_atomic(file, save(layers[file] or layers[audio_file], metadata))
    return [file]


def audio_file_of(file: Path) -> Path:
    """Return the name of the file of audio layers that belongs to a single file."""
    return file.with_suffix(f".audio{file.suffix}")


def is_audio(layer: str) -> bool:
    """Return whether a layer is of the audio branch, which Wan's own network lacks."""
    return any(part in f"{layer}." for part in AUDIO_PARTS)


def load_trained(net: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Set the adapters of a network, all of them, by parameter name; raises WeightsError."""
    # Both ways: nothing may be missing, and nothing superfluous.
    own = {name: value for name, value in net.named_parameters() if value.requires_grad}
    for name in [*own, *tensors]:
        here = tuple(own[name].shape) if name in own else "missing"
        there = tuple(tensors[name].shape) if name in tensors else "missing"
        if here != there:
            raise WeightsError(
                f"{origin}: other adapters: {name} is {there} there, {here} here; "
                "give adapters of the same rank and layers"
            )
    # Copy only once every shape has been compared, so that an error changes nothing.
    for name, value in own.items():
        value.data.copy_(tensors[name])


def trained_tensors(net: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Return the trained adapters by parameter name, and the names of their layers."""
    tensors = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    return tensors, [name for name, _ in adapted_layers(net)]


# -- reading ----------------------------------------------------------------------------------

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
DIFFUSERS_METADATA = "lora_adapter_metadata"
BASE = "echolab_base"  # metadata: fingerprint of the base network
AUDIO_FILE = "echolab_audio_layers"  # metadata: name of the second file, of the audio layers

PREFIXES = (
    "base_model.model.", "diffusion_model.", "transformer.", "model.", "module.",
    "lora_unet_", "lora_transformer_", "lycoris_",
)  # fmt: skip
# STEM.PART[.ADAPTER].weight, with the spellings of both halves
PART = re.compile(
    r"(?P<stem>.+?)[._](?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up"
    r"|lora_linear_layer\.down|lora_linear_layer\.up)(?:\.(?!weight|bias)\w+)?"
    r"(?:\.(?P<kind>weight|bias))?"
)
OTHER = re.compile(r"(?P<stem>.+)\.(?P<part>alpha|diff|diff_b)")
DOWN = ("lora_A", "lora_down", "lora.down", "lora_linear_layer.down")
REMEDY = "give plain LoRA of a Wan or EchoMimicV3 transformer"


class LowRank(NamedTuple):
    """The change of a linear layer's weight, scale * up @ down."""

    down: Tensor  # [rank, inputs]
    up: Tensor  # [outputs, rank]
    scale: float  # alpha / rank

    @property
    def rank(self) -> int:
        """Inner size of the product."""
        return self.down.shape[0]


class Adapters(NamedTuple):
    """The content of a LoRA file, by names of the network that it was read for."""

    source: Path
    layers: dict[str, LowRank]  # by linear layer
    changes: dict[str, Tensor]  # by parameter: added to it as they are (biases, norms)


class _Content(NamedTuple):
    file: Path
    tensors: dict[str, Tensor]
    config: Mapping[str, Any]  # r, lora_alpha, rank_pattern, alpha_pattern, use_rslora; or empty
    base: str | None  # fingerprint; None if another program wrote the file


def read_adapters(path: Path, net: nn.Module) -> Adapters:
    """Read the LoRA of a folder or file for `net`; ranks and alphas may differ by layer.

    Tensors may be fp16, bf16 or fp32.  Raise WeightsError, in one line, for a file that is missing
    or damaged, of another method (DoRA, LoKr, ...), of another network, or of another base where
    the file names its base.
    """
    # Names first, then shapes, then the base.
    parameters = _parameters_by_stem(net)
    layers: dict[str, LowRank] = {}
    changes: dict[str, Tensor] = {}
    contents = _open(path)
    for content in contents:
        low_rank, more = _parse(content, parameters)
        layers |= low_rank
        changes |= more
    own = dict(net.named_parameters())
    for name, layer in layers.items():
        _check_layer(path, name, layer, net.get_submodule(name))
    for name, change in changes.items():
        if name not in own or own[name].shape != change.shape:
            here_shape = tuple(own[name].shape) if name in own else "missing"
            raise WeightsError(
                f"{path}: the change of {name} is {tuple(change.shape)}, the network's is "
                f"{here_shape}; {REMEDY}"
            )
    # Files of other programs name no base: they are accepted.
    bases = {content.base for content in contents} - {None}
    if bases and bases != {here := base_fingerprint(net)}:
        raise WeightsError(
            f"{path}: adapters of another base: {', '.join(map(str, bases))} there, {here} here; "
            "give the weights that they were trained on"
        )
    return Adapters(path, layers, changes)


@torch.no_grad()
def merge_adapters(net: nn.Module, adapters: Adapters) -> None:
    """Add adapters to the weights of `net`, computed in fp32, kept in each weight's dtype."""
    deltas = {
        f"{name}.weight": layer.scale * layer.up.float() @ layer.down.float()
        for name, layer in adapters.layers.items()
    }
    parameters = dict(net.named_parameters())
    for name in {**deltas, **adapters.changes}:
        parameter = parameters[name]
        # In fp32, rounded once at the end.
        value = parameter.float()
        for part in (deltas.get(name), adapters.changes.get(name)):
            if part is not None:
                value = value + part.float().to(value.device)
        parameter.data = value.to(parameter.dtype)  # not in place: it may be a mapped file


# -- files ------------------------------------------------------------------------------------


def _open(path: Path) -> list[_Content]:
    """Return the content of the file or folder, and of the file of audio layers if it names one."""
    # A folder is peft's if it has a settings file, else diffusers'.
    file, config = path, None
    if path.is_dir():
        config = _config_of(path / CONFIG) if (path / CONFIG).is_file() else None
        file = path / (TENSORS if config is not None else DIFFUSERS_FILE)
        if not file.is_file():
            raise WeightsError(
                f"{path}: no adapters that can be read; give a folder with {CONFIG} and {TENSORS}, "
                f"one with {DIFFUSERS_FILE}, or a .safetensors file"
            )
    # A second file holds the audio layers; the first names it.
    content, audio = _read(file, config)
    if audio is None:
        return [content]
    # A path there could make us read any file of the machine.
    if Path(audio).name != audio:
        raise WeightsError(f"{file}: names {audio!r} for its audio layers: no plain file name")
    return [content, _read(file.with_name(audio), None)[0]]


def _config_of(file: Path) -> dict[str, Any]:
    """Return peft's settings; raise WeightsError for what is no plain LoRA."""
    try:
        config = json.loads(file.read_text())
        if not isinstance(config, dict):
            raise ValueError("not an object")
        float(config["lora_alpha"]), int(config["r"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(f"{file}: no adapters that can be read ({error!r}); {REMEDY}") from error
    if config.get("peft_type", "LORA") != "LORA" or int(config["r"]) < 1:
        kind = config.get("peft_type", "LORA")
        raise WeightsError(f"{file}: adapters of {kind} with r={config['r']}: no plain LoRA")
    # Methods that change more than the low-rank product would be read incompletely.
    if config.get("bias", "none") != "none":
        raise WeightsError(f"{file}: bias={config['bias']}: not read here; need none")
    for key in ("use_dora", "modules_to_save", "fan_in_fan_out"):
        if config.get(key):
            raise WeightsError(f"{file}: {key}={config[key]}: not read here; give plain LoRA")
    return config


def _read(file: Path, config: dict[str, Any] | None) -> tuple[_Content, str | None]:
    """Return the content of one file, and the name of its file of audio layers."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
        # peft has a settings file, diffusers puts them into the metadata.
        if config is None:
            config = _diffusers_config(metadata)
    except (
        OSError, ValueError, TypeError, AttributeError, RecursionError, SafetensorError,
    ) as error:  # fmt: skip
        raise WeightsError(f"{file}: no adapters that can be read ({error}); {REMEDY}") from error
    # Damage shows in the values too: an empty file, other dtypes, NaN.
    if not tensors:
        raise WeightsError(f"{file}: 0 tensors; {REMEDY}")
    check_precision(file, tensors)
    for key, tensor in tensors.items():
        numbers = tensor.is_floating_point() or key.endswith(".alpha")
        if not numbers or not bool(tensor.isfinite().all()):
            raise WeightsError(f"{file}: {key}: values that are not finite numbers; get it again")
    return _Content(file, tensors, config, metadata.get(BASE)), metadata.get(AUDIO_FILE)


def _diffusers_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the transformer's LoraConfig that diffusers puts into a file, if it did."""
    content = json.loads(metadata.get(DIFFUSERS_METADATA, "{}"))
    return {
        key.removeprefix("transformer."): value
        for key, value in content.items()
        if key.startswith("transformer.")
    }


# -- names ------------------------------------------------------------------------------------


def _parameters_by_stem(net: nn.Module) -> dict[str, str]:
    """Return parameters by what files call them without prefix, dots as underscores."""
    table: dict[str, str] = {}
    for name, _ in net.named_parameters():
        if not name.endswith(".bias"):
            for spelled in (to_diffusers(name), name):  # Wan's own names win
                table[spelled.removesuffix(".weight").replace(".", "_")] = name
    return table


def _without_prefix(stem: str) -> str:
    # Programs nest their prefixes, such as base_model.model.transformer.
    shorter = stem
    while (prefix := next((p for p in PREFIXES if shorter.startswith(p)), None)) is not None:
        shorter = shorter[len(prefix) :]
    return shorter


def _parse(
    content: _Content, parameters: Mapping[str, str]
) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """Return the low-rank pairs by layer, and other changes by parameter."""
    file = content.file
    # Both halves and the scale of a layer together.
    stems: dict[str, dict[str, Tensor]] = {}
    for key, tensor in content.tensors.items():
        stem, part = _split(file, key)
        stems.setdefault(stem, {})[part] = tensor
    layers: dict[str, LowRank] = {}
    changes: dict[str, Tensor] = {}
    for stem, parts in stems.items():
        short = _without_prefix(stem)
        # A layer that the network lacks means another model.
        weight = parameters.get(short.replace(".", "_"))
        if weight is None:
            raise WeightsError(
                f"{file}: adapters of another model: {stem} is no layer of this network "
                f"({len(parameters)} parameters); give the model= that they were trained on"
            )
        name = weight.removesuffix(".weight")
        scale = 1.0
        if "down" in parts or "up" in parts:
            scale = _scale(file, short, parts, content.config)
            layers[name] = LowRank(parts["down"], parts["up"], scale)
        if "diff" in parts:
            changes[weight] = parts["diff"]
        for part, factor in (("diff_b", 1.0), ("up_bias", scale)):
            if part in parts:
                changes[f"{name}.bias"] = factor * parts[part].float()
    return layers, changes


def _split(file: Path, key: str) -> tuple[str, str]:
    """Return the stem of a tensor's name, and down, up, up_bias, alpha, diff or diff_b."""
    if match := OTHER.fullmatch(key):
        return match["stem"], match["part"]
    if match := PART.fullmatch(key):
        side = "down" if match["part"] in DOWN else "up"
        if match["kind"] != "bias":
            return match["stem"], side
        if side == "up":
            return match["stem"], "up_bias"
    raise WeightsError(f"{file}: {key}: no part of plain LoRA; {REMEDY}")


def _scale(file: Path, stem: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> float:
    """Return alpha / rank of a layer, by the file's alpha, else by its settings, else 1."""
    for side in ("down", "up"):
        if side not in parts:
            raise WeightsError(f"{file}: {stem}: its {side} half is missing there; get it again")
    # In order of precedence: the file, its settings, 1.
    rank = parts["down"].shape[0]
    if "alpha" in parts:
        return float(parts["alpha"]) / rank
    if "r" not in config:
        return 1.0
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    wanted = ranks.get(get_pattern_key(list(ranks), stem), config["r"])
    if rank != wanted:
        raise WeightsError(
            f"{file}: {stem} has rank {rank}, its settings say {wanted}; give the settings "
            "that were written with it"
        )
    alpha = alphas.get(get_pattern_key(list(alphas), stem), config.get("lora_alpha", wanted))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_layer(path: Path, name: str, layer: LowRank, module: nn.Module) -> None:
    if not isinstance(module, nn.Linear):
        raise WeightsError(f"{path}: {name} is no linear layer of this network; {REMEDY}")
    down, up, rank = tuple(layer.down.shape), tuple(layer.up.shape), layer.rank
    if down != (rank, module.in_features) or up != (module.out_features, rank):
        raise WeightsError(
            f"{path}: {name}: {up} x {down}, the layer is {module.out_features} x "
            f"{module.in_features}; give adapters of a model of this width"
        )
