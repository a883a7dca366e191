"""`echolab export RUN out=FOLDER`: trained weights as safetensors that other programs read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from echolab.arguments import argument, parse
from echolab.atomic_io import check_writable
from echolab.errors import ConfigError

AVERAGES = ("ema-", "power-")  # prefixes of other averages: training.engine.ema


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Write weights with the names of Wan and EchoMimicV3, or as a folder for diffusers.

    The source is a run, one of its checkpoints, or released weights with `model=`.  What is written
    can start a training (`pretrained=`).  diffusers has no audio branch and loads networks without.
    Adapters of a run are merged.  With which=adapters they are written alone: out=FOLDER as peft's
    folder and FOLDER.safetensors for diffusers and ComfyUI, out=NAME.safetensors as the latter
    alone; layers of the audio branch, which those programs lack, go to NAME.audio.safetensors.
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
        """Raise ConfigError for arguments that are unknown or do not go together."""
        if self.which not in ("ema", "raw", "adapters") and not self.which.startswith(AVERAGES):
            raise ConfigError(
                f"which={self.which}: unknown; ema, raw, adapters, or an average by the name in "
                "`echolab checkpoint inspect`"
            )
        if self.which == "adapters" and self.names != "original":
            raise ConfigError("names=diffusers: is for networks; leave it out with which=adapters")
        if self.model is not None and (self.which != "ema" or self.ema_std is not None):
            raise ConfigError(f"which={self.which}: is for a run; leave it out with model=")
        if self.ema_std is not None and self.which != "ema":
            raise ConfigError(f"ema_std={self.ema_std:g}: is an average; leave out which=")
        if self.out.suffix and self.out.suffix != ".safetensors":
            raise ConfigError(
                f"out={self.out}: name a file .safetensors, or a folder without a suffix"
            )


def main(argv: list[str]) -> int:
    """Parse and check the arguments, then import torch and export."""
    arguments = parse(ExportArguments, argv, command="echolab export", positional=("source",))
    arguments.check()
    check_writable(arguments.out, folder=not arguments.out.suffix)
    from echolab.cli.export_weights import export

    export(arguments)
    return 0
