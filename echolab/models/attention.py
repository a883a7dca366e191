"""Multi-head attention by the fastest available kernel.

Every attention module of the network has a function `attend`, by default torch's SDPA;
`use_attention(net, attention_from(NAME))` replaces it from outside.

Variable-length kernels are not needed, because no key is masked: the zeros that pad a text or a
window of audio take part in the softmax, as in the released model, and all clips of a batch have
the same size.

Shapes: B clips, S queries, K keys, N heads, d channels of a head.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from echolab.errors import ConfigError

# [B, S, N, d], [B, K, N, d] twice -> [B, S, N, d]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

PACKAGES = {"flash2": "flash_attn", "flash3": "flash_attn_interface"}
INSTALL = {
    "flash2": "pip install flash-attn --no-build-isolation",
    "flash3": "build hopper/ of github.com/Dao-AILab/flash-attention",
}
NAMES = ("auto", "sdpa", "cudnn", *PACKAGES)
HOPPER = (9, 0)
# Number of tokens below which the backward pass of torch's bf16 CPU attention is up to seven times
# slower than in fp32; for more tokens bf16 is a seventh faster.
SHORT_SEQUENCE = 256
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def sdpa(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend by torch's `scaled_dot_product_attention`, with the kernel that torch prefers."""
    # torch expects heads before tokens: [B, N, S, d].
    q, k, v = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    if values.device.type == "cpu" and min(queries.shape[1], keys.shape[1]) < SHORT_SEQUENCE:
        with torch.autocast("cpu", enabled=False):
            mixed = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    else:
        mixed = F.scaled_dot_product_attention(q, k, v)
    return mixed.transpose(1, 2).type_as(values)


def cudnn(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend by cuDNN if it supports the inputs; on Hopper much faster than FlashAttention 2."""
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        return sdpa(queries, keys, values)


def _flash(name: str) -> Attend:
    """Return the function of a FlashAttention package; raise ConfigError if not installed."""
    # The packages are optional; torch's kernels are the default.
    try:
        kernel: Callable[..., Any] = import_module(PACKAGES[name]).flash_attn_func
    except ImportError as error:
        raise ConfigError(
            f"attention={name}: the package {PACKAGES[name]} is not installed; "
            f"{INSTALL[name]}, or use attention=auto"
        ) from error

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if values.dtype not in (torch.bfloat16, torch.float16):
            raise ConfigError(
                f"attention={name}: computes in bf16 or fp16, not {values.dtype}; "
                "use precision bf16-mixed, or attention=sdpa"
            )
        # Under autocast norms return fp32, which autocast casts only for torch's kernels.
        mixed = kernel(queries.type_as(values), keys.type_as(values), values)
        # FlashAttention 3 returned (output, log-sum-exp) before 3.0.0b2.
        return mixed[0] if isinstance(mixed, tuple) else mixed

    return attend


def _fastest(device: torch.device) -> str:
    """Return the name of the fastest kernel: FlashAttention 3 or cuDNN on Hopper, else torch's."""
    # Before Hopper torch's default kernel is the fastest.
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < HOPPER:
        return "sdpa"
    try:
        import_module(PACKAGES["flash3"])
    except ImportError:
        return "cudnn"
    return "flash3"


def attention_from(name: str, device: torch.device | str = "cpu") -> Attend:
    """Return the attention function `name` for a device; `auto` is the fastest available one.

    Raise ConfigError for an unknown name and for a package that is not installed.
    """
    if name not in NAMES:
        raise ConfigError(f"attention={name}: unknown; one of {', '.join(NAMES)}")
    # Resolve `auto` first: its choice always supports the device.
    device = torch.device(device)
    if name == "auto":
        name = _fastest(device)
    if device.type != "cuda" and name != "sdpa":
        raise ConfigError(f"attention={name}: needs a GPU, not {device}; use attention=auto")
    return {"sdpa": sdpa, "cudnn": cudnn}.get(name) or _flash(name)


def attention_modules(net: nn.Module) -> Iterator[Any]:
    """Yield the self-attention and cross-attention module of every block."""
    for block in net.blocks:  # type: ignore[union-attr]
        yield from (block.self_attn, block.cross_attn)


def use_attention(net: nn.Module, attend: Attend) -> None:
    """Set `attend` as the kernel of every attention module of the network."""
    for module in attention_modules(net):
        module.attend = attend
