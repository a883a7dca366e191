"""A rank of the tests of placement: it builds a network when a file asks for it, and waits."""

import json
import time
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from echolab.config.networks import load_start
from echolab.models.frozen import Frozen
from echolab.models.state_dict import meta_network
from echolab.models.transformer import EchoTransformer
from echolab.training.engine.machine import Machine
from echolab.training.engine.placement import (
    Placement,
    filled_network,
    initialized_network,
    placement_of,
)

SEED = 7
# 71 M parameters, 283 MB in fp32.
ARCHITECTURE: Mapping[str, object] = {
    "dim": 768, "ffn_dim": 3072, "num_heads": 6, "num_layers": 6, "in_channels": 36,
    "out_channels": 16, "text_dim": 32, "image_dim": 48, "audio_dim": 32, "freq_dim": 32,
}  # fmt: skip


def built(kind: str, source: str, placement: Placement) -> nn.Module:
    """Build the network that a run of this kind starts with."""
    if kind == "random":
        return initialized_network(ARCHITECTURE, SEED, placement)
    if kind == "pretrained":
        return load_start(Path(source), ARCHITECTURE, SEED, placement)
    if kind == "checkpoint":
        return filled_network(ARCHITECTURE, load_file(source), placement)
    reference = Frozen(meta_network(ARCHITECTURE))
    reference.load(load_file(source))
    return reference.to(placement.device).net


def digest(values: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of names, shapes and values."""
    result = blake2b(digest_size=16)
    for name, tensor in values:
        result.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        result.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()


def wait_for(file: Path) -> None:
    """Return once a file is there."""
    while not file.exists():
        time.sleep(0.01)


def build(folder: str, kind: str, source: str, world: int, accelerator: str = "cpu") -> int:
    """Build when `folder/go` is there, read every value, and stay until `folder/end` is."""
    import os

    torch.set_num_threads(1)
    placement = placement_of(Machine("ddp", devices=world, accelerator=accelerator))
    if placement.device.type == "cuda":  # the ranks of this test share one GPU
        placement = placement._replace(device=torch.device("cuda", 0))
        torch.ones(1, device=placement.device)
    own = Path(folder) / os.environ["RANK"]
    own.with_suffix(".ready").touch()
    wait_for(Path(folder) / "go")
    net = built(kind, source, placement)
    assert isinstance(net, EchoTransformer)
    devices = {str(p.device) for p in net.parameters()}
    report = {"digest": digest(net.named_parameters()), "devices": sorted(devices)}
    own.with_suffix(".json").write_text(json.dumps(report))
    wait_for(Path(folder) / "end")
    return 0
