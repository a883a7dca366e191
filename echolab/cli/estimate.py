"""`echolab estimate model=NAME`: GPU memory of training, before there is a GPU."""

from dataclasses import dataclass
from typing import Literal

from echolab.arguments import argument, parse


@dataclass(frozen=True)
class EstimateArguments:
    """Predict the bytes of one rank in training, by kind, and whether they fit.

    Weights, gradients, moments and EMA are exact.  Activations are those of one step, run on
    tensors without values: the peak, at the end of the forward or in the backward.  Not counted:
    the CUDA context (about 0.5 GiB), fragmentation, scratch space of kernels.
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
    activation_checkpointing: Literal["none", "full", "selective"] = argument(
        "recomputation of the blocks' activations", "none", aka=("checkpointing",)
    )

    height: int | None = argument(
        "clip height, pixels", None, section="Clip", ge=1, default_text="480, demo 64"
    )
    width: int | None = argument("clip width, pixels", None, ge=1, default_text="832, demo 64")
    frames: int | None = argument("clip frames, 4n+1", None, ge=1, default_text="81, demo 25")

    kernels: Literal["gpu", "cpu"] = argument(
        "kernels that run the step", "gpu", section="Device and output"
    )
    gpu_gib: float | None = argument(
        "memory of one GPU in GiB; also print the largest micro-batches that fit", None, gt=0,
        aka=("memory",),
    )  # fmt: skip
    format: Literal["text", "json"] = argument("output format", "text")


def main(argv: list[str]) -> int:
    """Parse the arguments, then import torch and estimate."""
    arguments = parse(EstimateArguments, argv, command="echolab estimate", positional=("model",))
    from echolab.cli.estimate_memory import estimate

    estimate(arguments)
    return 0
