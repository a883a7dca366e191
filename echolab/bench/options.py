"""The arguments of `echolab bench step`, `generate` and `data`.

This module imports nothing heavy, so that a wrong argument is refused at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from echolab.arguments import argument

ATTENTION = "attention kernel: auto, sdpa, cudnn, flash2, flash3"


@dataclass(frozen=True, kw_only=True)
class StepArguments:
    """Forward and backward of the network in turns with diffusers' WanTransformer3DModel.

    Both have the same weights and inputs, with image and without audio; times are medians.
    Peak memory is the most that torch's allocator held in a step above what it held before it
    (activations and gradients, not weights).  bf16 is autocast over fp32 weights.
    With engine=true, in the first precision: an update of the average compared with a step, and a
    run of `echolab train` compared with a bare loop of the same steps.
    """

    model: str = argument("`small`, or a name of conf/model", "small", section="What is measured")
    device: Literal["cpu", "cuda"] = argument("device", "cpu")
    frames: int | None = argument(
        "video frames, 4n+1", None, default_text="25, on a GPU 81", aka=("num_frames",)
    )
    height: int | None = argument("pixels, multiple of 16", None, default_text="192, on a GPU 480")
    width: int | None = argument("pixels, multiple of 16", None, default_text="256, on a GPU 832")
    precision: tuple[str, ...] | None = argument(
        "fp32, bf16 or both", None, default_text="both, on a GPU bf16"
    )
    activation_checkpointing: Literal["none", "full", "selective"] | None = argument(
        "activations to recompute; diffusers has full only", None,
        default_text="none, on a GPU selective",
    )  # fmt: skip
    attention: str = argument(ATTENTION, "auto")
    compile: bool = argument("compile the blocks of both", False)
    variants: bool = argument("also audio, checkpointing, compile and each kernel", True)
    engine: bool = argument("measure the engine instead of the network", False)
    seed: int = argument("seed of weights and inputs", 0, ge=0)
    pairs: int = argument("runs of each", 7, ge=1, section="How")
    scratch: Path | None = argument("folder for runs", None, default_text="the system's")
    peak_tflops: float | None = argument(
        "bf16 TFLOP/s of the GPU, for MFU", None, gt=0, default_text="that of its data sheet"
    )
    format: Literal["table", "json"] = argument("output format", "table")


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Denoise a video with random weights, once for each solver, number of steps and window.

    Encoders and the decoder are left out.  Each time is compared with the length of the video: the
    ratio is how many times longer than the video its generation takes.
    """

    model: str | None = argument(
        "name of conf/model", None, default_text="demo, on a GPU echomimicv3_preview",
        section="What is measured",
    )  # fmt: skip
    device: Literal["cpu", "cuda"] = argument("device", "cpu")
    preset: Literal["demo", "preview", "flash"] | None = argument(
        "sampler settings", None, default_text="demo, on a GPU preview"
    )
    frames: int | None = argument("video frames, 4n+1", None, default_text="49, on a GPU 125 (5 s)")
    height: int | None = argument("pixels, multiple of 16", None, default_text="48, on a GPU 480")
    width: int | None = argument("pixels, multiple of 16", None, default_text="48, on a GPU 832")
    solvers: tuple[str, ...] = argument("ODE solvers", ("euler", "unipc", "dpmpp"))
    num_steps: tuple[int, ...] = argument("numbers of solver steps", (8,), ge=1)
    windows: tuple[int, ...] | None = argument(
        "frames of a window, 4n+1", None, default_text="25,49, on a GPU 81,125"
    )
    precision: Literal["fp32", "bf16"] | None = argument(
        "precision", None, default_text="fp32, on a GPU bf16"
    )
    cfg: Literal["batched", "sequential"] = argument(
        "guidance branches in one batch, or one after another", "batched"
    )
    attention: str = argument(ATTENTION, "auto")
    compile: bool = argument("compile the blocks", False)
    seed: int = argument("seed of weights and inputs", 0, ge=0)
    format: Literal["table", "json"] = argument("output format", "table", section="Output")


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """Read shards in turns with plain webdataset, and with nothing but reads of the same bytes.

    One process and one thread each, as a worker has it; medians of the rounds.  Ours reads in the
    order of training and checks every byte; webdataset reads tar after tar and decodes to the same
    tensors.  `cold` is after the files left the page cache.
    """

    clips: Path | None = argument("encoded dataset", None, default_text="random clips")
    raw: Path | None = argument("raw dataset", None, default_text="drawn clips")
    gigabytes: float = argument("GB of random encoded clips", 0.5, gt=0)
    raw_clips: int = argument("number of drawn raw clips", 4, ge=1)
    frames: int = argument("frames of a drawn clip, 4n+1", 81)
    height: int = argument("pixels, multiple of 16", 480)
    width: int = argument("pixels, multiple of 16", 832)
    rounds: int = argument("runs of each", 5, ge=1)
    scratch: Path | None = argument("folder for drawn shards", None, default_text="the system's")
    format: Literal["table", "json"] = argument("output format", "table")
