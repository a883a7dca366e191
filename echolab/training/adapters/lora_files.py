"""Read and write adapters: a folder in peft's format, or one file for diffusers and ComfyUI.

    FOLDER/  adapter_config.json         rank, alpha, target layers
             adapter_model.safetensors   base_model.model.LAYER.lora_A.weight and lora_B.weight
    FOLDER.safetensors                   diffusion_model.LAYER.lora_A.weight, lora_B.weight, alpha
    FOLDER.audio.safetensors             as above for the audio layers, if they are adapted

The single file contains only layers of the Wan network, since diffusers refuses a file with an
unknown layer.  The audio layers have a separate file, whose name is in the metadata of the first
file.  The metadata of each file also contain the fingerprint of the base.
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
    """Write adapters as a folder in peft's format; `tensors` has names of an adapted network."""
    folder.mkdir(parents=True, exist_ok=True)
    # Let peft write its own settings file.
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
    """Write adapters as one file for diffusers and ComfyUI, and one for the audio layers if any.

    Return the files.  diffusers reads `.alpha` only for layers in blocks, so the scale of other
    layers is multiplied into their tensors.
    """
    # Audio layers need a separate file: readers of Wan files refuse unknown layers.
    audio_file = audio_file_of(file)
    layers: dict[Path, dict[str, Tensor]] = {file: {}, audio_file: {}}
    for name, tensor in tensors.items():
        layer, _, part = name.partition(".lora_")
        content = layers[audio_file if is_audio(layer) else file]
        # diffusers ignores alpha outside of blocks: multiply the scale into the tensor.
        if layer.startswith("blocks."):
            content[f"{SINGLE_PREFIX}{layer}.alpha"] = torch.tensor(float(lora.alpha))
        elif part.startswith("B"):
            tensor = tensor * (lora.alpha / lora.rank)
        short = part.replace(f".{TRAINED}.", ".")
        content[f"{SINGLE_PREFIX}{layer}.lora_{short}"] = tensor.to(dtype).contiguous()
    # The fingerprint allows a reader to refuse another base.
    metadata = {"format": "pt", BASE: base}
    if layers[file] and layers[audio_file]:
        # Write the audio file first, so that a file that refers to it implies that it exists.
        write_atomic(audio_file, save(layers[audio_file], metadata))
        write_atomic(file, save(layers[file], metadata | {AUDIO_FILE: audio_file.name}))
        return [file, audio_file]
    write_atomic(file, save(layers[file] or layers[audio_file], metadata))
    return [file]


def audio_file_of(file: Path) -> Path:
    """Return the path of the audio layers that belong to a single file."""
    return file.with_suffix(f".audio{file.suffix}")


def is_audio(layer: str) -> bool:
    """Return whether a layer belongs to the audio branch, which the Wan network lacks."""
    return any(part in f"{layer}." for part in AUDIO_PARTS)


