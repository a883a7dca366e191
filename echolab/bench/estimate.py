"""Estimate the GPU memory of training as `echolab estimate` asks, on the meta device."""

import itertools
import json
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from echolab.bench.commands import DEMO, EstimateArguments
from echolab.config.folders import architecture_of
from echolab.encoders.demo import CAPTION_TOKENS as DEMO_TEXT_TOKENS
from echolab.encoders.demo import IMAGE_TOKENS as DEMO_IMAGE_TOKENS
from echolab.encoders.demo import CausalAutoencoder
from echolab.encoders.loading import NETWORKS as RELEASED
from echolab.encoders.loading import parameters_of as encoder_parameters
from echolab.geometry import geometry_of
from echolab.models.state_dict import released_shapes
from echolab.models.transformer import EchoTransformer
from echolab.training.adapters.lora import Lora, add_adapters
from echolab.training.engine.activation_checkpointing import KEPT, OFFLOAD, checkpoint_blocks
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
TARGETS = {"attention": ("blocks.*.self_attn", "blocks.*.cross_attn"), "all": ("blocks",)}
SIMULATED_CLIPS = (1, 4, 32)  # clips per forward that are simulated
WORLD_SIZES = (1, 2, 4, 8, 16, 32, 64)


def clip_of(arguments: EstimateArguments, clips: int) -> Clip:
    """Return the latent sizes of a micro-batch."""
    tokens = (TEXT_TOKENS, IMAGE_TOKENS)
    if arguments.model == DEMO:
        tokens = (DEMO_TEXT_TOKENS, DEMO_IMAGE_TOKENS)
    grid = geometry_of(architecture_of(arguments.model)).latent_grid(*arguments.size())
    return Clip(clips, *grid, *tokens)


class Plan(NamedTuple):
    """The arguments, with the network on the meta device."""

    arguments: EstimateArguments
    architecture: Mapping[str, Any]
    net: nn.Module


def print_estimate(arguments: EstimateArguments) -> None:
    """Print the figures, with format=json as one object."""
    # Build the network without values, with its adapters.
    architecture = architecture_of(arguments.model)
    with torch.device("meta"):
        net = EchoTransformer(**architecture)
        shapes = released_shapes(net)
        prepare(arguments, net)
    plan = Plan(arguments, architecture, net)

    # Count its parameters, and simulate a step for the activations.
    figures: dict[str, Any] = {
        "model": arguments.model,
        "parameters": sum(shape.numel() for shape in shapes.values()),
        "tensors": len(shapes),
        "trained_parameters": sum(p.numel for p in parameters_of(net) if p.trained),
    }
    step = step_of(plan, arguments.zero_stage, arguments.micro_batch)
    figures |= {
        name: getattr(arguments, name) for name in ("zero_stage", "world_size", "precision")
    }
    figures["bytes"] = bytes_of(plan, arguments.zero_stage, arguments.world_size, step)
    if step.offloaded:
        figures["host_bytes"] = step.offloaded
    figures["encoder_bytes"] = encoder_bytes(arguments.model)
    if arguments.gpu_gib is not None:
        figures["fits"] = largest_that_fit(plan, arguments.gpu_gib * GIB)
    print(json.dumps(figures)) if arguments.format == "json" else show(plan, figures)


def prepare(arguments: EstimateArguments, net: nn.Module) -> None:
    """Apply adapters and activation checkpointing as training does."""
    # Adapters freeze the base; checkpointing changes which activations are stored.
    if arguments.lora != "none":
        add_adapters(net, Lora(TARGETS[arguments.lora], arguments.lora_rank), seed=0)
    if arguments.activation_checkpointing in KEPT:
        checkpoint_blocks(net, KEPT[arguments.activation_checkpointing])


def step_of(plan: Plan, stage: int, clips: int) -> Step:
    """Simulate a forward and backward of `clips` clips, or pairs of clips for objective=dpo."""
    arguments = plan.arguments
    mixed = arguments.precision == "bf16-mixed"
    return simulate(
        plan.architecture,
        clip_of(arguments, clips * (2 if arguments.objective == "dpo" else 1)),
        weights=torch.bfloat16 if mixed and stage else torch.float32,
        autocast=mixed and not stage,
        prepare=partial(prepare, arguments),
        offload=arguments.activation_checkpointing == OFFLOAD,
        kernels=like_gpu if arguments.kernels == "gpu" else lambda net: None,
    )


