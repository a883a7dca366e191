"""The bytes that training holds on one rank between steps, without building anything.

Under one process and DDP all is fp32.  DeepSpeed keeps the weights in the type that it computes in,
cuts fp32 masters and moments into partitions, and fills groups up so that they divide: ZeRO 1 and 2
a whole group to a multiple of 2 x world, ZeRO 3 every parameter to a multiple of world.  All ranks
hold the same number of bytes.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from echolab.errors import ConfigError

FP32 = 4
STAGES = (0, 1, 2, 3)
PRECISIONS = {"32-true": 4, "bf16-mixed": 2}  # bytes of a weight that DeepSpeed computes with
# Lightning's settings of DeepSpeed: elements of a bucket, of which ZeRO 1 and 2 have two, since
# communication overlaps; and the size up to which ZeRO 3 keeps a parameter whole on every rank.
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
    """Of a network on any device, meta too."""
    return [Parameter(p.numel(), p.ndim, p.requires_grad) for p in net.parameters()]


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _groups(trained: Sequence[Parameter]) -> list[list[Parameter]]:
    """As `DiffusionModule.configure_optimizers` makes them: matrices, and what is not decayed."""
    groups = [p for p in trained if p.dimensions >= 2], [p for p in trained if p.dimensions < 2]
    return [group for group in groups if group]


def state_bytes(
    parameters: Sequence[Parameter], *, stage: int, world: int, precision: str
) -> State:
    """Of ZeRO's stage (0 is one process or DDP); raises ConfigError for what cannot be."""
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
        return _whole(trained, frozen)
    cut = _sharded if stage == 3 else _partitioned
    return cut(trained, frozen, stage, world, PRECISIONS[precision])


def _whole(trained: Sequence[Parameter], frozen: Sequence[Parameter]) -> State:
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
    groups = _groups(trained)
    padded = sum(_up(sum(p.numel for p in group), 2 * world) for group in groups)
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
    own = sum(_up(p.numel, world) // world for p in trained)
    rest = sum(_up(p.numel, world) // world for p in frozen)
    kept = sum(p.numel for p in [*trained, *frozen] if p.numel <= PERSISTENT)
    return State(
        weights=size * (own + rest + kept),
        gradients=size * own,
        optimizer=3 * FP32 * own + FP32 * len(_groups(trained)),  # masters also where all is fp32
        ema=FP32 * own,
        buffers=BUCKET * size,
    )
