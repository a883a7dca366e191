"""Estimate the memory of training state on one rank, and check that the machine has enough memory.

With a single process and DDP, all state is fp32.  DeepSpeed holds the weights in the compute dtype,
partitions fp32 masters and moments, and pads them to be divisible: ZeRO 1 and 2 pad each parameter
group to a multiple of 2 x world, ZeRO 3 each parameter to a multiple of world.  All ranks hold the
same number of bytes.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from echolab.errors import ConfigError
from echolab.training.engine.machine import Machine

FP32 = 4
GIB = 2**30
# Share of memory that state may use; activations, CUDA context and program need the rest.
USABLE = 0.95
STAGES = (0, 1, 2, 3)
PRECISIONS = {"32-true": 4, "bf16-mixed": 2}  # bytes per weight in DeepSpeed's compute dtype
# Lightning's defaults for DeepSpeed: elements of a communication bucket, of which ZeRO 1 and 2
# have two, to overlap communication; and the largest parameter that ZeRO 3 does not partition.
BUCKET = 200_000_000
PERSISTENT = 100_000


class Parameter(NamedTuple):
    """The properties of a parameter that determine its memory."""

    numel: int
    dimensions: int
    trained: bool


class State(NamedTuple):
    """Memory in bytes on each rank."""

    weights: int
    gradients: int
    optimizer: int  # DeepSpeed's fp32 masters, both moments, step counts
    ema: int  # a single average
    buffers: int  # DeepSpeed's communication buffers in the backward pass


def parameters_of(net: nn.Module) -> list[Parameter]:
    """Return the parameters of a network on any device, including meta."""
    return [Parameter(p.numel(), p.ndim, p.requires_grad) for p in net.parameters()]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _optimizer_groups(trained: Sequence[Parameter]) -> list[list[Parameter]]:
    """Group as in `DiffusionModule.configure_optimizers`: with and without weight decay."""
    groups = [p for p in trained if p.dimensions >= 2], [p for p in trained if p.dimensions < 2]
    return [group for group in groups if group]


def state_bytes(
    parameters: Sequence[Parameter], *, stage: int, world: int, precision: str
) -> State:
    """Return a rank's memory at a ZeRO stage (0: no ZeRO); raise ConfigError for bad arguments."""
    if stage not in STAGES:
        raise ConfigError(f"stage={stage}: unknown; one of 0 (no ZeRO), 1, 2, 3")
    if world < 1:
        raise ConfigError(f"world={world}: must be 1 or more")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision}: unknown; one of {', '.join(PRECISIONS)}")
    trained = [p for p in parameters if p.trained]
    frozen = [p for p in parameters if not p.trained]
    if not trained:
        raise ConfigError("no parameter of the network is trained")
    if stage == 0:
        return _unsharded(trained, frozen)
    estimate = _sharded if stage == 3 else _partitioned
    return estimate(trained, frozen, stage, world, PRECISIONS[precision])


def _unsharded(trained: Sequence[Parameter], frozen: Sequence[Parameter]) -> State:
    count = sum(p.numel for p in trained)
    return State(
        weights=FP32 * (count + sum(p.numel for p in frozen)),
        gradients=FP32 * count,
        optimizer=2 * FP32 * count + FP32 * len(trained),
        ema=FP32 * count,
        buffers=0,
    )


def _partitioned(
    trained: Sequence[Parameter], frozen: Sequence[Parameter], stage: int, world: int, size: int
) -> State:
    groups = _optimizer_groups(trained)
    padded = sum(_round_up(sum(p.numel for p in group), 2 * world) for group in groups)
    per_rank = padded // world
    return State(
        weights=size * (padded + sum(p.numel for p in frozen)),
        gradients=size * (sum(p.numel for p in trained) if stage == 1 else per_rank),
        optimizer=3 * FP32 * per_rank + FP32 * len(groups),
        ema=FP32 * per_rank,
        buffers=2 * BUCKET * size,
    )


def _sharded(
    trained: Sequence[Parameter], frozen: Sequence[Parameter], stage: int, world: int, size: int
) -> State:
    del stage
    trained_numel = sum(_round_up(p.numel, world) // world for p in trained)
    frozen_numel = sum(_round_up(p.numel, world) // world for p in frozen)
    persistent_numel = sum(p.numel for p in [*trained, *frozen] if p.numel <= PERSISTENT)
    return State(
        weights=size * (trained_numel + frozen_numel + persistent_numel),
        gradients=size * trained_numel,
        optimizer=3 * FP32 * trained_numel
        + FP32 * len(_optimizer_groups(trained)),  # masters also where all is fp32
        ema=FP32 * trained_numel,
        buffers=BUCKET * size,
    )


class Needed(NamedTuple):
    """Lower bound on the memory of a run in bytes, without activations."""

    gpu: int  # on each GPU; 0 on the CPU
    host: int  # on each node, for all its ranks


def bytes_needed(
    parameters: Sequence[Parameter], machine: Machine, *, averages: int = 1, reference: bool = False
) -> Needed:
    """Return the memory of the state of a run, on each GPU and on each node.

    `averages` is the number of EMAs; with `reference`, a rank also holds a frozen fp32 copy of the
    network.  Every rank has a host buffer for its share of a checkpoint.
    """
    stage = int(machine.strategy[-1]) if machine.sharded else 0
    state = state_bytes(parameters, stage=stage, world=machine.world, precision=machine.precision)
    # Bytes of the full network and of its trained part, in fp32.
    everything = FP32 * sum(p.numel for p in parameters)
    trained = FP32 * sum(p.numel for p in parameters if p.trained)
    resident = state.weights + state.gradients + state.ema * averages + reference * everything
    saved = trained * (3 + averages) // machine.world
    offloaded = state.optimizer if machine.offload == "optimizer" else 0
    # On the CPU, the state of all ranks is in the host memory of the node.
    if machine.device == "cpu":
        return Needed(0, machine.devices * (resident + state.optimizer + saved))
    # At the start, the fp32 weights coexist with the rounded weights and the masters.
    start = everything + (state.weights + state.optimizer // 3 if machine.sharded else 0)
    steady = resident + state.optimizer - offloaded + state.buffers
    return Needed(max(start, steady), machine.devices * (offloaded + saved))


def check_memory(needed: Needed, *, gpu: int | None, host: int | None) -> None:
    """Raise ConfigError if a run cannot fit into a GPU of `gpu` bytes and a node of `host` bytes.

    The arguments are total sizes, not free memory: a run is refused only if it can never fit, since
    its state alone needs more than the share USABLE of either.  None means unknown: not checked.
    """
    remedies = {
        "a GPU": "use trainer.strategy=zero2 or zero3 on more GPUs, trainer.offload=optimizer, "
        "lora=attention or a smaller model",
        "this node": "use fewer trainer.devices, trainer.offload=none, lora=attention or a "
        "smaller model",
    }
    # Skip unknown sizes.
    for location, bytes_, size in (("a GPU", needed.gpu, gpu), ("this node", needed.host, host)):
        if size is not None and bytes_ > USABLE * size:
            raise ConfigError(
                f"memory: weights, gradients, optimizer, averages and buffers need "
                f"{bytes_ / GIB:.1f} GiB, {location} has {size / GIB:.1f} GiB, of which "
                f"{USABLE:.0%} may be used; {remedies[location]}"
            )
