"""Rebuild the base of an adapted network from the origin that a checkpoint records."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from echolab.errors import CheckpointError
from echolab.models.transformer import EchoTransformer
from echolab.training.adapters.lora import Lora, add_adapters, base_fingerprint, merge
from echolab.training.adapters.lora_files import load_trained
from echolab.training.checkpoints.checkpoint import EMA, Checkpoint, open_checkpoint
from echolab.training.engine.placement import (
    HOST,
    Placement,
    filled_network,
    initialized_network,
)

# (file or folder, architecture, seed, placement) -> network with released weights
Load = Callable[[Path, Mapping[str, Any], int, Placement], EchoTransformer]


class Origin(NamedTuple):
    """Source of a base network: released weights, a checkpoint, or initialization by a seed."""

    weights: str | None
    checkpoint: str | None
    seed: int


def base_of(
    architecture: Mapping[str, Any], origin: Origin, load: Load, placement: Placement = HOST
) -> EchoTransformer:
    """Build the base network, without adapters, from its origin."""
    if origin.weights:
        return load(Path(origin.weights), architecture, origin.seed, placement)
    if origin.checkpoint:
        weights = open_checkpoint(Path(origin.checkpoint)).tensors(EMA)
        return filled_network(architecture, weights, placement)
    return initialized_network(architecture, origin.seed, placement)


def on_its_base(checkpoint: Checkpoint, load: Load) -> tuple[EchoTransformer, Lora, dict[str, Any]]:
    """Build the base of a checkpoint of adapters and load the averaged adapters onto it.

    Raise CheckpointError if the base has changed since training.
    """
    record = checkpoint.state["adapters"]
    origin = Origin(**record["origin"])
    net = base_of(checkpoint.state["architecture"], origin, load)
    # On another base, the adapters would compute other outputs than in training.
    fingerprint = base_fingerprint(net)
    if fingerprint != record["base"]:
        source = origin.weights or origin.checkpoint or f"seed {origin.seed}"
        raise CheckpointError(
            f"{checkpoint.path}: its base {source} is another one now: "
            f"fingerprint {record['base']} when it was trained, {fingerprint} here; "
            "put back what was there"
        )
    # Create adapters of the recorded shapes; `load_trained` then replaces their values.
    lora = Lora(tuple(record["targets"]), record["rank"], record["alpha"])
    add_adapters(net, lora, seed=0)
    load_trained(net, checkpoint.tensors(EMA), str(checkpoint.path))
    return net, lora, record


def merged(checkpoint: Checkpoint, load: Load) -> EchoTransformer:
    """Build the network of a checkpoint of adapters, with the averaged adapters merged."""
    net, _, _ = on_its_base(checkpoint, load)
    merge(net)
    return net


# -- weights to export ------------------------------------------------------------------------


def exported_weights(
    checkpoint: Checkpoint, load: Load, part: str = EMA
) -> tuple[EchoTransformer, dict[str, Tensor]]:
    """Return the network of a checkpoint and its weights by name.

    `part` selects the weights: EMA or MASTER.  Of a checkpoint of adapters, the averaged adapters
    are merged into the base; `load` reads the released weights of that base.  Without adapters the
    network is on the meta device.
    """
    if checkpoint.state.get("adapters"):
        merged_net = merged(checkpoint, load)
        return merged_net, dict(merged_net.named_parameters())
    with torch.device("meta"):
        net = EchoTransformer(**checkpoint.state["architecture"])
    return net, dict(checkpoint.tensors(part))