def bytes_of(plan: Plan, stage: int, world: int, step: Step) -> dict[str, int]:
    """Return the bytes of a rank by kind, and in total at the peak.

    A single process holds the last step's gradients during the forward and frees them before the
    backward; DDP and DeepSpeed keep gradients in buffers.
    """
    arguments, parameters = plan.arguments, parameters_of(plan.net)
    # State is exact; the peak of the activations depends on when gradients exist.
    state = state_bytes(parameters, stage=stage, world=world, precision=arguments.precision)
    is_single = stage == 0 and world == 1
    activations = (
        max(step.forward, step.together - state.gradients) if is_single else step.activations
    )
    has_reference = arguments.objective != "sft" and arguments.lora == "none"
    sizes = encoder_bytes(arguments.model).values()
    resident = {"none": 0, "largest": max(sizes), "all": sum(sizes)}[arguments.encoders]
    kinds = {
        **state._asdict(),
        "reference": FP32 * sum(p.numel for p in parameters) if has_reference else 0,
        "activations": activations,
        "encoders": resident,
    }
    return {**kinds, "total": sum(kinds.values())}


def encoder_bytes(model: str) -> dict[str, int]:
    """Return the bytes of each encoder in bf16; training reads encoded clips and loads none."""
    # The demo has one small pixel encoder, in fp32.
    if model == DEMO:
        with torch.device("meta"):
            codec = CausalAutoencoder()
        return {"video": FP32 * sum(p.numel() for p in codec.parameters())}
    return {part: BF16 * encoder_parameters(part) for part in RELEASED}


def largest_that_fit(plan: Plan, memory: float) -> list[dict[str, int]]:
    """Return the largest micro-batch by ZeRO stage and world size, 0 if one clip does not fit."""
    rows = []
    for stages in ((0,), STAGES[1:]):
        steps = [step_of(plan, stages[0], clips) for clips in SIMULATED_CLIPS]
        for stage in stages:
            # Activations do not depend on stage and world size within a group.
            for world in WORLD_SIZES:
                totals = [bytes_of(plan, stage, world, step)["total"] for step in steps]
                row = {"zero_stage": stage, "world_size": world}
                row["micro_batch"] = _largest_fitting(totals, memory)
                rows.append(row)
    return rows


def _largest_fitting(totals: list[int], memory: float) -> int:
    """Return how many clips fit into `memory`, from the `totals` in bytes of SIMULATED_CLIPS.

    The peak is the maximum of functions that are linear in the clips, so it is convex: linear
    interpolation between simulated numbers of clips is an upper bound.
    """
    largest = 0
    # Interpolate between the micro-batches that were simulated.
    points = list(zip(SIMULATED_CLIPS, totals, strict=True))
    for (few, first), (many, last) in itertools.pairwise(points):
        if first <= memory:
            fitting = few + int((memory - first) * (many - few) // (last - first))
            largest = min(fitting, many)
    return largest


def show(plan: Plan, figures: Mapping[str, Any]) -> None:
    """Print the figures as tables."""
    arguments, console = plan.arguments, Console()
    clip = clip_of(arguments, arguments.micro_batch)
    tokens = clip.frames * (clip.height // 2) * (clip.width // 2)
    console.print(
        f"{arguments.model}: {figures['tensors']:,} tensors, {figures['parameters']:,} parameters, "
        f"{figures['trained_parameters']:,} trained; {tokens:,} tokens per clip, "
        f"ZeRO stage {arguments.zero_stage}, {arguments.world_size} ranks, {arguments.precision}"
    )
    # Bytes by kind, the encoders, and what fits.
    table = Table("on each rank", "GiB", "bytes")
    for kind, size in figures["bytes"].items():
        table.add_row(kind, f"{size / GIB:.2f}", f"{size:,}")
    console.print(table)
    if "host_bytes" in figures:
        console.print(f"activations in host memory: {figures['host_bytes'] / GIB:.2f} GiB")
    parts = ", ".join(f"{k} {v / GIB:.2f}" for k, v in figures["encoder_bytes"].items())
    console.print(f"encoders, not in memory in training: {parts} GiB")
    if arguments.gpu_gib is None:
        return
    fits = figures["bytes"]["total"] <= arguments.gpu_gib * GIB
    console.print(f"{'fits' if fits else 'does not fit'} into {arguments.gpu_gib:g} GiB")
    console.print(f"largest micro-batch, up to {SIMULATED_CLIPS[-1]}, by world size:")
    # Largest micro-batches by ZeRO stage and world size.
    table = Table("", *map(str, WORLD_SIZES))
    for stage in STAGES:
        row = [r["micro_batch"] for r in figures["fits"] if r["zero_stage"] == stage]
        table.add_row(f"ZeRO {stage}" if stage else "DDP", *map(str, row))
    console.print(table)
