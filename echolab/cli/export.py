"""`echolab export RUN out=FOLDER`: write trained weights as safetensors for other programs."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from echolab.arguments import argument, check_exists, parse
from echolab.atomic_io import check_writable
from echolab.config.folders import architecture_of
from echolab.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from echolab.models.transformer import EchoTransformer

# Prefixes of the names of additional averages (training.engine.ema).
AVERAGES = ("ema-", "power-")


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Write weights with the names of Wan and EchoMimicV3, or as a folder for diffusers.

    The source is a run, one of its checkpoints, or released weights with `model=`.  Training can
    start from the output (`pretrained=`).  diffusers has no audio branch and loads only networks
    without one.  Adapters of a run are merged.  which=adapters writes only the adapters:
    out=FOLDER as a peft folder and FOLDER.safetensors for diffusers and ComfyUI,
    out=NAME.safetensors only as the latter; adapters of the audio branch, which those programs
    lack, go to NAME.audio.safetensors.
    """

    source: Path = argument("run, checkpoint, or released weights", section="Source")
    which: str = argument(
        "weights of a checkpoint: ema, ema-0.9999, ... (an average), raw, or adapters", "ema",
        aka=("weights",),
    )  # fmt: skip
    ema_std: float | None = argument(
        "average of this relative width, from a run's snapshots", None, gt=0
    )
    model: str | None = argument(
        "architecture of released weights, a name in conf/model", None, default_text="run's"
    )

    out: Path = argument("new .safetensors file, or new folder", section="Output")
    names: Literal["original", "diffusers"] = argument("naming of the tensors", "original")
    dtype: Literal["bf16", "fp32", "same"] | None = argument(
        "type of the tensors", None,
        default_text="bf16 for runs, fp32 for adapters, same for released weights",
    )  # fmt: skip
    shard_gb: float = argument("largest file of a folder, GB", 5.0, gt=0, lt=1e6)
    format: Literal["text", "json"] = argument("summary format", "text")

    def check(self) -> None:
        """Raise ConfigError for arguments that are unknown or cannot be combined."""
        if self.which not in ("ema", "raw", "adapters") and not self.which.startswith(AVERAGES):
            raise ConfigError(
                f"which={self.which}: unknown; ema, raw, adapters, or an average by the name in "
                "`echolab checkpoint inspect`"
            )
        # Options that cannot be combined.
        if self.which == "adapters" and self.names != "original":
            raise ConfigError("names=diffusers: is for networks; leave it out with which=adapters")
        if self.model is not None and (self.which != "ema" or self.ema_std is not None):
            raise ConfigError(f"which={self.which}: is for a run; leave it out with model=")
        if self.ema_std is not None and self.which != "ema":
            raise ConfigError(f"ema_std={self.ema_std:g}: is an average; leave out which=")
        # A file or a folder, by the suffix.
        if self.out.suffix and self.out.suffix != ".safetensors":
            raise ConfigError(
                f"out={self.out}: must end in .safetensors, or have no suffix for a folder"
            )

    def check_source(self) -> None:
        """Raise ConfigError unless there is a run, a checkpoint, or a model of this name."""
        # Released weights need the name of their architecture; a run records its architecture.
        if self.model is not None:
            architecture_of(self.model)
        elif not self.source.is_dir():
            raise ConfigError(
                f"{self.source}: no run or checkpoint; for released weights give model=NAME"
            )


def main(argv: list[str]) -> int:
    """Parse and check the arguments, then export."""
    arguments = parse(ExportArguments, argv, command="echolab export", positional=("source",))
    arguments.check()
    check_writable(arguments.out, folder=not arguments.out.suffix)
    arguments.check_source()
    check_exists(arguments, "source")
    export(arguments)
    return 0


def export(arguments: ExportArguments) -> None:
    """Write the weights, or the adapters alone, and print a summary."""
    import torch

    from echolab.config.networks import export_adapters, export_sync, last_checkpoint, load_start
    from echolab.metrics.sync_clips import is_sync
    from echolab.models.export import write_diffusers, write_original
    from echolab.training.checkpoints.checkpoint import open_checkpoint
    from echolab.training.engine.master_weights import MASTER

    out = arguments.out
    # Write only the adapters, or the full network.
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, "same": None}
    if arguments.which == "adapters":
        if out.exists():
            raise ConfigError(f"out={out}: already there; name another, or remove it")
        checkpoint = open_checkpoint(last_checkpoint(arguments.source))
        dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
        files = export_adapters(checkpoint, out, load_start, dtype)
    elif arguments.model is None and is_sync(
        (checkpoint := open_checkpoint(last_checkpoint(arguments.source))).state["architecture"]
    ):
        part = MASTER if arguments.which == "raw" else arguments.which
        files = [export_sync(checkpoint, out, part)]
    else:
        net, tensors = read_source(arguments)
        write = write_original if arguments.names == "original" else write_diffusers
        files = write(
            out,
            net,
            tensors,
            dtype=dtypes[arguments.dtype or ("same" if arguments.model else "bf16")],
            shard_bytes=round(arguments.shard_gb * 1e9),
        )
    _report(out, files, arguments.format)


def _report(out: Path, files: list[Path], format: str) -> None:
    """Print the content of the files, read back from disk."""
    from safetensors import safe_open

    # Read the headers back from disk.
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


def read_source(arguments: ExportArguments) -> "tuple[EchoTransformer, dict[str, Tensor]]":
    """Return the network, on the meta device if its weights are in files, and weights by name."""
    from echolab.config.networks import last_checkpoint, load_start
    from echolab.models.loading import read_tensors
    from echolab.models.state_dict import match_weights, meta_network
    from echolab.training.adapters.lora_base import exported_weights
    from echolab.training.checkpoints.checkpoint import open_checkpoint
    from echolab.training.checkpoints.retention import average_of_width
    from echolab.training.engine.master_weights import MASTER

    # Released weights, by the name of their architecture.
    if arguments.model is not None:
        net = meta_network(architecture_of(arguments.model))
        tensors = read_tensors(arguments.source)
        match_weights(net, tensors, source=str(arguments.source))
        return net, tensors

    # A run: merged adapters, an average of another width, or a part of the checkpoint.
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
        net = meta_network(checkpoint.state["architecture"])
        return net, average_of_width(checkpoint, arguments.ema_std)
    part = MASTER if arguments.which == "raw" else arguments.which
    return exported_weights(checkpoint, load_start, part)
