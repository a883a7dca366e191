"""Build networks by name, from checkpoints, from released files, and with LoRA adapters.

A checkpoint of adapters records the source and the fingerprint of its base, so that every command
that accepts a checkpoint also accepts a checkpoint of adapters.
"""

import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from echolab.errors import CheckpointError, ConfigError, WeightsError
from echolab.fitting import save_net
from echolab.launch import run_dir
from echolab.metrics.sync_clips import is_sync
from echolab.metrics.sync_training import constructor_arguments, sync_network
from echolab.models import loading
from echolab.models.frozen import Frozen
from echolab.models.state_dict import AUDIO_PARTS, IMAGE_PARTS, assign_parameters, meta_network
from echolab.models.transformer import EchoTransformer
from echolab.training.adapters.lora import (
    TRAINED,
    AdaptersOff,
    AverageAdapters,
    Lora,
    add_adapters,
    base_fingerprint,
)
from echolab.training.adapters.lora_base import Load, Origin, base_of, merged, on_its_base
from echolab.training.adapters.lora_files import (
    Adapters,
    audio_file_of,
    load_trained,
    read_adapters,
    save_adapters,
    save_single_file,
    trained_tensors,
)
from echolab.training.checkpoints.checkpoint import (
    EMA,
    Checkpoint,
    check_adapters,
    latest_valid,
    open_checkpoint,
    open_verified,
)
from echolab.training.engine.estimate import bytes_needed, check_memory, parameters_of
from echolab.training.engine.machine import Machine
from echolab.training.engine.placement import (
    HOST,
    Placement,
    check_device,
    initialized_network,
    place_shared,
    placement_of,
    share_on_node,
)
from echolab.training.guards.host_memory import capacity
from echolab.training.module import Reference


class Adapted(NamedTuple):
    """A network to train, and the record of its adapters in checkpoints."""

    net: EchoTransformer
    lora: Lora
    record: dict[str, Any]


def last_checkpoint(run: Path) -> Path:
    """Return the newest complete checkpoint of a run or of its folder of checkpoints.

    A path of a checkpoint is returned unchanged.  Raise CheckpointError if there is none.
    """
    # A checkpoint itself, or the newest complete one of a run.
    if (run / "manifest.json").is_file():
        return run
    folder = run / "checkpoints"
    checkpoint, rejected = latest_valid(folder if folder.is_dir() else run)
    if checkpoint is None:
        first_fault = f" ({rejected[0]})" if rejected else ""
        raise CheckpointError(f"{run}: no complete checkpoint in it{first_fault}; train first")
    return checkpoint.path


def load_policy(checkpoint: Path) -> EchoTransformer:
    """Return the network of a checkpoint, frozen, with averaged weights and merged adapters."""
    # Adapters are merged into the base that their checkpoint records.
    opened = open_checkpoint(checkpoint)
    if opened.state.get("adapters"):
        return merged(opened, load_start).eval().requires_grad_(False)
    architecture: dict[str, Any] = opened.state["architecture"]
    # Build the network on the meta device, and fill it from memory-mapped files.
    net = meta_network(architecture)
    net.load_state_dict(opened.tensors(EMA), assign=True)
    return net.eval().requires_grad_(False)


