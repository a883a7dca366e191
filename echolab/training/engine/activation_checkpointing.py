"""Activation checkpointing, offload and compilation: less memory or time for the same numbers.

Both change how the blocks of a network are run, and neither the names nor the values of its
parameters.  Apply `checkpoint_blocks` first, so that the checkpointed block is what is compiled.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    _CachedTorchDispatchMode,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from echolab.errors import ConfigError
from echolab.models.attention import attention_from, use_attention

# Operators by parts of their names: torch's kernels, and those of the FlashAttention packages.
ATTENTION = ("_scaled_dot_product", "flash_attn")
KEPT: dict[str, tuple[str, ...]] = {"full": (), "selective": ATTENTION}
OFFLOAD = "offload"  # nothing is recomputed: activations wait in host memory


def speed_up(
    net: nn.Module, *, device: str, attention: str, checkpointing: str, compiled: bool
) -> None:
    """Apply conf/trainer's attention, checkpointing and compilation; raise ConfigError."""
    if checkpointing not in ("none", *KEPT, OFFLOAD):
        known = ", ".join(("none", *KEPT, OFFLOAD))
        raise ConfigError(
            f"trainer.activation_checkpointing={checkpointing}: unknown; one of {known}"
        )
    # Attention first: checkpointing names the operators that it calls.
    use_attention(net, attention_from(attention, device))
    if checkpointing in KEPT:
        checkpoint_blocks(net, KEPT[checkpointing])
    if compiled:
        compile_blocks(net, device)


@cache
def _is_kept(operator: Any, keep: tuple[str, ...]) -> bool:
    """Return whether an operator's output is kept.  Asked of every operator of every block."""
    return any(part in str(operator) for part in keep)


def _checkpoint_policy(
    keep: tuple[str, ...], _: Any, operator: Any, *args: Any, **kwargs: Any
) -> Any:
    kept = _is_kept(operator, keep)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class Recomputing(_CachedTorchDispatchMode):
    """Return the kept outputs again and recompute every other operator.

    torch's own mode wants the operators of the forward pass, one by one.  Under ZeRO 3 they differ:
    hooks within the block gather weights that are not there at that moment.
    """

    def __init__(self, keep: tuple[str, ...], storage: Any) -> None:
        super().__init__(partial(_checkpoint_policy, keep), storage, False)
        self.keep = keep

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return what `func` returns, or returned before."""
        # Kept outputs come from the cache of torch; everything else is computed again.
        if _is_kept(func, self.keep):
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def _checkpointed_forward(keep: tuple[str, ...]) -> Callable[..., Tensor]:
    """Return a block's `forward`.  Plain functions: Dynamo does not look into a partial."""

    def contexts() -> Any:
        keeping, cached = create_selective_checkpoint_contexts(partial(_checkpoint_policy, keep))
        return keeping, Recomputing(keep, cached.storage)

    def kept(block: nn.Module, *given: Any) -> Any:
        forward = type(block).forward
        return checkpoint(forward, block, *given, use_reentrant=False, context_fn=contexts)

    def recomputed(block: nn.Module, *given: Any) -> Any:
        return checkpoint(type(block).forward, block, *given, use_reentrant=False)

    return kept if keep else recomputed


def checkpoint_blocks(net: nn.Module, keep: Sequence[str] = (), every: int = 1) -> None:
    """Let each `every`-th block keep only its input, and run again in the backward pass.

    The outputs of operators whose names contain a part in `keep` are kept too: with `ATTENTION`,
    everything is recomputed except attention, which at long sequences is most of the time and
    little of the memory.  Gradients are the same bit for bit if the kernels are deterministic.
    """
    for block in list(net.blocks)[::every]:  # type: ignore[arg-type]
        # A method of the block, so that a copy of it runs the copy.
        block.forward = MethodType(_checkpointed_forward(tuple(keep)), block)


def offload_activations(net: nn.Module) -> AbstractContextManager[Any]:
    """Return the context of a forward whose activations are moved to pinned host memory.

    They come back in the backward pass, bit for bit.  The context is entered once before each
    backward pass, with all forward passes of that loss in it.  Call this when the weights are on
    their device: trl's class knows them by their storage and leaves them there.
    """
    from trl.models.activation_offloading import get_act_offloading_ctx_manager  # takes seconds

    context: AbstractContextManager[Any] = get_act_offloading_ctx_manager(net)
    return context


def compiler_missing(device: str) -> str:
    """Return which compiler torch.compile lacks here; empty if none."""
    # inductor compiles C++ for the CPU, and Triton for GPUs.
    names = [os.environ.get("CXX") or "g++", "clang++"]
    if device == "cpu" and not any(shutil.which(name) for name in names):
        return "no C++ compiler (g++ or clang++) on PATH; install one, or set compile=false"
    return ""


def compile_blocks(net: nn.Module, device: str = "cpu", backend: str = "inductor") -> None:
    """Compile every block when it first runs: all share one graph, which is compiled once.

    Raise ConfigError if there is no C++ compiler for the CPU's kernels.
    """
    missing = compiler_missing(device)
    if missing and backend == "inductor":
        raise ConfigError(f"compile=true: {missing}")
    for block in net.blocks:  # type: ignore[union-attr]
        # In place, so that names of parameters stay as they are.
        block.compile(backend=backend)
