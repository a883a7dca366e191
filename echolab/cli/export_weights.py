"""Export weights as `echolab export` asks."""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from echolab.cli.export import ExportArguments
from echolab.config.networks import (
    architecture_of,
    export_adapters,
    last_checkpoint,
    load_start,
)
from echolab.errors import ConfigError
from echolab.models.export import write_diffusers, write_original
from echolab.models.loading import read_tensors
from echolab.models.state_dict import match_weights
from echolab.models.transformer import EchoTransformer
from echolab.training.adapters.lora_base import exported_weights
from echolab.training.checkpoints.checkpoint import open_checkpoint
from echolab.training.checkpoints.snapshots import average_of_width
from echolab.training.engine.master_weights import MASTER

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "same": None}
WRITERS = {"original": write_original, "diffusers": write_diffusers}


def export(arguments: ExportArguments) -> None:
    """Write the weights, or the adapters alone, and print a summary."""
    out = arguments.out
    if arguments.which == "adapters":
        if out.exists():
            raise ConfigError(f"out={out}: already there; name another, or remove it")
        checkpoint = open_checkpoint(last_checkpoint(arguments.source))
        dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
        files = export_adapters(checkpoint, out, load_start, dtype)
    else:
        net, tensors = read_source(arguments)
        files = WRITERS[arguments.names](
            out,
            net,
            tensors,
            dtype=DTYPES[arguments.dtype or ("same" if arguments.model else "bf16")],
            shard_bytes=round(arguments.shard_gb * 1e9),
        )
    _report(out, files, arguments.format)


def _report(out: Path, files: list[Path], format: str) -> None:
    """Print the content of the files, read back from disk."""
    shapes: list[list[int]] = []
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as content:
                shapes += [content.get_slice(name).get_shape() for name in content.keys()]
    figures = {
        "out": str(out),
        "files": [file.name for file in files],
        "bytes": sum(file.stat().st_size for file in files),
        "tensors": len(shapes),
        "parameters": sum(map(math.prod, shapes)),
    }
    plain = (
        f"{out}: {figures['tensors']} tensors, {figures['parameters']:,} parameters, "
        f"{figures['bytes']:,} bytes in {len(files)} files"
    )
    print(json.dumps(figures) if format == "json" else plain)


def read_source(arguments: ExportArguments) -> tuple[EchoTransformer, dict[str, Tensor]]:
    """Return the network, on the meta device if its weights are read, and its weights by name."""
    if arguments.model is not None:
        with torch.device("meta"):
            net = EchoTransformer(**architecture_of(arguments.model))
        tensors = read_tensors(arguments.source)
        match_weights(net, tensors, source=str(arguments.source))
        return net, tensors
    if not arguments.source.is_dir():
        raise ConfigError(
            f"{arguments.source}: no run or checkpoint; for released weights give model=NAME"
        )
    checkpoint = open_checkpoint(last_checkpoint(arguments.source))
    if checkpoint.state.get("adapters") and arguments.which != "ema":
        raise ConfigError(
            f"{checkpoint.path}: adapters are merged averaged; give which=ema, or adapters"
        )
    if arguments.ema_std is not None:
        if checkpoint.state.get("adapters"):
            raise ConfigError(
                f"{checkpoint.path}: holds adapters, which have no snapshots; leave out ema_std="
            )
        with torch.device("meta"):
            net = EchoTransformer(**checkpoint.state["architecture"])
        return net, average_of_width(checkpoint, arguments.ema_std)
    part = MASTER if arguments.which == "raw" else arguments.which
    return exported_weights(checkpoint, load_start, part)
