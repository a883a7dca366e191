"""Networks by name, trained ones from their checkpoints, and released ones from their files."""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echolab.arguments import closest
from echolab.config.build_adapters import Adapted, adapted, lora_from
from echolab.config.data_checks import check_base
from echolab.config.folders import CONF, group_choices, group_settings
from echolab.errors import CheckpointError, ConfigError
from echolab.launch import run_dir
from echolab.models import loading
from echolab.models.state_dict import AUDIO_PARTS, IMAGE_PARTS, meta_network, place
from echolab.models.transformer import EchoTransformer
from echolab.training.adapters.lora import add_adapters
from echolab.training.adapters.lora_base import merged
from echolab.training.checkpoints.checkpoint import (
    EMA,
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


def architecture_of(model: str) -> dict[str, Any]:
    """Return the settings of conf/model/NAME.yaml; raise ConfigError if there are none."""
    known = group_choices([CONF])["model"]
    if model not in known:
        raise ConfigError(
            f"model={model}: unknown; one of {', '.join(known)}{closest(model, known)}"
        )
    return group_settings([CONF], "model", model)


def last_checkpoint(run: Path) -> Path:
    """Return the newest complete checkpoint of a run or of its folder of checkpoints.

    A path that is a checkpoint is returned as it is.  Raise CheckpointError if there is none.
    """
    if (run / "manifest.json").is_file():
        return run
    folder = run / "checkpoints"
    checkpoint, rejected = latest_valid(folder if folder.is_dir() else run)
    if checkpoint is None:
        why = f" ({rejected[0]})" if rejected else ""
        raise CheckpointError(f"{run}: no complete checkpoint in it{why}; train first")
    return checkpoint.path


def load_policy(checkpoint: Path) -> EchoTransformer:
    """Return the network of a checkpoint, frozen, with averaged weights and merged adapters."""
    opened = open_checkpoint(checkpoint)
    if opened.state.get("adapters"):
        return merged(opened, load_start).eval().requires_grad_(False)
    architecture: dict[str, Any] = opened.state["architecture"]
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
    """Print lines about the weights in the first process alone."""
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
    """Return where this rank's network goes; build none.

    Raise ConfigError if its device is not here, or if the run can never fit into memory.
    """
    check_device(machine)
    placement = placement_of(machine)
    net = meta_network(config["model"])
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
    gpu = None
    if placement.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(placement.device).total_memory
    check_memory(needed, gpu=gpu, host=capacity())
    return placement


def start_of(
    config: Mapping[str, Any], initial: Path | None, seed: int, placement: Placement = HOST
) -> tuple[EchoTransformer, Adapted | None, Path | None]:
    """Build the network to train; also return its adapters, and a checkpoint still to be loaded."""
    if config["lora"]["target_modules"]:
        # Refuses a base that is not the one of lora.init_from.
        own = adapted(config, initial, load_start, placement)
        check_base(config["pretrained"], initial)
        return own.net, own, None
    if initial and open_checkpoint(initial).state.get("adapters"):
        net = meta_network(config["model"])
        # Merged on the CPU by one rank of each node: a GPU would round sums differently.
        merged_once = share_on_node(net, partial(_merged_values, initial), placement, "merged")
        place(net, merged_once, placement.device)
        return net, None, None
    if initial:  # its weights are loaded by `fit`, which sees that it is of this network
        return meta_network(config["model"]), None, initial
    return net_from(config["model"], config["pretrained"], seed, placement), None, None


def _merged_values(checkpoint: Path) -> list[tuple[str, Tensor]]:
    """Return the weights of a checkpoint of adapters, merged into their base."""
    return [(name, p.detach()) for name, p in load_policy(checkpoint).named_parameters()]


def check_encoders(checkpoint: Path, fingerprints: dict[str, str]) -> None:
    """Raise CheckpointError if a checkpoint was trained on the output of other encoders."""
    trained = open_verified(checkpoint).state["encoders"]
    for name, value in fingerprints.items():
        if trained.get(name) != value:
            raise CheckpointError(
                f"{checkpoint}: was trained with the {name} encoder {trained.get(name, '-')[:12]}, "
                f"this is {value[:12]}; give the one it was trained with"
            )
