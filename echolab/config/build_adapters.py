"""Build networks with LoRA adapters on their base, and reference models on the same base.

A checkpoint of adapters records the source and the fingerprint of its base, so that every command
that takes a checkpoint takes one of adapters too.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from echolab.errors import CheckpointError, ConfigError, WeightsError
from echolab.models.frozen import Frozen
from echolab.models.state_dict import meta_network
from echolab.models.transformer import EchoTransformer
from echolab.training.adapters.lora import (
    TRAINED,
    AdaptersOff,
    AverageAdapters,
    Lora,
    add_adapters,
    base_fingerprint,
)
from echolab.training.adapters.lora_base import Load, Origin, base_of, on_its_base
from echolab.training.adapters.lora_files import (
    Adapters,
    audio_file_of,
    load_trained,
    read_adapters,
    save_adapters,
    save_single_file,
    trained_tensors,
)
from echolab.training.checkpoints.checkpoint import EMA, Checkpoint, check_adapters, open_checkpoint
from echolab.training.engine.placement import HOST, Placement
from echolab.training.module import Reference


class Adapted(NamedTuple):
    """A network to train, and the record of its adapters in checkpoints."""

    net: EchoTransformer
    lora: Lora
    record: dict[str, Any]


def lora_from(config: Mapping[str, Any]) -> Lora:
    """Return which layers are adapted, and how, from conf/lora."""
    return Lora(
        targets=tuple(config["target_modules"]),
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config["dropout"],
    )


def adapted(
    config: Mapping[str, Any], initial: Path | None, load: Load, placement: Placement = HOST
) -> Adapted:
    """Return a network with the adapters of conf/lora.

    Its base comes from `pretrained` or from the checkpoint `initial`, which may have adapters.
    """
    lora = lora_from(config["lora"])
    first = open_checkpoint(initial) if initial else None
    weights = str(Path(config["pretrained"]).resolve()) if config["pretrained"] else None
    origin = Origin(weights, str(initial.resolve()) if initial else None, int(config["seed"]))
    adapters = first.state.get("adapters") if first else None
    if adapters:
        origin = Origin(**adapters["origin"])
    net = base_of(config["model"], origin, load, placement)
    start = config["lora"]["init_from"]
    given = read_adapters(Path(start), net) if start else None
    add_adapters(net, lora, int(config["seed"]))
    base = base_fingerprint(net)
    record = {**lora._asdict(), "base": base, "origin": origin._asdict()}
    if first and adapters:
        check_adapters(first, record)
        load_trained(net, first.tensors(EMA), str(first.path))
    if given:
        load_trained(net, _start(given, lora), str(given.source))
    return Adapted(net, lora, record)


def _start(given: Adapters, lora: Lora) -> dict[str, Tensor]:
    """Return the adapters of a file by parameter name; WeightsError if they are not as `lora`."""
    if given.changes:
        raise WeightsError(
            f"{given.source}: also changes {next(iter(given.changes))}, which is no adapter; "
            "merge it into the weights that the run starts from"
        )
    tensors: dict[str, Tensor] = {}
    for name, layer in given.layers.items():
        alpha = layer.scale * layer.rank
        for key, setting, there, here in (
            ("rank", "r", layer.rank, lora.rank),
            ("alpha", "lora_alpha", alpha, lora.alpha),
        ):
            if not math.isclose(there, here, rel_tol=1e-6):
                raise WeightsError(
                    f"{given.source}: {key} of {name} is {there:g}, here {here:g}; "
                    f"set lora.{setting}={there:g}, and give adapters of one {key} in all layers"
                )
        tensors[f"{name}.lora_A.{TRAINED}.weight"] = layer.down
        tensors[f"{name}.lora_B.{TRAINED}.weight"] = layer.up
    return tensors


def export_adapters(
    checkpoint: Checkpoint, out: Path, load: Load, dtype: torch.dtype
) -> list[Path]:
    """Write the averaged adapters of a checkpoint and return the files.

    A folder `out` is peft's, and next to it comes `out`.safetensors for diffusers and ComfyUI; an
    `out` that ends in .safetensors is the latter alone.
    """
    if not checkpoint.state.get("adapters"):
        raise CheckpointError(f"{checkpoint.path}: has no adapters; give a run with lora=attention")
    alone = out.suffix == ".safetensors"
    single = out if alone else out.with_name(f"{out.name}.safetensors")
    for path in (single, audio_file_of(single)):
        if path.exists():
            raise ConfigError(f"{path}: already there; give another out=, or remove it")
    net, lora, record = on_its_base(checkpoint, load)
    tensors, layers = trained_tensors(net)
    base = record["base"]
    out.parent.mkdir(parents=True, exist_ok=True)
    files = [] if alone else save_adapters(out, lora, tensors, layers, base, dtype)
    return files + save_single_file(single, lora, tensors, base, dtype)


def reference_of(config: Mapping[str, Any], own: Adapted | None, pinned: Path | None) -> Reference:
    """Return the reference model of preference epochs, without a second copy of the base.

    For adapters: the base itself (`ref_model=base`), an earlier average or a checkpoint of adapters
    on the same base; otherwise a network of its own.
    """
    state = open_checkpoint(pinned).state if pinned else {}
    if own is None and (config["ref_model"] == "base" or state.get("adapters")):
        raise ConfigError(
            f"ref_model={config['ref_model']}: means adapters, and this run trains all weights; "
            "give lora=attention as there, or a run without adapters"
        )
    if own and config["ref_model"] == "base":
        return AdaptersOff(own.net)
    if own and (pinned is None or state.get("adapters")):
        if pinned:
            check_adapters(open_checkpoint(pinned), own.record)
        return AverageAdapters(own.net, own.lora)
    return Frozen(meta_network(config["model"]))  # filled when its first epoch begins