def load_released(
    path: Path, architecture: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> EchoTransformer:
    """Return the frozen network of a released or exported file or folder.

    Raise WeightsError if a tensor is missing.
    """
    loaded = loading.load_released(path, architecture, dtype=dtype)
    _print_report(path, loaded.report.lines())
    return loaded.net.eval().requires_grad_(False)


def load_start(
    path: Path, architecture: Mapping[str, Any], seed: int, placement: Placement = HOST
) -> EchoTransformer:
    """Load a network to train, in fp32, from a released file that may lack image or audio parts."""
    net = meta_network(architecture)
    report, values = loading.released_values(
        net, path, fresh=(IMAGE_PARTS, AUDIO_PARTS), seed=seed, device=placement.device
    )
    _print_report(path, report.lines())
    place_shared(net, values, placement, "pretrained")
    return net


def _print_report(path: Path, lines: list[str]) -> None:
    """Print lines about the weights, on rank 0 only."""
    if run_dir.rank_from_environment() == 0:
        for line in lines:
            print(f"{path}: {line}", file=sys.stderr)


def net_from(
    config: Mapping[str, Any], pretrained: str | None, seed: int, placement: Placement = HOST
) -> EchoTransformer:
    """Build the network of conf/model, with released weights or Wan's initialization."""
    if pretrained:
        return load_start(Path(pretrained), config, seed, placement)
    return initialized_network(config, seed, placement)


def checked_placement(config: Mapping[str, Any], machine: Machine, *, prefers: bool) -> Placement:
    """Return the placement of this rank's network, before the network is built.

    Raise ConfigError if the device does not exist, or if the run can never fit into memory.
    """
    check_device(machine)
    placement = placement_of(machine)
    sync = is_sync(config["model"])
    net = sync_network(config["model"], 0) if sync else meta_network(config["model"])
    # Count the trained parameters: with adapters, only a small part of the network.
    adapters = bool(config["lora"]["target_modules"])
    if adapters:
        add_adapters(net, lora_from(config["lora"]), seed=0)
    optim = config["optim"]
    needed = bytes_needed(
        parameters_of(net),
        machine,
        averages=1 + len(optim["extra_ema_decays"]) + len(optim["posthoc_ema_stds"]),
        reference=prefers and not adapters,
    )
    # Compare with the memory of this rank's device, and of the host.
    gpu = None
    if placement.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(placement.device).total_memory
    check_memory(needed, gpu=gpu, host=capacity())
    return placement


def start_of(
    config: Mapping[str, Any], initial: Path | None, seed: int, placement: Placement = HOST
) -> tuple[nn.Module, Adapted | None, Path | None]:
    """Build the network to train; also return its adapters, and a checkpoint to load later."""
    if is_sync(config["model"]):  # `fit` loads a checkpoint's weights, if one is given
        return sync_network(config["model"], seed), None, initial
    # Four cases: adapters on a base, merged adapters, a checkpoint, released or random weights.
    if config["lora"]["target_modules"]:
        # `adapted` refuses a base that differs from the base of lora.init_from.
        own = adapted(config, initial, load_start, placement)
        check_base(config["pretrained"], initial)
        return own.net, own, None
    if initial and open_checkpoint(initial).state.get("adapters"):
        net = meta_network(config["model"])
        # One rank of each node merges on the CPU, because a GPU would round sums differently.
        merged_once = share_on_node(net, partial(_merged_values, initial), placement, "merged")
        assign_parameters(net, merged_once, placement.device)
        return net, None, None
    if initial:  # `fit` loads its weights and checks that they belong to this network
        return meta_network(config["model"]), None, initial
    return net_from(config["model"], config["pretrained"], seed, placement), None, None


def _merged_values(checkpoint: Path) -> list[tuple[str, Tensor]]:
    """Return the weights of a checkpoint of adapters, merged into their base."""
    return [(name, p.detach()) for name, p in load_policy(checkpoint).named_parameters()]


def export_sync(checkpoint: Checkpoint, out: Path, part: str = EMA) -> Path:
    """Write a trained SyncNet, averaged by default, for `fitting.load_net`; return the file.

    Integer counters of batch norm are zero, which no result depends on.
    """
    if out.suffix != ".safetensors" or out.exists():
        raise ConfigError(f"{out}: a SyncNet is written to one new file; give out=NAME.safetensors")
    architecture: dict[str, Any] = checkpoint.state["architecture"]
    net = sync_network(architecture, 0)
    weights = dict(checkpoint.tensors(part))
    missing = net.load_state_dict(weights, strict=False).missing_keys
    if lacking := [name for name in missing if not name.endswith("num_batches_tracked")]:
        raise CheckpointError(f"{checkpoint.path}: has no {lacking[0]}; train the network again")
    save_net(out, net, constructor_arguments(architecture))
    return out


def check_encoders(checkpoint: Path, fingerprints: dict[str, str]) -> None:
    """Raise CheckpointError if a checkpoint was trained on the output of other encoders."""
    trained = open_verified(checkpoint).state["encoders"]
    for name, value in fingerprints.items():
        if trained.get(name) != value:
            raise CheckpointError(
                f"{checkpoint}: was trained with the {name} encoder {trained.get(name, '-')[:12]}, "
                f"this is {value[:12]}; give the one it was trained with"
            )


# -- adapters ------------------------------------------------------------------------------------


def lora_from(config: Mapping[str, Any]) -> Lora:
    """Return the adapted layers and the sizes of the adapters, from conf/lora."""
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
    # Find the base: released weights, a checkpoint, or the base of its adapters.
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
    # Add the adapters, and record the base by its fingerprint.
    add_adapters(net, lora, int(config["seed"]))
    base = base_fingerprint(net)
    record = {**lora._asdict(), "base": base, "origin": origin._asdict()}
    # Continue adapters of a checkpoint, or of a file in peft's format.
    if first and adapters:
        check_adapters(first, record)
        load_trained(net, first.tensors(EMA), str(first.path))
    if given:
        load_trained(net, _initial_adapters(given, lora), str(given.source))
    return Adapted(net, lora, record)


def _initial_adapters(given: Adapters, lora: Lora) -> dict[str, Tensor]:
    """Return a file's adapters by parameter name; raise WeightsError unless they match `lora`."""
    if given.changes:
        raise WeightsError(
            f"{given.source}: also changes {next(iter(given.changes))}, which is no adapter; "
            "merge it into the weights that the run starts from"
        )
    tensors: dict[str, Tensor] = {}
    for name, layer in given.layers.items():
        alpha = layer.scale * layer.rank
        for key, setting, stored, value in (
            ("rank", "r", layer.rank, lora.rank),
            ("alpha", "lora_alpha", alpha, lora.alpha),
        ):
            if not math.isclose(stored, value, rel_tol=1e-6):
                raise WeightsError(
                    f"{given.source}: {key} of {name} is {stored:g}, here {value:g}; "
                    f"set lora.{setting}={stored:g}, and give adapters of one {key} in all layers"
                )
        tensors[f"{name}.lora_A.{TRAINED}.weight"] = layer.down
        tensors[f"{name}.lora_B.{TRAINED}.weight"] = layer.up
    return tensors


def export_adapters(
    checkpoint: Checkpoint, out: Path, load: Load, dtype: torch.dtype
) -> list[Path]:
    """Write the averaged adapters of a checkpoint and return the files.

    If `out` is a folder, write the layout of peft there, and `out`.safetensors for diffusers and
    ComfyUI next to it.  If `out` ends in .safetensors, write only the latter file.
    """
    if not checkpoint.state.get("adapters"):
        raise CheckpointError(f"{checkpoint.path}: has no adapters; give a run with lora=attention")
    # A peft folder with a single file next to it, or only that file.
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

    With adapters the reference is the base itself (`ref_model=base`), or an earlier average or a
    checkpoint of adapters on the same base; otherwise it is a separate network.
    """
    # Adapters and their reference share one base, so no copy is needed.
    state = open_checkpoint(pinned).state if pinned else {}
    if own is None and (config["ref_model"] == "base" or state.get("adapters")):
        raise ConfigError(
            f"ref_model={config['ref_model']}: requires adapters, but this run trains all weights; "
            "give lora=attention as there, or a run without adapters"
        )
    if own and config["ref_model"] == "base":
        return AdaptersOff(own.net)
    if own and (pinned is None or state.get("adapters")):
        if pinned:
            check_adapters(open_checkpoint(pinned), own.record)
        return AverageAdapters(own.net, own.lora)
    return Frozen(meta_network(config["model"]))  # filled when its first epoch begins


def check_base(weights: str | None, initial: Path | None) -> None:
    """Raise ConfigError for adapters on a randomly initialized network, whose gradients are 0."""
    if not weights and not initial:
        raise ConfigError(
            "lora.target_modules: adapters need a trained base, and without one all their "
            "gradients are "
            "0; give pretrained= or init_from="
        )
