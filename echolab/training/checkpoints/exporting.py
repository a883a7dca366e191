"""What is exported of a checkpoint: whole weights by name, adapters merged into their base."""

import torch
from torch import Tensor

from echolab.models.transformer import EchoTransformer
from echolab.training.adapters.lora_base import Load, merged
from echolab.training.checkpoints.checkpoint import EMA, Checkpoint


def exported_weights(
    checkpoint: Checkpoint, load: Load, part: str = EMA
) -> tuple[EchoTransformer, dict[str, Tensor]]:
    """The network, on the meta device where it need not be made, and its weights by name.

    `part` is EMA or MASTER; of adapters the averaged ones are merged.  `load` reads the released
    weights of a base.
    """
    if checkpoint.state.get("adapters"):
        whole = merged(checkpoint, load)
        return whole, dict(whole.named_parameters())
    with torch.device("meta"):
        net = EchoTransformer(**checkpoint.state["architecture"])
    return net, dict(checkpoint.tensors(part))
