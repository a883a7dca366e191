"""Write adapters: a folder as peft reads it, and one file for diffusers and ComfyUI.

    FOLDER/  adapter_config.json         rank, alpha, which layers
             adapter_model.safetensors   base_model.model.LAYER.lora_A.weight and lora_B.weight
    FOLDER.safetensors                   diffusion_model.LAYER.lora_A.weight, lora_B.weight, alpha
    FOLDER.audio.safetensors             the same of the audio layers, if these are adapted

The single file has the layers of the Wan network alone, since diffusers refuses a file with a layer
that it does not know; the audio layers have a file of their own, which the first one's metadata
names.  Metadata hold the fingerprint of the base too.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from echolab.atomic_io import write_whole
from echolab.errors import WeightsError
from echolab.models.weights import AUDIO_PARTS
from echolab.training.adapters.lora import TRAINED, Lora, adapted_layers
from echolab.training.adapters.lora_reader import AUDIO_FILE, BASE, TENSORS

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
    config = lora.peft_config(layers)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    named = {
        PEFT_PREFIX + name.replace(f".{TRAINED}.", "."): tensor.to(dtype).contiguous()
        for name, tensor in tensors.items()
    }
    write_whole(folder / TENSORS, save(named, {"format": "pt", BASE: base}))
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
    audio_file = audio_file_of(file)
    layers: dict[Path, dict[str, Tensor]] = {file: {}, audio_file: {}}
    for name, tensor in tensors.items():
        layer, _, part = name.partition(".lora_")
        content = layers[audio_file if is_audio(layer) else file]
        if layer.startswith("blocks."):
            content[f"{SINGLE_PREFIX}{layer}.alpha"] = torch.tensor(float(lora.alpha))
        elif part.startswith("B"):
            tensor = tensor * (lora.alpha / lora.rank)
        short = part.replace(f".{TRAINED}.", ".")
        content[f"{SINGLE_PREFIX}{layer}.lora_{short}"] = tensor.to(dtype).contiguous()
    metadata = {"format": "pt", BASE: base}
    if layers[file] and layers[audio_file]:  # the audio layers first: what names them comes last
        write_whole(audio_file, save(layers[audio_file], metadata))
        write_whole(file, save(layers[file], metadata | {AUDIO_FILE: audio_file.name}))
        return [file, audio_file]
    write_whole(file, save(layers[file] or layers[audio_file], metadata))
    return [file]


def audio_file_of(file: Path) -> Path:
    """Return the name of the file of audio layers that belongs to a single file."""
    return file.with_suffix(f".audio{file.suffix}")


def is_audio(layer: str) -> bool:
    """Return whether a layer is of the audio branch, which Wan's own network lacks."""
    return any(part in f"{layer}." for part in AUDIO_PARTS)


def load_trained(net: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Set the adapters of a network, all of them, by parameter name; raises WeightsError."""
    own = {name: value for name, value in net.named_parameters() if value.requires_grad}
    for name in [*own, *tensors]:
        here = tuple(own[name].shape) if name in own else "missing"
        there = tuple(tensors[name].shape) if name in tensors else "missing"
        if here != there:
            raise WeightsError(
                f"{origin}: other adapters: {name} is {there} there, {here} here; "
                "give adapters of the same rank and layers"
            )
    for name, value in own.items():
        value.data.copy_(tensors[name])


def trained_tensors(net: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """The trained adapters of a network by parameter name, and the names of their layers."""
    tensors = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    return tensors, [name for name, _ in adapted_layers(net)]
