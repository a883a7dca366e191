"""`echolab estimate model=NAME`: what training needs of a GPU's memory, before there is a GPU."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from echolab.arguments import parse
from echolab.config.networks import architecture_of
from echolab.encoders.demo_image import TOKENS as DEMO_IMAGE_TOKENS
from echolab.encoders.demo_text import TOKENS as DEMO_TEXT_TOKENS
from echolab.encoders.demo_vae import CausalAutoencoder
from echolab.encoders.sizes import RELEASED
from echolab.encoders.sizes import parameters_of as encoder_parameters
from echolab.errors import ConfigError
from echolab.geometry import geometry_of
from echolab.models.transformer import EchoTransformer
from echolab.models.weights import released_shapes
from echolab.training.adapters.lora import Lora, add_adapters
from echolab.training.engine.activation_checkpointing import KEPT, checkpoint_blocks
from echolab.training.engine.activation_memory import (
    IMAGE_TOKENS,
    TEXT_TOKENS,
    Clip,
    Step,
    like_gpu,
    simulate,
)
from echolab.training.engine.estimate import FP32, STAGES, parameters_of, state_bytes

GIB = 2**30
BF16 = 2
DEMO = "demo"
TARGETS = {"attention": ("blocks.*.self_attn", "blocks.*.cross_attn"), "all": ("blocks",)}
TRIED = (1, 4, 32)  # clips a forward
WORLDS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class EstimateArguments:
    """Predict the bytes of one rank in training, by kind, and whether they fit.

    Weights, gradients, moments and average are exact.  Activations are those of one step, run on
    tensors without values: the most that lives at once, at the end of the forward or on the way
    back.  Not counted: the CUDA context (about 0.5 GiB), fragmentation, scratch space of kernels.
    """

    model: str = field(metadata={"help": "a name in conf/model"})
    stage: int = field(default=0, metadata={"help": "of ZeRO; 0 is one process, or DDP"})
    world: int = field(default=1, metadata={"ge": 1, "help": "ranks"})
    precision: Literal["bf16-mixed", "32-true"] = field(
        default="bf16-mixed", metadata={"help": "of the trainer"}
    )
    micro_batch: int = field(default=1, metadata={"help": "clips a forward"})
    height: int | None = field(default=None, metadata={"help": "of a clip, in pixels; none: 480"})
    width: int | None = field(default=None, metadata={"help": "of a clip, in pixels; none: 832"})
    frames: int | None = field(default=None, metadata={"help": "of a clip, 4n + 1; none: 81"})
    checkpointing: Literal["none", "full", "selective"] = field(
        default="none", metadata={"help": "of the blocks' activations"}
    )
    kind: Literal["sft", "ndpo", "dpo"] = field(default="sft", metadata={"help": "of the epochs"})
    lora: Literal["none", "attention", "all"] = field(
        default="none", metadata={"help": "layers with adapters"}
    )
    rank: int = field(default=16, metadata={"ge": 1, "help": "of the adapters"})
    encoders: Literal["none", "largest", "all"] = field(
        default="none", metadata={"help": "that are in memory beside it; training needs none"}
    )
    kernels: Literal["gpu", "cpu"] = field(default="gpu", metadata={"help": "what runs the step"})
    memory: float | None = field(
        default=None, metadata={"gt": 0, "help": "GiB of one GPU: also say what fits into it"}
    )
    format: Literal["text", "json"] = field(default="text", metadata={"help": "of the answer"})

    def clip(self, clips: int) -> Clip:
        """The latents of a micro-batch; ConfigError for sizes that cannot be."""
        demo = self.model == DEMO
        sides = {"height": self.height or (64 if demo else 480)}
        sides["width"] = self.width or (64 if demo else 832)
        frames = self.frames or (25 if demo else 81)
        geometry = geometry_of(architecture_of(self.model))
        for name, pixels in sides.items():
            if pixels < 1 or pixels % geometry.token_pixels:
                side = geometry.token_pixels
                raise ConfigError(f"{name}={pixels}: must be a multiple of {side}")
        if not geometry.is_clip_length(frames):
            near = geometry.near_clip_length(frames)
            raise ConfigError(f"frames={frames}: must be {geometry.clip_lengths}, such as {near}")
        if clips < 1:
            raise ConfigError(f"micro_batch={clips}: must be 1 or more")
        tokens = (DEMO_TEXT_TOKENS, DEMO_IMAGE_TOKENS) if demo else (TEXT_TOKENS, IMAGE_TOKENS)
        grid = geometry.latent_grid(frames, sides["height"], sides["width"])
        return Clip(clips, *grid, *tokens)


class Plan(NamedTuple):
    """What is asked, with the network on the meta device."""

    arguments: EstimateArguments
    architecture: Mapping[str, Any]
    net: nn.Module


def main(argv: list[str]) -> int:
    arguments = parse(EstimateArguments, argv, command="echolab estimate", positional=("model",))
    architecture = architecture_of(arguments.model)
    with torch.device("meta"):
        net = EchoTransformer(**architecture)
        shapes = released_shapes(net)
        prepare(arguments, net)
    plan = Plan(arguments, architecture, net)
    figures: dict[str, Any] = {
        "model": arguments.model,
        "parameters": sum(shape.numel() for shape in shapes.values()),
        "tensors": len(shapes),
        "trained_parameters": sum(p.numel for p in parameters_of(net) if p.trained),
    }
    step = step_of(plan, arguments.stage, arguments.micro_batch)
    figures |= {name: getattr(arguments, name) for name in ("stage", "world", "precision")}
    figures["bytes"] = bytes_of(plan, arguments.stage, arguments.world, step)
    figures["encoder_bytes"] = encoder_bytes(arguments.model)
    if arguments.memory is not None:
        figures["fits"] = largest_that_fit(plan, arguments.memory * GIB)
    print(json.dumps(figures)) if arguments.format == "json" else show(plan, figures)
    return 0


def prepare(arguments: EstimateArguments, net: nn.Module) -> None:
    """Adapters and checkpointing, as training applies them."""
    if arguments.lora != "none":
        add_adapters(net, Lora(TARGETS[arguments.lora], arguments.rank), seed=0)
    if arguments.checkpointing != "none":
        checkpoint_blocks(net, KEPT[arguments.checkpointing])


def step_of(plan: Plan, stage: int, clips: int) -> Step:
    """Activations of a forward and backward of so many clips; of pairs there are twice as many."""
    arguments = plan.arguments
    mixed = arguments.precision == "bf16-mixed"
    return simulate(
        plan.architecture,
        arguments.clip(clips * (2 if arguments.kind == "dpo" else 1)),
        weights=torch.bfloat16 if mixed and stage else torch.float32,
        autocast=mixed and not stage,
        prepare=partial(prepare, arguments),
        kernels=like_gpu if arguments.kernels == "gpu" else lambda net: None,
    )


def bytes_of(plan: Plan, stage: int, world: int, step: Step) -> dict[str, int]:
    """By kind, and in all at the worst moment.

    One process still holds the last step's gradients in the forward, and frees them before the
    backward; DDP's and DeepSpeed's are in buffers that stay.
    """
    arguments, parameters = plan.arguments, parameters_of(plan.net)
    state = state_bytes(parameters, stage=stage, world=world, precision=arguments.precision)
    alone = stage == 0 and world == 1
    activations = max(step.forward, step.together - state.gradients) if alone else step.activations
    copied = arguments.kind != "sft" and arguments.lora == "none"
    sizes = encoder_bytes(arguments.model).values()
    resident = {"none": 0, "largest": max(sizes), "all": sum(sizes)}[arguments.encoders]
    kinds = {
        **state._asdict(),
        "reference": FP32 * sum(p.numel for p in parameters) if copied else 0,
        "activations": activations,
        "encoders": resident,
    }
    return {**kinds, "total": sum(kinds.values())}


def encoder_bytes(model: str) -> dict[str, int]:
    """Of each encoder in bf16; they are not in memory in training, which reads encoded clips."""
    if model == DEMO:
        with torch.device("meta"):
            codec = CausalAutoencoder()
        return {"video": FP32 * sum(p.numel() for p in codec.parameters())}
    return {part: BF16 * encoder_parameters(part) for part in RELEASED}


def largest_that_fit(plan: Plan, memory: float) -> list[dict[str, int]]:
    """The largest micro-batch of each ZeRO stage and world; 0 where one clip does not fit."""
    rows = []
    for stages in ((0,), STAGES[1:]):
        steps = [step_of(plan, stages[0], clips) for clips in TRIED]
        for stage in stages:
            for world in WORLDS:
                totals = [bytes_of(plan, stage, world, step)["total"] for step in steps]
                row = {"stage": stage, "world": world, "micro_batch": _largest(totals, memory)}
                rows.append(row)
    return rows


def _largest(totals: list[int], memory: float) -> int:
    """Clips that fit, up to the last of TRIED, from the bytes of each of TRIED.

    A peak is the largest of several that grow evenly: between two tries it lies below their chord.
    """
    largest = 0
    tries = list(zip(TRIED, totals, strict=True))
    for (few, first), (many, last) in itertools.pairwise(tries):
        if first <= memory:
            fitting = few + int((memory - first) * (many - few) // (last - first))
            largest = min(fitting, many)
    return largest


def show(plan: Plan, figures: Mapping[str, Any]) -> None:
    """The figures for people."""
    arguments, console = plan.arguments, Console()
    clip = arguments.clip(arguments.micro_batch)
    tokens = clip.frames * (clip.height // 2) * (clip.width // 2)
    console.print(
        f"{arguments.model}: {figures['tensors']:,} tensors, {figures['parameters']:,} parameters, "
        f"{figures['trained_parameters']:,} trained; {tokens:,} tokens a clip, "
        f"stage {arguments.stage}, {arguments.world} ranks, {arguments.precision}"
    )
    table = Table("on each rank", "GiB", "bytes")
    for kind, size in figures["bytes"].items():
        table.add_row(kind, f"{size / GIB:.2f}", f"{size:,}")
    console.print(table)
    parts = ", ".join(f"{k} {v / GIB:.2f}" for k, v in figures["encoder_bytes"].items())
    console.print(f"encoders, not in memory in training: {parts} GiB")
    if arguments.memory is None:
        return
    fits = figures["bytes"]["total"] <= arguments.memory * GIB
    console.print(f"{'fits' if fits else 'does not fit'} into {arguments.memory:g} GiB")
    console.print(f"largest micro-batch, up to {TRIED[-1]}, by ranks:")
    table = Table("", *map(str, WORLDS))
    for stage in STAGES:
        row = [r["micro_batch"] for r in figures["fits"] if r["stage"] == stage]
        table.add_row(f"ZeRO {stage}" if stage else "DDP", *map(str, row))
    console.print(table)
