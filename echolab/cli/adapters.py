"""Adapted networks of the commands: built on a base that can be found again, and references on it.

A checkpoint of adapters tells where their base came from and its fingerprint, so that every command
that takes a checkpoint takes one of adapters too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from echolab.errors import CheckpointError, ConfigError, WeightsError
from echolab.models.frozen import Frozen
from echolab.models.transformer import EchoTransformer
from echolab.training.adapters.lora import (
    AdaptersOff,
    AverageAdapters,
    Lora,
    add_adapters,
    base_fingerprint,
)
from echolab.training.adapters.lora_base import Load, Origin, base_of, on_its_base
from echolab.training.adapters.lora_files import (
    load_trained,
    read_adapters,
    save_adapters,
    trained_tensors,
)
from echolab.training.checkpoints.checkpoint import EMA, Checkpoint, check_adapters, open_checkpoint
from echolab.training.preference import Reference


class Adapted(NamedTuple):
    """A network to train, and what its checkpoints tell of its adapters."""

    net: EchoTransformer
    lora: Lora
    record: dict[str, Any]


def adapted(config: Mapping[str, Any], initial: Path | None, load: Load) -> Adapted:
    """The network of conf/lora on the base of `weights` or `initial`, which may have adapters."""
    told = {key: value for key, value in config["lora"].items() if key != "start"}
    lora = Lora(**{**told, "targets": tuple(told["targets"])})
    first = open_checkpoint(initial) if initial else None
    weights = str(Path(config["weights"]).resolve()) if config["weights"] else None
    origin = Origin(weights, str(initial.resolve()) if initial else None, int(config["seed"]))
    adapters = first.state.get("adapters") if first else None
    if adapters:
        origin = Origin(**adapters["origin"])
    net = base_of(config["model"], origin, load)
    add_adapters(net, lora, int(config["seed"]))
    base = base_fingerprint(net)
    record = {**lora._asdict(), "base": base, "origin": origin._asdict()}
    if first and adapters:
        check_adapters(first, record)
        load_trained(net, first.tensors(EMA), str(first.path))
    if config["lora"]["start"]:
        _start(net, lora, base, Path(config["lora"]["start"]))
    return Adapted(net, lora, record)


def _start(net: EchoTransformer, lora: Lora, base: str, folder: Path) -> None:
    found = read_adapters(folder)
    for key, there, here in (
        ("rank", found.lora.rank, lora.rank),
        ("alpha", found.lora.alpha, lora.alpha),
    ):
        if there != here:
            raise WeightsError(
                f"{folder}: {key} is {there:g}, here {here:g}; set lora.{key}={there:g}"
            )
    if found.base not in (None, base):
        raise WeightsError(
            f"{folder}: adapters of another base: {found.base} there, {base} here; "
            "give the weights= or initial= that they were trained on"
        )
    load_trained(net, found.tensors, str(folder))


def export_adapters(checkpoint: Checkpoint, folder: Path, load: Load) -> None:
    """Write the averaged adapters of a checkpoint as a folder in peft's format."""
    if not checkpoint.state.get("adapters"):
        raise CheckpointError(f"{checkpoint.path}: has no adapters; give a run with lora=attention")
    net, lora, told = on_its_base(checkpoint, load)
    tensors, layers = trained_tensors(net)
    save_adapters(folder, lora, tensors, layers, told["base"])


def reference_of(config: Mapping[str, Any], own: Adapted | None, pinned: Path | None) -> Reference:
    """The reference of preference epochs, without a second copy of a base that is in memory.

    For adapters: the base itself (`reference=base`), an earlier average or a checkpoint of adapters
    on the same base; otherwise a network of its own.
    """
    state = open_checkpoint(pinned).state if pinned else {}
    if own is None and (config["reference"] == "base" or state.get("adapters")):
        raise ConfigError(
            f"reference={config['reference']}: means adapters, and this run trains all weights; "
            "give lora=attention as there, or a run without adapters"
        )
    if own and config["reference"] == "base":
        return AdaptersOff(own.net)
    if own and (pinned is None or state.get("adapters")):
        if pinned:
            check_adapters(open_checkpoint(pinned), own.record)
        return AverageAdapters(own.net, own.lora)
    return Frozen(EchoTransformer(**config["model"]))
