"""Adapters as a folder in peft's format, which peft and diffusers read too.

    FOLDER/  adapter_config.json         rank, alpha, which layers
             adapter_model.safetensors   base_model.model.LAYER.lora_A.weight and lora_B.weight

The tensors' file tells the fingerprint of the base, where it was written here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from echolab.errors import WeightsError
from echolab.models.released import check_precision
from echolab.training.adapters.lora import (
    TRAINED,
    Lora,
    adapted_layers,
    add_adapters,
    base_fingerprint,
)

PREFIX = "base_model.model."
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BASE = "echolab_base"


class Adapters(NamedTuple):
    """A folder's content."""

    lora: Lora  # targets are the layers' names
    tensors: dict[str, Tensor]  # by parameter name in an adapted network
    base: str | None  # fingerprint; None where another program wrote it


def save_adapters(
    folder: Path, lora: Lora, tensors: Mapping[str, Tensor], layers: list[str], base: str
) -> None:
    """Write adapters, named as the parameters of an adapted network are."""
    folder.mkdir(parents=True, exist_ok=True)
    config = lora.peft_config(layers)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    named = {
        PREFIX + name.replace(f".{TRAINED}.", "."): tensor.contiguous()
        for name, tensor in tensors.items()
    }
    save_file(named, folder / TENSORS, metadata={"format": "pt", BASE: base})


def read_adapters(folder: Path) -> Adapters:
    """Read a folder; raises WeightsError for one that is not of plain LoRA."""
    remedy = f"give a folder with {CONFIG} and {TENSORS}"
    try:
        config = json.loads((folder / CONFIG).read_text())
        with safe_open(folder / TENSORS, framework="pt") as file:
            told = (file.metadata() or {}).get(BASE)
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        dropout = float(config.get("lora_dropout", 0.0))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise WeightsError(f"{folder}: no adapters that can be read ({error}); {remedy}") from error
    if rank < 1 or not tensors or config.get("peft_type", "LORA") != "LORA":
        kind = config.get("peft_type", "LORA")
        raise WeightsError(
            f"{folder}: {len(tensors)} tensors of {kind} with r={rank}: no plain LoRA; {remedy}"
        )
    check_precision(folder / TENSORS, tensors)
    if config.get("bias", "none") != "none":
        raise WeightsError(f"{folder / CONFIG}: bias={config['bias']}: not read here; need none")
    unread = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
    for key in (*unread, "fan_in_fan_out"):
        if config.get(key):
            raise WeightsError(
                f"{folder / CONFIG}: {key}={config[key]}: not read here; "
                "give plain LoRA of one rank"
            )
    named = {_parameter(key): tensor for key, tensor in tensors.items()}
    layers = {name.split(".lora_")[0]: None for name in named if ".lora_" in name}
    return Adapters(Lora(tuple(layers), rank, alpha, dropout), named, told)


def _parameter(key: str) -> str:
    """`base_model.model.L.lora_A.weight` -> `L.lora_A.default.weight`."""
    return key.removeprefix(PREFIX).replace(".weight", f".{TRAINED}.weight")


def load_adapters(net: nn.Module, folder: Path) -> Lora:
    """Adapt a base by a folder's adapters, in place; raises WeightsError where they do not fit."""
    adapters, file = read_adapters(folder), folder / TENSORS
    linear = {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    for name, tensor in adapters.tensors.items():
        layer = linear.get(name.split(".lora_")[0])
        if layer is None:
            raise WeightsError(
                f"{file}: adapters of another model: {name} belongs to no linear layer of this one "
                f"({len(linear)} layers); give the model= that they were trained on"
            )
        rank = adapters.lora.rank
        down = ".lora_A." in name
        wanted = (rank, layer.in_features) if down else (layer.out_features, rank)
        if tuple(tensor.shape) != wanted:
            raise WeightsError(
                f"{file}: {name} is {tuple(tensor.shape)}, must be {wanted} for rank {rank}; "
                f"give adapters whose {CONFIG} tells their rank, for a model of this width"
            )
    here = base_fingerprint(net)
    if adapters.base not in (None, here):
        raise WeightsError(
            f"{file}: adapters of another base: {adapters.base} there, {here} here; "
            "give the weights that they were trained on"
        )
    add_adapters(net, adapters.lora, seed=0)
    load_trained(net, adapters.tensors, str(file))
    return adapters.lora


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
