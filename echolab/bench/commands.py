"""The commands `echolab bench ACTION` and `echolab estimate`: their arguments and entry points.

This module imports nothing heavy, so that a wrong argument is refused at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from echolab.arguments import Action, argument, parse, run_action
from echolab.config.folders import architecture_of
from echolab.errors import ConfigError
from echolab.geometry import WAN, geometry_of

if TYPE_CHECKING:
    from echolab.bench.measure import Row

Attention = Literal["auto", "sdpa", "cudnn", "flash2", "flash3"]
Precision = Literal["fp32", "bf16"]
DEMO = "demo"
# Default (frames, height, width) of the measured clip, by device.
STEP_SIZES = {"cpu": (25, 192, 256), "cuda": (81, 480, 832)}
GENERATE_SIZES = {"cpu": (49, 48, 48), "cuda": (125, 480, 832)}


def size_of(
    given: tuple[int | None, int | None, int | None], usual: tuple[int, int, int], model: str
) -> tuple[int, int, int]:
    """Return (frames, height, width), with the defaults `usual` for values that are None.

    Raise ConfigError for a model that is not in conf/model, or a size that the model cannot use.
    """
    frames, height, width = (u if g is None else g for g, u in zip(given, usual, strict=True))
    # Sides must be multiples of a token's side, and lengths 4n + 1.
    geometry = WAN if model == "small" else geometry_of(architecture_of(model))
    if not geometry.is_clip_length(frames):
        near = geometry.near_clip_length(frames)
        raise ConfigError(f"frames={frames}: must be {geometry.clip_lengths}, such as {near}")
    for name, pixels in (("height", height), ("width", width)):
        if pixels < 1 or pixels % geometry.token_pixels:
            side = geometry.token_pixels
            raise ConfigError(f"{name}={pixels}: must be a multiple of {side} pixels")
    return frames, height, width


def check_device(device: str) -> None:
    """Raise ConfigError if a GPU is requested and this machine has none."""
    from echolab.config.paths import has_gpu

    if device == "cuda" and not has_gpu():
        raise ConfigError("device=cuda: no GPU here; use device=cpu")


@dataclass(frozen=True, kw_only=True)
class StepArguments:
    """Measure forward and backward of the network against diffusers' WanTransformer3DModel.

    Both have the same weights and inputs, with image and without audio, and run alternately; times
    are medians.  Peak memory is the most that torch's allocator held in a step, above what it held
    before the step (activations and gradients, not weights).  bf16 is autocast over fp32 weights.
    With engine=true, in the first precision: an update of the average compared with a step, and a
    run of `echolab train` compared with a bare loop of the same steps.
    """

    model: str = argument("`small`, or a name of conf/model", "small", section="What is measured")
    device: Literal["cpu", "cuda"] = argument("device", "cpu")
    frames: int | None = argument(
        "video frames, 4n+1", None, default_text="25, on a GPU 81", aka=("num_frames",)
    )
    # Sizes of the clip that is measured.
    height: int | None = argument("pixels, multiple of 16", None, default_text="192, on a GPU 480")
    width: int | None = argument("pixels, multiple of 16", None, default_text="256, on a GPU 832")
    precision: tuple[Precision, ...] | None = argument(
        "one or both", None, default_text="both, on a GPU bf16"
    )
    activation_checkpointing: Literal["none", "full", "selective", "offload"] | None = argument(
        "activations to recompute or offload; diffusers has full only", None,
        default_text="none, on a GPU selective",
    )  # fmt: skip
    attention: Attention = argument("attention kernel", "auto")
    compile: bool = argument("compile the blocks of both", False)
    variants: bool = argument("also audio, checkpointing, compile and each kernel", True)
    engine: bool = argument("measure the engine instead of the network", False)
    seed: int = argument("seed of weights and inputs", 0, ge=0)
    pairs: int = argument("measured runs of each network", 7, ge=1, section="How")
    # How it is measured.
    scratch: Path | None = argument("folder for runs", None, default_text="the system's")
    peak_tflops: float | None = argument(
        "bf16 TFLOP/s of the GPU, for MFU", None, gt=0, default_text="value of its data sheet"
    )
    format: Literal["table", "json"] = argument("output format", "table")

    def check(self) -> None:
        """Raise ConfigError for a model, size or device that cannot be measured."""
        # Checked before torch is imported.
        check_device(self.device)
        self.size()

    def size(self) -> tuple[int, int, int]:
        """Return (frames, height, width) of the clip."""
        given = (self.frames, self.height, self.width)
        return size_of(given, STEP_SIZES[self.device], self.model)


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Denoise a video with random weights, once for each solver, number of steps and window.

    Encoders and the decoder are not measured.  The ratio of a row is the time of the generation
    divided by the length of the video.
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
    # What varies.
    solvers: tuple[Literal["euler", "unipc", "dpmpp"], ...] = argument(
        "ODE solvers", ("euler", "unipc", "dpmpp")
    )
    num_steps: tuple[int, ...] = argument("numbers of solver steps", (8,), ge=1)
    windows: tuple[int, ...] | None = argument(
        "frames of a window, 4n+1", None, default_text="25,49, on a GPU 81,125"
    )
    precision: Precision | None = argument("precision", None, default_text="fp32, on a GPU bf16")
    cfg: Literal["batched", "sequential"] = argument(
        "guidance branches in one batch, or one after another", "batched"
    )
    attention: Attention = argument("attention kernel", "auto")
    compile: bool = argument("compile the blocks", False)
    seed: int = argument("seed of weights and inputs", 0, ge=0)
    format: Literal["table", "json"] = argument("output format", "table", section="Output")

    def check(self) -> None:
        """Raise ConfigError for a model, size or device that cannot be measured."""
        check_device(self.device)
        self.size()

    @property
    def model_name(self) -> str:
        """The network that is measured."""
        return self.model or ("demo" if self.device == "cpu" else "echomimicv3_preview")

    def size(self) -> tuple[int, int, int]:
        """Return (frames, height, width) of the video."""
        given = (self.frames, self.height, self.width)
        return size_of(given, GENERATE_SIZES[self.device], self.model_name)


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """Measure reading of shards against plain webdataset and against reading the bytes alone.

    Each reader has one process and one thread, like a worker; the readers alternate, and times are
    medians of the rounds.  echolab reads in the order of training and checks every byte; webdataset
    reads tar after tar and decodes to the same tensors.  `cold` is without the page cache.
    """

    clips: Path | None = argument("encoded dataset", None, default_text="random clips")
    raw: Path | None = argument("raw dataset", None, default_text="drawn clips")
    gigabytes: float = argument("GB of random encoded clips", 0.5, gt=0)
    raw_clips: int = argument("number of drawn raw clips", 4, ge=1)
    frames: int = argument("frames of a drawn clip, 4n+1", 81)
    height: int = argument("pixels, multiple of 16", 480)
    width: int = argument("pixels, multiple of 16", 832)
    rounds: int = argument("measured runs of each reader", 5, ge=1)
    scratch: Path | None = argument("folder for drawn shards", None, default_text="the system's")
    format: Literal["table", "json"] = argument("output format", "table")

    def check(self) -> None:
        """Raise EcholabError for a dataset that does not exist, or an impossible size."""
        from echolab.config.paths import check_dataset_head

        for key, kind in (("clips", "encoded"), ("raw", "raw")):
            if folder := getattr(self, key):
                check_dataset_head(key, folder, kind)
        self.size()

    def size(self) -> tuple[int, int, int]:
        """Return (frames, height, width) of a drawn clip."""
        given = (self.frames, self.height, self.width)
        return size_of(given, given, DEMO)


@dataclass(frozen=True, kw_only=True)
class MetricsArguments:
    """Measure scores of one clip against their plain implementations.

    Both have the same weights and inputs and run alternately; times are medians.  Detection of
    faces, which both need, is not measured.

    sync: SyncNet on face crops, once over the frames, against the published loop over windows of 5
    frames and 20 cepstra in batches of 20.
    """

    scores: tuple[Literal["sync"], ...] = argument("scores to measure", ("sync",))
    device: Literal["cpu", "cuda"] = argument("device", "cpu")
    frames: int = argument("frames of the clip at 25 fps", 81, ge=21)
    seed: int = argument("seed of weights and inputs", 0, ge=0)
    pairs: int = argument("measured runs of each", 3, ge=1)
    format: Literal["table", "json"] = argument("output format", "table")

    def check(self) -> None:
        """Raise ConfigError for a device that does not exist."""
        check_device(self.device)


@dataclass(frozen=True)
class EstimateArguments:
    """Predict the GPU memory of one rank in training, by kind, and whether it fits.

    Weights, gradients, moments and EMA are exact.  The peak of the activations, at the end of the
    forward or in the backward, is measured in one step on meta tensors.  Not counted: the CUDA
    context (about 0.5 GiB), fragmentation, scratch space of kernels.
    """

    model: str = argument("network, a name in conf/model", section="Model")
    lora: Literal["none", "attention", "all"] = argument("layers with LoRA adapters", "none")
    lora_rank: int = argument("rank of the adapters", 16, ge=1, aka=("rank",))
    encoders: Literal["none", "largest", "all"] = argument(
        "encoders in memory at the same time; training needs none", "none"
    )

    objective: Literal["sft", "ndpo", "dpo"] = argument(
        "training objective", "sft", section="Training", aka=("kind",)
    )
    zero_stage: Literal[0, 1, 2, 3] = argument(
        "ZeRO stage, 0 for one process or DDP", 0, aka=("stage", "zero")
    )
    world_size: int = argument("ranks", 1, ge=1, aka=("world", "ranks"))
    precision: Literal["bf16-mixed", "32-true"] = argument("trainer precision", "bf16-mixed")
    micro_batch: int = argument("clips per forward", 1, ge=1, aka=("micro_batch_size",))
    activation_checkpointing: Literal["none", "full", "selective", "offload"] = argument(
        "recomputation or offload of the blocks' activations", "none", aka=("checkpointing",)
    )

    height: int | None = argument(
        "clip height, pixels", None, section="Clip", ge=1, default_text="480, demo 64"
    )
    width: int | None = argument("clip width, pixels", None, ge=1, default_text="832, demo 64")
    frames: int | None = argument("clip frames, 4n+1", None, ge=1, default_text="81, demo 25")

    kernels: Literal["gpu", "cpu"] = argument(
        "kernels that run the step", "gpu", section="Device and output"
    )
    # If given, the largest micro-batches that fit into this memory are searched.
    gpu_gib: float | None = argument(
        "memory of one GPU in GiB; also print the largest micro-batches that fit", None, gt=0,
        aka=("memory",),
    )  # fmt: skip
    format: Literal["text", "json"] = argument("output format", "text")

    def size(self) -> tuple[int, int, int]:
        """Return (frames, height, width) of a clip; raise ConfigError for an impossible one."""
        usual = (25, 64, 64) if self.model == DEMO else (81, 480, 832)
        return size_of((self.frames, self.height, self.width), usual, self.model)


# -- entry points --------------------------------------------------------------------------------

# Actions of `echolab bench`.
ACTIONS = {
    "step": Action(
        "echolab.bench.commands:step", "a training step, compared with diffusers' network"
    ),
    "generate": Action("echolab.bench.commands:generate", "a video by solver, steps and window"),
    "data": Action(
        "echolab.bench.commands:data", "reading shards, compared with plain webdataset and the disk"
    ),
    "metrics": Action(
        "echolab.bench.commands:metrics", "scores of clips, compared with plain implementations"
    ),
}


def main(argv: list[str]) -> int:
    """Run one benchmark.

    With format=json it prints a list of rows, each with name, value, unit, baseline, baseline_value
    and ratio = value / baseline_value.
    """
    return run_action(argv, ACTIONS, command="echolab bench")


def step(argv: list[str]) -> None:
    """Measure a training step and print the rows."""
    # Parse and check, then import torch and measure.
    arguments = parse(StepArguments, argv, command="echolab bench step")
    arguments.check()
    from echolab.bench.step import rows_of

    _print_rows(rows_of(arguments), arguments.format)


def generate(argv: list[str]) -> None:
    """Measure the generation of videos and print the rows."""
    # Parse and check, then import torch and measure.
    arguments = parse(GenerateArguments, argv, command="echolab bench generate")
    arguments.check()
    from echolab.bench.generate import rows_of

    _print_rows(rows_of(arguments), arguments.format)


def data(argv: list[str]) -> None:
    """Measure reading and print the rows."""
    # Parse and check, then import torch and measure.
    arguments = parse(DataArguments, argv, command="echolab bench data")
    arguments.check()
    from echolab.bench.data import rows_of

    _print_rows(rows_of(arguments), arguments.format)


def metrics(argv: list[str]) -> None:
    """Measure scores and print the rows."""
    # Parse and check, then import torch and measure.
    arguments = parse(MetricsArguments, argv, command="echolab bench metrics")
    arguments.check()
    from echolab.bench.metrics import rows_of

    _print_rows(rows_of(arguments), arguments.format)


def _print_rows(rows: "Sequence[Row]", style: str) -> None:
    from echolab.bench.measure import as_json, as_table

    print(as_json(rows) if style == "json" else as_table(rows))


def estimate(argv: list[str]) -> int:
    """Estimate the GPU memory of training, before there is a GPU."""
    # Parse and check, then import torch and estimate.
    arguments = parse(EstimateArguments, argv, command="echolab estimate", positional=("model",))
    arguments.size()
    from echolab.bench.estimate import print_estimate

    print_estimate(arguments)
    return 0
