"""Sequence parallelism: split the tokens of a clip over several ranks, by hooks on the network.

The scheme is DeepSpeed-Ulysses (arXiv 2309.14509): in all layers, each rank has a share of the
tokens; around self-attention, an all-to-all exchanges tokens for heads, so that each rank attends
over all tokens of the clip with its share of the heads.  Cross-attention needs no communication.

A rank's share is a range of tokens of *every* latent frame, not a range of latent frames.  Audio
cross-attention, which is per frame, then works on every rank, and the number of frames (21) need
not be divisible.

Shapes: B clips, F latent frames, P tokens of a frame, S = F P, N heads, d channels of a head,
W ranks, p = ceil(P / W) tokens of a frame on one rank.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from echolab.errors import ConfigError


class _Exchange(torch.autograd.Function):
    """All-to-all: send part i to rank i and receive rank i's part for this rank.  [W, ...]"""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, parts.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Send the gradients back to the source ranks, by the same exchange."""
        return _Exchange.apply(gradient, ctx.group), None


class _Gather(torch.autograd.Function):
    """Gather the parts of all ranks.  [...] -> [W, ...]"""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = part.new_empty(dist.get_world_size(group), *part.shape)
        dist.all_gather_single(parts.flatten(0, 1), part.contiguous(), group=group)
        return parts

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return this rank's part of the gradient times W.

        DDP and ZeRO average parameter gradients over ranks, which divides by W again.
        """
        return gradient[dist.get_rank(ctx.group)] * len(gradient), None


def sequence_group(count: int) -> Any:
    """Return the group of `count` consecutive ranks with this rank; all ranks must call it."""
    own_group = None
    for first in range(0, dist.get_world_size(), count):
        group = dist.new_group(range(first, first + count))
        if first <= dist.get_rank() < first + count:
            own_group = group
    return own_group


class SequenceSplit:
    """Hooks a network, so that its blocks run on this rank's share of the tokens.

    All ranks of `group` must call the network with the same inputs; all get the complete output.
    Parameter gradients must be averaged over the ranks.  Raises ConfigError if the number of heads
    is not divisible by the number of ranks.
    """

    def __init__(self, net: nn.Module, group: Any = None):
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.frame_tokens = 0  # P of the current clips
        blocks: Any = net.blocks
        # Each rank attends with an equal share of the heads.
        heads = blocks[0].self_attn.num_heads
        if heads % self.world:
            fitting = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
            raise ConfigError(
                f"sequence_parallel={self.world}: does not divide the {heads} heads; "
                f"use one of {fitting}"
            )
        self.attend = blocks[0].self_attn.attend
        # Split the tokens once, before the first block, and the conditions before every block.
        blocks[0].register_forward_pre_hook(self._split_tokens)
        for block in blocks:
            block.register_forward_pre_hook(self._split_conditions)
            block.self_attn.attend = self._attend
        net.head.register_forward_hook(self._gather_output)  # type: ignore[union-attr]

    def _local_share(self, values: Tensor, dim: int) -> Tensor:
        """Return this rank's share, padded with zeros: [.., P, ..] -> [.., p, ..]."""
        values = values.movedim(dim, -1)
        # All shares have equal size; the last one is padded with zeros.
        share = -(-values.shape[-1] // self.world)
        padded = F.pad(values, (0, share * self.world - values.shape[-1]))
        return padded.narrow(-1, self.rank * share, share).movedim(-1, dim)

    def _split_tokens(self, block: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens, modulation, context, rope = given
        self.frame_tokens = context.face.shape[2]
        framewise = tokens.unflatten(1, (-1, self.frame_tokens))
        return self._local_share(framewise, 2).flatten(1, 2), modulation, context, rope

    def _split_conditions(self, block: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens, modulation, context, rope = given
        positions = self._local_share(rope.unflatten(0, (-1, context.face.shape[2])), 1).flatten(
            0, 1
        )
        return (
            tokens,
            modulation,
            context._replace(face=self._local_share(context.face, 2)),
            positions,
        )

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend over all tokens: [B, F p, N, d] three times -> [B, F p, N, d]."""
        frames = queries.shape[1] // -(-self.frame_tokens // self.world)
        mixed = self.attend(
            *(self._gather_tokens(heads, frames) for heads in (queries, keys, values))
        )
        return self._scatter_tokens(mixed, frames)

    def _gather_tokens(self, heads: Tensor, frames: int) -> Tensor:
        """Exchange heads for tokens: [B, F p, N, d] -> [B, S, N / W, d]."""
        parts = heads.unflatten(2, (self.world, -1)).unflatten(1, (frames, -1))
        received = _Exchange.apply(parts.permute(3, 0, 1, 2, 4, 5), self.group)  # [W, B, F, p, ..]
        # Remove the padding of the last rank, which must not take part in attention.
        clip = received.permute(1, 2, 0, 3, 4, 5).flatten(2, 3)  # [B, F, W p, n, d]
        return clip[:, :, : self.frame_tokens].flatten(1, 2)

    def _scatter_tokens(self, mixed: Tensor, frames: int) -> Tensor:
        """Exchange tokens for heads: [B, S, N / W, d] -> [B, F p, N, d]."""
        clip = mixed.unflatten(1, (frames, -1))
        # Pad again, so that every rank gets an equal part.
        fill = -self.frame_tokens % self.world
        parts = F.pad(clip, (0, 0, 0, 0, 0, fill)).unflatten(2, (self.world, -1))
        received = _Exchange.apply(parts.permute(2, 0, 1, 3, 4, 5), self.group)  # [W, B, F, p, ..]
        return received.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2)

    def _gather_output(self, head: nn.Module, given: tuple[Any, ...], values: Tensor) -> Tensor:
        """Gather the output of all ranks: [B, F p, V] -> [B, S, V]."""
        share = -(-self.frame_tokens // self.world)
        parts = _Gather.apply(values.unflatten(1, (-1, share)), self.group)  # [W, B, F, p, V]
        clip = parts.permute(1, 2, 0, 3, 4).flatten(2, 3)
        return clip[:, :, : self.frame_tokens].flatten(1, 2)
