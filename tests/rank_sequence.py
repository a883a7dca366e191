"""One rank of a test of sequence parallelism: `python rank_sequence.py FOLDER`."""

import os
import sys
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from echolab.training.engine.activation_checkpointing import checkpoint_blocks
from echolab.training.engine.sequence_parallel import SequenceSplit

TIMESTEPS = torch.tensor([123.0, 987.0])


def result(*, split: bool) -> dict[str, torch.Tensor]:
    """Return output and gradients of a tiny network, averaged over ranks where it is split."""
    net = tiny.net(trained=True, num_heads=4, dim=96)
    if split:
        checkpoint_blocks(net)
        SequenceSplit(net)
    output = net(tiny.latents(), TIMESTEPS, tiny.conditions())
    (output * tiny.latents(seed=5)).sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    if split:
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    return {"output": output.detach(), **gradients}


def main() -> None:
    """Write this rank's result."""
    dist.init_process_group("gloo")
    save_file(result(split=True), Path(sys.argv[1]) / f"{dist.get_rank()}.safetensors")
    dist.barrier()  # nobody leaves while another still talks to him
    dist.destroy_process_group()
    os._exit(0)  # all is written; threads of torch may abort Python's shutdown


if __name__ == "__main__":
    main()
