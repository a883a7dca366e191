"""Estimate the activation memory of a training step by running it on tensors without values.

Forward and backward pass of the network run under torch's FakeTensorMode, and every allocated
storage counts while it is live.  This includes checkpointing, adapters, autocast and tensors saved
by kernels, without formulas that could become outdated.  Not counted: workspace inside kernels,
rounding and fragmentation of the allocator, and the CUDA context.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from echolab.diffusion.objectives import velocity_error
from echolab.diffusion.phases import PHDA, ModalityDropout
from echolab.geometry import geometry_of
from echolab.models.attention import use_attention
from echolab.models.layers import RMSNorm, rope_freqs
from echolab.models.transformer import EchoTransformer
from echolab.types import Batch, Conditions, Draws

TEXT_TOKENS, IMAGE_TOKENS = 512, 257
SMALLEST_OFFLOADED, STASHED = 1024, 5  # defaults of trl's OffloadActivations: bytes, tensors


class Clip(NamedTuple):
    """The size of a micro-batch: latents, and the tokens of its conditions."""

    clips: int
    frames: int  # latent frames
    height: int  # latent height
    width: int  # latent width
    text: int = TEXT_TOKENS
    image: int = IMAGE_TOKENS


class Step(NamedTuple):
    """Memory in bytes of one forward and backward pass, without the weights."""

    forward: int  # peak until the loss is computed
    activations: int  # peak of the step, without gradients of weights
    together: int  # peak of the step, with gradients of weights
    offloaded: int = 0  # activations in host memory, for activation_checkpointing=offload


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages that were allocated while the mode is active.

    Storages of `known` tensors are not counted.  `count_gradient` counts a storage as a gradient.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live, self.gradients, self.peak, self.peak_together = 0, 0, 0, 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._gradient_keys: set[int] = set()
        self._known = [tensor.untyped_storage() for tensor in known]
        self._keys = {storage._cdata for storage in self._known}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operator and count the storages of its result."""
        # Count storages, not tensors, so that views of one storage count once.
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count_storage(leaf.untyped_storage())
        self.peak = max(self.peak, self.live)
        self.peak_together = max(self.peak_together, self.live + self.gradients)
        return result

    def _count_storage(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._keys and key not in self._storages:
            size = storage.nbytes()
            # The callback runs when the storage is freed.
            self._storages[key] = weakref.ref(storage, lambda _: self._release_storage(key, size))
            self.live += size

    def _release_storage(self, key: int, size: int) -> None:
        del self._storages[key]
        if key in self._gradient_keys:
            self._gradient_keys.remove(key)
            self.gradients -= size
        else:
            self.live -= size

    def count_gradient(self, tensor: Tensor) -> None:
        """Count a weight's gradient separately from the activations."""
        storage = tensor.untyped_storage()
        self._count_storage(storage)
        # Move the storage from the activations to the gradients.
        if storage._cdata not in self._gradient_keys:
            self._gradient_keys.add(storage._cdata)
            self.live -= storage.nbytes()
            self.gradients += storage.nbytes()


class Offloaded(saved_tensors_hooks):
    """Counts the activations that trl moves to the host, and frees their device memory.

    Follows the defaults of trl's `OffloadActivations`: weights, tensors below 1 KiB, and tensors
    that share storage with one of the last five saved tensors are not moved.
    """

    def __init__(self, known: list[Tensor]) -> None:
        self.bytes = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._stashed: dict[int, Tensor] = {}  # last saved tensors by storage, oldest first
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        key = tensor.untyped_storage()._cdata
        if key in self._known or key in self._stashed or tensor.nbytes < SMALLEST_OFFLOADED:
            return tensor
        # Keep the last tensors alive, since their copies may still be in progress.
        self._stashed[key] = tensor
        while len(self._stashed) > STASHED:
            del self._stashed[next(iter(self._stashed))]
        self.bytes += tensor.nbytes
        return tensor.shape, tensor.dtype, tensor.requires_grad

    def _unpack(self, saved: Any) -> Tensor:
        self._stashed.clear()
        if isinstance(saved, Tensor):
            return saved
        shape, dtype, _ = saved
        return torch.empty(shape, dtype=dtype)


def _flash_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend with a kernel that saves its inputs, its output and one value for each query."""
    # [B, S, N, d] -> [B, N, S, d], the layout of torch.
    q, k, v = (heads.to(values.dtype).transpose(1, 2) for heads in (queries, keys, values))
    mixed: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return mixed.transpose(1, 2)


class _FusedNorm(torch.autograd.Function):
    """Shapes of CUDA's fused RMS norm, which saves its input and one value for each token."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, weight, values.new_empty(values.shape[:-1]).float())
        return torch.empty_like(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        values, weight, _ = ctx.saved_tensors
        return torch.empty_like(values), torch.empty_like(weight)


def _fused_rms_norm(weight: nn.Parameter, values: Tensor) -> Tensor:
    if torch.is_autocast_enabled("cpu"):  # CUDA's autocast computes norms in fp32
        values = values.float()
    normed: Tensor = _FusedNorm.apply(values, weight.type_as(values))
    return normed


def like_gpu(net: nn.Module) -> None:
    """Change a network for simulation, so that it saves the same activations as on a GPU.

    Only the kernels of attention and RMS norm save other tensors on a GPU than on a CPU.
    """
    use_attention(net, _flash_attention)
    for module in net.modules():
        if isinstance(module, RMSNorm):
            module.forward = partial(_fused_rms_norm, module.weight)  # type: ignore[method-assign]


def _conditions(architecture: Mapping[str, Any], clip: Clip) -> Conditions:
    # Shapes as in a batch of the data pipeline.
    geometry, size = geometry_of(architecture), clip.clips
    frames = geometry.frames(clip.frames)
    layers, audio_dim = architecture.get("audio_layers"), architecture["audio_dim"] or 1
    audio = (frames, layers, audio_dim) if layers else (2 * frames, audio_dim)
    grid = (clip.frames, clip.height, clip.width)
    return Conditions(
        text=torch.empty(size, clip.text, architecture["text_dim"]),
        image=torch.empty(size, clip.image, architecture["image_dim"] or 1),
        audio=torch.empty(size, *audio),
        face=torch.empty(size, geometry.tokens(clip.height, clip.width)),
        known=torch.empty(size, geometry.time_stride, *grid),
        known_latents=torch.empty(size, geometry.channels, *grid),
    )


@contextmanager
def _fake_tensors() -> Iterator[None]:
    """Make tensors that are created in this context have a shape and a dtype, but no values."""
    rope_freqs.cache_clear()
    try:
        with FakeTensorMode():
            yield
    finally:
        rope_freqs.cache_clear()  # a real network must not use a cached table without values


def _allocate(net: nn.Module, dtype: torch.dtype) -> None:
    """Replace parameters on the meta device by parameters on the current device."""
    for module in net.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            setattr(
                module, name, nn.Parameter(torch.empty(old.shape, dtype=dtype), old.requires_grad)
            )


def simulate(
    architecture: Mapping[str, Any],
    clip: Clip,
    *,
    weights: torch.dtype = torch.float32,
    autocast: bool = False,
    prepare: Callable[[nn.Module], None] = lambda net: None,
    kernels: Callable[[nn.Module], None] = lambda net: None,
    offload: bool = False,
) -> Step:
    """Run one supervised step without values and return its memory; allocates no real memory.

    `weights` is the dtype of the weights; compute in bf16 either by `autocast` or by this dtype.
    `prepare` changes the network before the step (adapters, checkpointing).  `kernels` may be
    `like_gpu`; the default is the kernels of this CPU.  With `offload`, activations are moved to
    host memory.
    """
    with torch.device("meta"):
        net = EchoTransformer(**architecture)
        prepare(net)
    with _fake_tensors():
        _allocate(net, weights)
        # Allocations before this point are weights; all later ones are counted.
        kernels(net)
        with LiveBytes([*net.parameters(), *net.buffers()]) as counted:
            for parameter in net.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(
                        lambda p: counted.count_gradient(p.grad)
                    )
            offloaded = Offloaded([*net.parameters(), *net.buffers()]) if offload else None
            step = _run_step(net, architecture, clip, counted, autocast, offloaded or nullcontext())
            return step._replace(offloaded=offloaded.bytes if offloaded else 0)


def _run_step(
    net: nn.Module,
    architecture: Mapping[str, Any],
    clip: Clip,
    counted: LiveBytes,
    autocast: bool,
    offloading: AbstractContextManager[Any],
) -> Step:
    # Make a batch of the right shapes; its values do not matter.
    shape = (clip.clips, architecture["out_channels"], clip.frames, clip.height, clip.width)
    weight = torch.empty(clip.clips, 1, *shape[2:])
    batch = Batch(torch.empty(shape), _conditions(architecture, clip), weight, [], [])
    draws = Draws(torch.empty(shape), torch.empty(clip.clips), torch.empty(clip.clips, 2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), offloading:
        loss = velocity_error(net, batch, draws, ModalityDropout(PHDA)).mean()
    # The peak so far is the peak of the forward pass.
    forward = counted.peak
    loss.backward()
    return Step(forward, counted.peak, counted.peak_together)
