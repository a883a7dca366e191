"""Sample held-out clips over all ranks, with equal numbers of network calls on every rank.

Clips are sampled in batches whose composition does not depend on the number of ranks, so every
number of ranks computes the same bits.  Ranks take batches in turn; a rank that has fewer repeats
its last batch and drops the result, since under ZeRO 3 and with sequence parallelism every call of
the network is a collective.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from echolab.diffusion.guidance import Net
from echolab.diffusion.pipeline import generate
from echolab.evaluation.held_out import HeldOut
from echolab.types import Conditions

Poll = Callable[[], None]  # called on all ranks equally often; may raise to end the evaluation


class Sampling(NamedTuple):
    """Settings of the sampler, which are part of the metric card."""

    task: str
    steps: int = 12
    shift: float = 3.0
    audio_scale: float = 1.5
    seed: int = 0
    batch_size: int = 32  # clips in one call of the network


class Share(NamedTuple):
    """The part of one rank, or of a group of ranks that share clips."""

    row: int = 0
    rows: int = 1
    counts: bool = True  # false on ranks whose clips another rank of their group scores


class Part(NamedTuple):
    """One batch of clips of a rank."""

    indices: range
    counted: bool  # false for a repeated batch, or on a rank that does not count


def parts_of(num_clips: int, batch_size: int, share: Share) -> list[Part]:
    """Return the batches of one rank; all ranks have equally many.

    Raise ValueError for no clip.
    """
    if num_clips < 1:
        raise ValueError(f"num_clips={num_clips}: nothing to sample")
    # The last batch may be smaller, on any number of ranks.
    starts = range(0, num_clips, batch_size)
    batches = [range(start, min(start + batch_size, num_clips)) for start in starts]
    # Batch i belongs to row i modulo rows; the last round may be incomplete.
    rounds = -(-len(batches) // share.rows)
    parts = []
    for turn in range(rounds):
        number = turn * share.rows + share.row
        real = number < len(batches)
        indices = batches[number] if real else batches[-1]
        parts.append(Part(indices, real and share.counts))
    return parts


def sample_parts(
    net: Net,
    held_out: HeldOut,
    sampling: Sampling,
    parts: list[Part],
    *,
    device: torch.device,
    dtype: torch.dtype,
    poll: Poll = lambda: None,
) -> Iterator[tuple[Part, Tensor]]:
    """Yield each batch with its latents [B, C, F, H, W] in fp32 on the CPU.

    The noise of a clip depends only on seed and key.  `poll` is called at every step of the
    sampler, equally often on all ranks.
    """
    # A repeated batch is sampled as well, since other ranks wait for its calls.
    for part in parts:
        batch = held_out.inputs(part.indices, sampling.task)
        conditions = Conditions(*(tensor.to(device) for tensor in batch.conditions))
        latents = generate(
            net, conditions, batch.keys, steps=sampling.steps, shift=sampling.shift,
            audio_scale=sampling.audio_scale, seed=sampling.seed, dtype=dtype,
            on_step=lambda step, latents: poll(),
        )  # fmt: skip
        yield part, latents.float().cpu()
