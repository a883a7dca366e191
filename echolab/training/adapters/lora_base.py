"""The base of an adapted network, rebuilt from the origin that a checkpoint records."""

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

# (file or folder, architecture, seed, placement) -> a network of released weights
Load = Callable[[Path, Mapping[str, Any], int, Placement], EchoTransformer]


class Origin(NamedTuple):
    """Where a base came from: released weights, a checkpoint, or nothing but the seed."""

    weights: str | None
    checkpoint: str | None
    seed: int


def base_of(
    architecture: Mapping[str, Any], origin: Origin, load: Load, placement: Placement = HOST
) -> EchoTransformer:
    """Build the network that adapters were, or will be, added to."""
    if origin.weights:
        return load(Path(origin.weights), architecture, origin.seed, placement)
    if origin.checkpoint:
        weights = open_checkpoint(Path(origin.checkpoint)).tensors(EMA)
        return filled_network(architecture, weights, placement)
    return initialized_network(architecture, origin.seed, placement)


def on_its_base(checkpoint: Checkpoint, load: Load) -> tuple[EchoTransformer, Lora, dict[str, Any]]:
    """Build the network of a checkpoint of adapters; raise CheckpointError for another base."""
    record = checkpoint.state["adapters"]
    origin = Origin(**record["origin"])
    net = base_of(checkpoint.state["architecture"], origin, load)
    # Adapters on another base would compute something else.
    fingerprint = base_fingerprint(net)
    if fingerprint != record["base"]:
        place = origin.weights or origin.checkpoint or f"seed {origin.seed}"
        raise CheckpointError(
            f"{checkpoint.path}: its base {place} is another one now: fingerprint {record['base']} "
            f"when it was trained, {fingerprint} here; put back what was there"
        )
    # Shapes from the record; the values are replaced at once.
    lora = Lora(tuple(record["targets"]), record["rank"], record["alpha"])
    add_adapters(net, lora, seed=0)
    load_trained(net, checkpoint.tensors(EMA), str(checkpoint.path))
    return net, lora, record


def merged(checkpoint: Checkpoint, load: Load) -> EchoTransformer:
    """Build the network of a checkpoint of adapters, and merge the averaged ones into it."""
    net, _, _ = on_its_base(checkpoint, load)
    merge(net)
    return net


# -- weights to export ------------------------------------------------------------------------


def exported_weights(
    checkpoint: Checkpoint, load: Load, part: str = EMA
) -> tuple[EchoTransformer, dict[str, Tensor]]:
    """Return the network, on the meta device if it need not be built, and its weights by name.

    `part` is EMA or MASTER; of adapters the averaged ones are merged.  `load` reads the released
    weights of a base.
    """
    if checkpoint.state.get("adapters"):
        merged_net = merged(checkpoint, load)
        return merged_net, dict(merged_net.named_parameters())
    with torch.device("meta"):
        net = EchoTransformer(**checkpoint.state["architecture"])
    return net, dict(checkpoint.tensors(part))
