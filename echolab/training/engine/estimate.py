"""The bytes that training holds on one rank between steps, and whether its machine has them.

Under one process and DDP all is fp32.  DeepSpeed keeps the weights in the dtype that it computes
in, cuts fp32 masters and moments into partitions, and pads groups so that they divide: ZeRO 1 and 2
pad a complete group to a multiple of 2 x world, ZeRO 3 every parameter to a multiple of world.  All
ranks hold the same number of bytes.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from echolab.errors import ConfigError
from echolab.training.engine.machine import Machine

FP32 = 4
GIB = 2**30
# Share of memory that state may take: activations, a CUDA context and the program come on top.
USABLE = 0.95
STAGES = (0, 1, 2, 3)
PRECISIONS = {"32-true": 4, "bf16-mixed": 2}  # bytes of a weight that DeepSpeed computes with
# Lightning's settings of DeepSpeed: elements of a bucket, of which ZeRO 1 and 2 have two, since
# communication overlaps; and the size up to which ZeRO 3 does not partition a parameter.
BUCKET = 200_000_000
PERSISTENT = 100_000


class Parameter(NamedTuple):
    """What a parameter's bytes depend on."""

    numel: int
    dimensions: int
    trained: bool


class State(NamedTuple):
    """Bytes on each rank."""

    weights: int
    gradients: int
    optimizer: int  # DeepSpeed's fp32 masters, both moments, step counts
    ema: int
    buffers: int  # of DeepSpeed's communication, during the backward


def parameters_of(net: nn.Module) -> list[Parameter]:
    """Return the parameters of a network on any device, meta too."""
    return [Parameter(p.numel(), p.ndim, p.requires_grad) for p in net.parameters()]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _optimizer_groups(trained: Sequence[Parameter]) -> list[list[Parameter]]:
    """Group as `DiffusionModule.configure_optimizers` does: matrices, and what is not decayed."""
    groups = [p for p in trained if p.dimensions >= 2], [p for p in trained if p.dimensions < 2]
    return [group for group in groups if group]


def state_bytes(
    parameters: Sequence[Parameter], *, stage: int, world: int, precision: str
) -> State:
    """Return a rank's bytes at a ZeRO stage (0: one process or DDP); raise ConfigError."""
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
    cut = _sharded if stage == 3 else _partitioned
    return cut(trained, frozen, stage, world, PRECISIONS[precision])


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
    own = padded // world
    return State(
        weights=size * (padded + sum(p.numel for p in frozen)),
        gradients=size * (sum(p.numel for p in trained) if stage == 1 else own),
        optimizer=3 * FP32 * own + FP32 * len(groups),
        ema=FP32 * own,
        buffers=2 * BUCKET * size,
    )


def _sharded(
    trained: Sequence[Parameter], frozen: Sequence[Parameter], stage: int, world: int, size: int
) -> State:
    del stage
    own = sum(_round_up(p.numel, world) // world for p in trained)
    rest = sum(_round_up(p.numel, world) // world for p in frozen)
    kept = sum(p.numel for p in [*trained, *frozen] if p.numel <= PERSISTENT)
    return State(
        weights=size * (own + rest + kept),
        gradients=size * own,
        optimizer=3 * FP32 * own
        + FP32 * len(_optimizer_groups(trained)),  # masters also where all is fp32
        ema=FP32 * own,
        buffers=BUCKET * size,
    )


class Needed(NamedTuple):
    """Bytes that a run certainly holds: a lower bound, without activations."""

    gpu: int  # of each GPU; 0 on the CPU
    host: int  # of each node, by all its ranks


def bytes_needed(
    parameters: Sequence[Parameter], machine: Machine, *, averages: int = 1, reference: bool = False
) -> Needed:
    """Return the bytes of the state of a run, on each GPU and on each node.

    `averages` is the number of EMAs; `reference` says if a rank also holds a frozen copy of the
    network, in fp32.  On a node, every rank's saves have a buffer for its share of a checkpoint.
    """
    stage = int(machine.strategy[-1]) if machine.sharded else 0
    state = state_bytes(parameters, stage=stage, world=machine.world, precision=machine.precision)
    # Bytes of the full network and of its trained part, in fp32.
    everything = FP32 * sum(p.numel for p in parameters)
    trained = FP32 * sum(p.numel for p in parameters if p.trained)
    resident = state.weights + state.gradients + state.ema * averages + reference * everything
    saved = trained * (3 + averages) // machine.world
    offloaded = state.optimizer if machine.offload == "optimizer" else 0
    # On the CPU all state of all ranks lies in the memory of the node.
    if machine.device == "cpu":
        return Needed(0, machine.devices * (resident + state.optimizer + saved))
    # Masters start from the fp32 weights, which are in memory with the rounded ones until then.
    start = everything + (state.weights + state.optimizer // 3 if machine.sharded else 0)
    steady = resident + state.optimizer - offloaded + state.buffers
    return Needed(max(start, steady), machine.devices * (offloaded + saved))


def check_memory(needed: Needed, *, gpu: int | None, host: int | None) -> None:
    """Raise ConfigError if a run cannot fit into a GPU of `gpu` bytes and a node of `host` bytes.

    These are sizes, not what happens to be free: a run is refused only if it can never fit, that
    is, if its state alone takes more than USABLE of either.  None is unknown, and not checked.
    """
    remedies = {
        "a GPU": "take trainer.strategy=zero2 or zero3 on more GPUs, trainer.offload=optimizer, "
        "lora=attention or a smaller model",
        "this node": "take fewer trainer.devices, trainer.offload=none, lora=attention or a "
        "smaller model",
    }
    # Sizes that are unknown are not compared.
    for place, bytes_, size in (("a GPU", needed.gpu, gpu), ("this node", needed.host, host)):
        if size is not None and bytes_ > USABLE * size:
            raise ConfigError(
                f"memory: weights, gradients, optimizer, averages and buffers need "
                f"{bytes_ / GIB:.1f} GiB, {place} has {size / GIB:.1f} GiB, of which "
                f"{USABLE:.0%} may be used; {remedies[place]}"
            )
