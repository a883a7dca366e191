"""Activation checkpointing, offload and compilation: less memory or time, same results.

They change how the blocks of a network are run, but neither names nor values of its parameters.
Apply `checkpoint_blocks` before compilation, so that the checkpointed block is compiled.
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

# Parts of the names of attention operators: torch's kernels and the FlashAttention packages.
ATTENTION = ("_scaled_dot_product", "flash_attn")
KEPT: dict[str, tuple[str, ...]] = {"full": (), "selective": ATTENTION}
OFFLOAD = "offload"  # recompute nothing; keep activations in host memory until the backward pass


def speed_up(
    net: nn.Module, *, device: str, attention: str, checkpointing: str, compiled: bool
) -> None:
    """Set attention kernel, checkpointing and compilation; raise ConfigError for wrong settings."""
    if checkpointing not in ("none", *KEPT, OFFLOAD):
        known = ", ".join(("none", *KEPT, OFFLOAD))
        raise ConfigError(
            f"trainer.activation_checkpointing={checkpointing}: unknown; one of {known}"
        )
    # Set attention first, since selective checkpointing keeps the outputs of its operators.
    use_attention(net, attention_from(attention, device))
    if checkpointing in KEPT:
        checkpoint_blocks(net, KEPT[checkpointing])
    if compiled:
        compile_blocks(net, device)


@cache
def _is_kept(operator: Any, keep: tuple[str, ...]) -> bool:
    """Return whether to keep an operator's output; cached, since called for every operator."""
    return any(part in str(operator) for part in keep)


def _checkpoint_policy(
    keep: tuple[str, ...], _: Any, operator: Any, *args: Any, **kwargs: Any
) -> Any:
    kept = _is_kept(operator, keep)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class Recomputing(_CachedTorchDispatchMode):
    """Returns the saved outputs and recomputes all other operators.

    torch's own mode requires exactly the operators of the forward pass.  Under ZeRO 3 the operators
    differ, since hooks in the block gather weights that are not gathered at that moment.
    """

    def __init__(self, keep: tuple[str, ...], storage: Any) -> None:
        super().__init__(partial(_checkpoint_policy, keep), storage, False)
        self.keep = keep

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the saved output of `func` if it was kept, else compute it again."""
        # torch's cache returns the kept outputs.
        if _is_kept(func, self.keep):
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def _checkpointed_forward(keep: tuple[str, ...]) -> Callable[..., Tensor]:
    """Return a checkpointed `forward` for a block; not a partial, which Dynamo cannot trace."""

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
    """Make each `every`-th block keep only its input, and run it again in the backward pass.

    Outputs of operators whose names contain a part in `keep` are kept too: with `ATTENTION`,
    everything except attention is recomputed, since attention on long sequences takes most of the
    time and little memory.  Gradients are bit-exact if the kernels are deterministic.
    """
    for block in list(net.blocks)[::every]:  # type: ignore[arg-type]
        # Bind the method to the block, so that a copy of the block runs the copy.
        block.forward = MethodType(_checkpointed_forward(tuple(keep)), block)


def offload_activations(net: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which activations of a forward pass are moved to pinned host memory.

    The backward pass moves them back bit-exactly.  Enter the context once before each backward
    pass, with all forward passes of that loss in it.  Call this function when the weights are on
    their device: trl's class recognizes weights by their storage and does not move them.
    """
    from trl.models.activation_offloading import get_act_offloading_ctx_manager  # takes seconds

    context: AbstractContextManager[Any] = get_act_offloading_ctx_manager(net)
    return context


def compiler_missing(device: str) -> str:
    """Return an error message if torch.compile lacks a compiler on this host; "" otherwise."""
    # inductor needs a C++ compiler for the CPU; for GPUs it uses Triton.
    names = [os.environ.get("CXX") or "g++", "clang++"]
    if device == "cpu" and not any(shutil.which(name) for name in names):
        return "no C++ compiler (g++ or clang++) on PATH; install one, or set compile=false"
    return ""


def compile_blocks(net: nn.Module, device: str = "cpu", backend: str = "inductor") -> None:
    """Compile the blocks on their first call; all share one graph, which is compiled once.

    Raise ConfigError if there is no C++ compiler for CPU kernels.
    """
    missing = compiler_missing(device)
    if missing and backend == "inductor":
        raise ConfigError(f"compile=true: {missing}")
    for block in net.blocks:  # type: ignore[union-attr]
        # Compile in place, so that parameter names do not change.
        block.compile(backend=backend)
