"""`echolab export RUN out=FOLDER`: trained weights as safetensors that other programs read."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from echolab.arguments import parse
from echolab.atomic_io import prove_writable
from echolab.config.build_adapters import export_adapters
from echolab.config.networks import architecture_of, last_checkpoint, load_start
from echolab.errors import ConfigError
from echolab.models.export import write_diffusers, write_original
from echolab.models.loading import read_tensors
from echolab.models.transformer import EchoTransformer
from echolab.models.weights import match_weights
from echolab.training.adapters.lora_base import exported_weights
from echolab.training.checkpoints.checkpoint import open_checkpoint
from echolab.training.checkpoints.snapshots import average_of_width
from echolab.training.engine.ema import EMA, POWER
from echolab.training.engine.master_weights import MASTER

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "same": None}
WRITERS = {"original": write_original, "diffusers": write_diffusers}


@dataclass(frozen=True)
class ExportArguments:
    """Write weights with the names of Wan and EchoMimicV3, or as a folder for diffusers.

    The source is a run, one of its checkpoints, or released weights with `model=`.  What is written
    can start a training (`weights=`).  diffusers has no sound; it loads networks without.  Of a run
    with adapters the network is written with them added.  With weights=adapters they are written
    alone: out=FOLDER as peft's folder and FOLDER.safetensors for diffusers and ComfyUI,
    out=NAME.safetensors as the latter alone; layers of the audio branch, which those programs
    lack, get a file NAME.audio.safetensors of their own.
    """

    source: Path = field(metadata={"help": "a run, a checkpoint, or released weights"})
    out: Path = field(metadata={"help": "a new file .safetensors, or a new folder"})
    names: Literal["original", "diffusers"] = field(
        default="original", metadata={"help": "of the tensors"}
    )
    dtype: Literal["bf16", "fp32", "same"] | None = field(
        default=None,
        metadata={
            "help": "of the tensors; none: bf16 of a run, fp32 of adapters, the same of released "
            "weights"
        },
    )
    weights: str = field(
        default="ema",
        metadata={"help": "a checkpoint's average (ema, ema-0.9999, ...), raw, or its adapters"},
    )
    ema_std: float | None = field(
        default=None, metadata={"gt": 0, "help": "an average of this width, from a run's snapshots"}
    )
    model: str | None = field(
        default=None, metadata={"help": "of released weights: a name in conf/model"}
    )
    shard_gb: float = field(default=5.0, metadata={"help": "the most of one file of a folder"})
    format: Literal["text", "json"] = field(default="text", metadata={"help": "of the summary"})


def main(argv: list[str]) -> int:
    arguments = parse(ExportArguments, argv, command="echolab export", positional=("source",))
    if not 0 < arguments.shard_gb < 1e6:
        raise ConfigError(f"shard_gb={arguments.shard_gb:g}: must be above 0; 5 is usual")
    _check_weights(arguments)
    out = arguments.out
    if out.suffix and out.suffix != ".safetensors":
        raise ConfigError(f"out={out}: name a file .safetensors, or a folder without a suffix")
    prove_writable(out, folder=not out.suffix)
    if arguments.weights == "adapters":
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
    return 0


def _check_weights(arguments: ExportArguments) -> None:
    """ConfigError for weights that are not named so, or not those of the source."""
    weights = arguments.weights
    if weights not in ("ema", "raw", "adapters") and not weights.startswith((f"{EMA}-", POWER)):
        raise ConfigError(
            f"weights={weights}: unknown; ema, raw, adapters, or another average by the name that "
            "`echolab checkpoint inspect` tells"
        )
    if weights == "adapters" and arguments.names != "original":
        raise ConfigError("names=diffusers: is of networks; leave it out with weights=adapters")
    if arguments.model is not None and (weights != "ema" or arguments.ema_std is not None):
        raise ConfigError(f"weights={weights}: is of a run; leave it out with model=")
    if arguments.ema_std is not None and weights != "ema":
        raise ConfigError(f"ema_std={arguments.ema_std:g}: is an average; leave out weights=")


def _report(out: Path, files: list[Path], kind: str) -> None:
    """What the files hold, as they are on disk."""
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
    print(json.dumps(figures) if kind == "json" else plain)


def read_source(arguments: ExportArguments) -> tuple[EchoTransformer, dict[str, Tensor]]:
    """The network, on the meta device where it need not be made, and its weights by name."""
    if arguments.model is not None:
        with torch.device("meta"):
            net = EchoTransformer(**architecture_of(arguments.model))
        there = read_tensors(arguments.source)
        match_weights(net, there, source=str(arguments.source))
        return net, there
    if not arguments.source.is_dir():
        raise ConfigError(
            f"{arguments.source}: no run or checkpoint; of released weights say which: model=NAME"
        )
    checkpoint = open_checkpoint(last_checkpoint(arguments.source))
    if checkpoint.state.get("adapters") and arguments.weights != "ema":
        raise ConfigError(
            f"{checkpoint.path}: adapters are merged averaged; give weights=ema, or adapters"
        )
    if arguments.ema_std is not None:
        if checkpoint.state.get("adapters"):
            raise ConfigError(f"{checkpoint.path}: of adapters; leave out ema_std=")
        with torch.device("meta"):
            net = EchoTransformer(**checkpoint.state["architecture"])
        return net, average_of_width(checkpoint, arguments.ema_std)
    part = MASTER if arguments.weights == "raw" else arguments.weights
    return exported_weights(checkpoint, load_start, part)