def load_trained(net: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Set all adapters of a network by parameter name; raise WeightsError if names differ."""
    # Compare in both directions: no adapter may be missing or unknown.
    trained = {name: value for name, value in net.named_parameters() if value.requires_grad}
    for name in [*trained, *tensors]:
        expected = tuple(trained[name].shape) if name in trained else "missing"
        given = tuple(tensors[name].shape) if name in tensors else "missing"
        if expected != given:
            raise WeightsError(
                f"{origin}: other adapters: {name} is {given} there, {expected} here; "
                "give adapters of the same rank and layers"
            )
    # Copy only after all shapes were compared, so that an error leaves the network unchanged.
    for name, value in trained.items():
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
# STEM.PART[.ADAPTER].weight, where PART is one of the known names of the A and B matrices
PART = re.compile(
    r"(?P<stem>.+?)[._](?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up"
    r"|lora_linear_layer\.down|lora_linear_layer\.up)(?:\.(?!weight|bias)\w+)?"
    r"(?:\.(?P<kind>weight|bias))?"
)
OTHER = re.compile(r"(?P<stem>.+)\.(?P<part>alpha|diff|diff_b)")
DOWN = ("lora_A", "lora_down", "lora.down", "lora_linear_layer.down")
REMEDY = "give plain LoRA of a Wan or EchoMimicV3 transformer"


class LowRank(NamedTuple):
    """Update of a linear layer's weight: scale * up @ down."""

    down: Tensor  # [rank, inputs]
    up: Tensor  # [outputs, rank]
    scale: float  # alpha / rank

    @property
    def rank(self) -> int:
        """Rank of the update: the inner dimension of the product."""
        return self.down.shape[0]


class Adapters(NamedTuple):
    """Content of a LoRA file, with names of the network for which the file was read."""

    source: Path
    layers: dict[str, LowRank]  # by name of the linear layer
    changes: dict[str, Tensor]  # by parameter name: added without scaling (biases, norms)


class _LoraFile(NamedTuple):
    file: Path
    tensors: dict[str, Tensor]
    config: Mapping[str, Any]  # r, lora_alpha, rank_pattern, alpha_pattern, use_rslora; may be {}
    base: str | None  # fingerprint of the base; None if another program wrote the file


def read_adapters(path: Path, net: nn.Module) -> Adapters:
    """Read the LoRA in a folder or file for `net`; rank and alpha may differ between layers.

    Tensors may be fp16, bf16 or fp32.  Raise WeightsError for a file that is missing or damaged,
    uses another method (DoRA, LoKr, ...), or was trained for another network or on another base
    (checked if the file contains the fingerprint of its base).
    """
    # Check names first, then shapes, then the base.
    parameters = _parameters_by_stem(net)
    layers: dict[str, LowRank] = {}
    changes: dict[str, Tensor] = {}
    contents = _read_files(path)
    for content in contents:
        low_rank, other_changes = _parse_tensors(content, parameters)
        layers |= low_rank
        changes |= other_changes
    own_parameters = dict(net.named_parameters())
    for name, layer in layers.items():
        _check_layer(path, name, layer, net.get_submodule(name))
    for name, change in changes.items():
        if name not in own_parameters or own_parameters[name].shape != change.shape:
            here_shape = tuple(own_parameters[name].shape) if name in own_parameters else "missing"
            raise WeightsError(
                f"{path}: the change of {name} is {tuple(change.shape)}, the network's is "
                f"{here_shape}; {REMEDY}"
            )
    # Files by other programs contain no fingerprint: accept them.
    bases = {content.base for content in contents} - {None}
    if bases and bases != {fingerprint := base_fingerprint(net)}:
        raise WeightsError(
            f"{path}: adapters of another base: {', '.join(map(str, bases))} there, "
            f"{fingerprint} here; give the weights that they were trained on"
        )
    return Adapters(path, layers, changes)


@torch.no_grad()
def merge_adapters(net: nn.Module, adapters: Adapters) -> None:
    """Add adapters to the weights of `net`; compute in fp32 and keep the dtype of each weight."""
    deltas = {
        f"{name}.weight": layer.scale * layer.up.float() @ layer.down.float()
        for name, layer in adapters.layers.items()
    }
    parameters = dict(net.named_parameters())
    for name in {**deltas, **adapters.changes}:
        parameter = parameters[name]
        # Sum in fp32 and round once at the end.
        value = parameter.float()
        for part in (deltas.get(name), adapters.changes.get(name)):
            if part is not None:
                value = value + part.float().to(value.device)
        parameter.data = value.to(parameter.dtype)  # not in place: it may be a memory-mapped file


# -- files ------------------------------------------------------------------------------------


def _read_files(path: Path) -> list[_LoraFile]:
    """Read a file or folder, and the file of audio layers if its metadata name one."""
    # A folder with a settings file is in peft's format, otherwise in diffusers' format.
    file, config = path, None
    if path.is_dir():
        config = _read_peft_config(path / CONFIG) if (path / CONFIG).is_file() else None
        file = path / (TENSORS if config is not None else DIFFUSERS_FILE)
        if not file.is_file():
            raise WeightsError(
                f"{path}: no adapters that can be read; give a folder with {CONFIG} and {TENSORS}, "
                f"one with {DIFFUSERS_FILE}, or a .safetensors file"
            )
    # A second file, named in the metadata of the first, contains the audio layers.
    content, audio = _read_file(file, config)
    if audio is None:
        return [content]
    # Accept only a plain file name: a path could refer to any file of this machine.
    if Path(audio).name != audio:
        raise WeightsError(f"{file}: names {audio!r} for its audio layers: no plain file name")
    return [content, _read_file(file.with_name(audio), None)[0]]


def _read_peft_config(file: Path) -> dict[str, Any]:
    """Read peft's settings file; raise WeightsError if it is not plain LoRA."""
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
    # Refuse methods that change more than the low-rank product, since only that is read.
    if config.get("bias", "none") != "none":
        raise WeightsError(f"{file}: bias={config['bias']}: not read here; need none")
    for key in ("use_dora", "modules_to_save", "fan_in_fan_out"):
        if config.get(key):
            raise WeightsError(f"{file}: {key}={config[key]}: not read here; give plain LoRA")
    return config


def _read_file(file: Path, config: dict[str, Any] | None) -> tuple[_LoraFile, str | None]:
    """Read one file; return its content and the name of its file of audio layers, if any."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
        # peft has a settings file, diffusers stores the settings in the metadata.
        if config is None:
            config = _diffusers_config(metadata)
    except (
        OSError, ValueError, TypeError, AttributeError, RecursionError, SafetensorError,
    ) as error:  # fmt: skip
        raise WeightsError(f"{file}: no adapters that can be read ({error}); {REMEDY}") from error
    # Refuse damaged content: an empty file, unsupported dtypes, NaN.
    if not tensors:
        raise WeightsError(f"{file}: 0 tensors; {REMEDY}")
    check_precision(file, tensors)
    for key, tensor in tensors.items():
        numeric = tensor.is_floating_point() or key.endswith(".alpha")
        if not numeric or not bool(tensor.isfinite().all()):
            raise WeightsError(f"{file}: {key}: values that are not finite numbers; get it again")
    return _LoraFile(file, tensors, config, metadata.get(BASE)), metadata.get(AUDIO_FILE)


def _diffusers_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the transformer's LoraConfig from diffusers' metadata, or {} if it is missing."""
    content = json.loads(metadata.get(DIFFUSERS_METADATA, "{}"))
    return {
        key.removeprefix("transformer."): value
        for key, value in content.items()
        if key.startswith("transformer.")
    }


# -- names ------------------------------------------------------------------------------------


def _parameters_by_stem(net: nn.Module) -> dict[str, str]:
    """Map names in LoRA files, without prefix and with underscores for dots, to parameter names."""
    table: dict[str, str] = {}
    for name, _ in net.named_parameters():
        if not name.endswith(".bias"):
            for spelled in (to_diffusers(name), name):  # Wan's names take precedence
                table[spelled.removesuffix(".weight").replace(".", "_")] = name
    return table


def _strip_prefixes(stem: str) -> str:
    # Prefixes may be nested, such as base_model.model.transformer.
    shorter = stem
    while (prefix := next((p for p in PREFIXES if shorter.startswith(p)), None)) is not None:
        shorter = shorter[len(prefix) :]
    return shorter


def _parse_tensors(
    content: _LoraFile, parameters: Mapping[str, str]
) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """Return the low-rank updates by layer, and other changes by parameter."""
    file = content.file
    # Collect both matrices and alpha of each layer.
    stems: dict[str, dict[str, Tensor]] = {}
    for key, tensor in content.tensors.items():
        stem, part = _split_name(file, key)
        stems.setdefault(stem, {})[part] = tensor
    layers: dict[str, LowRank] = {}
    changes: dict[str, Tensor] = {}
    for stem, parts in stems.items():
        plain_stem = _strip_prefixes(stem)
        # An unknown layer means that the file was trained for another model.
        weight = parameters.get(plain_stem.replace(".", "_"))
        if weight is None:
            raise WeightsError(
                f"{file}: adapters of another model: {stem} is no layer of this network "
                f"({len(parameters)} parameters); give the model= that they were trained on"
            )
        name = weight.removesuffix(".weight")
        scale = 1.0
        if "down" in parts or "up" in parts:
            scale = _layer_scale(file, plain_stem, parts, content.config)
            layers[name] = LowRank(parts["down"], parts["up"], scale)
        if "diff" in parts:
            changes[weight] = parts["diff"]
        for part, factor in (("diff_b", 1.0), ("up_bias", scale)):
            if part in parts:
                changes[f"{name}.bias"] = factor * parts[part].float()
    return layers, changes


def _split_name(file: Path, key: str) -> tuple[str, str]:
    """Split a tensor's name into its stem and down, up, up_bias, alpha, diff or diff_b."""
    if match := OTHER.fullmatch(key):
        return match["stem"], match["part"]
    if match := PART.fullmatch(key):
        side = "down" if match["part"] in DOWN else "up"
        if match["kind"] != "bias":
            return match["stem"], side
        if side == "up":
            return match["stem"], "up_bias"
    raise WeightsError(f"{file}: {key}: no part of plain LoRA; {REMEDY}")


def _layer_scale(
    file: Path, stem: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]
) -> float:
    """Return alpha / rank of a layer: from its alpha tensor, else from the settings, else 1."""
    for side in ("down", "up"):
        if side not in parts:
            raise WeightsError(f"{file}: {stem}: its {side} half is missing there; get it again")
    # In order of precedence: alpha tensor, settings, 1.
    rank = parts["down"].shape[0]
    if "alpha" in parts:
        return float(parts["alpha"]) / rank
    if "r" not in config:
        return 1.0
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    expected_rank = ranks.get(get_pattern_key(list(ranks), stem), config["r"])
    if rank != expected_rank:
        raise WeightsError(
            f"{file}: {stem} has rank {rank}, its settings say {expected_rank}; give the settings "
            "that were written with it"
        )
    alpha = alphas.get(get_pattern_key(list(alphas), stem), config.get("lora_alpha", expected_rank))
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
