"""The error on clips that are never trained on: always the same noise at the same levels.

Looking leaves no trace: weights, moments, averages, random states and modes are afterwards what
they were, bit for bit, so that a run with validation trains as one without.

The errors go into a table with a place for every clip, task and level, and one all-reduce adds the
ranks' tables: each clip counts once whatever the number of ranks, and the means are taken in the
same order everywhere.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from echolab.data.bad_samples import Tolerant
from echolab.data.collate import collate_clips, read_clip
from echolab.diffusion.objectives import velocity_error
from echolab.diffusion.phases import Allocator
from echolab.diffusion.sigmas import draw
from echolab.errors import ConfigError
from echolab.training import distributed
from echolab.training.datamodule import HeldOut
from echolab.training.engine.ema import Ema
from echolab.training.engine.master_weights import Masters
from echolab.types import Batch, Conditions, Draws

Poll = Callable[[], None]  # called on all ranks at the same places; what it raises ends the work
FILLS_UP = -1
AVERAGED, RAW = "val", "val_raw"


class Share(NamedTuple):
    """What one rank evaluates; all ranks have equally many batches of the same sizes."""

    tasks: tuple[str, ...]
    clips: int  # of all ranks
    batches: list[tuple[Batch, list[int]]]  # places in the table; FILLS_UP: counts nowhere


def places_of(clips: int, row: int, rows: int) -> list[int]:
    """The clips of row `row` of `rows`: equally many for each, filled up with FILLS_UP."""
    each = -(-clips // rows)
    return [place if place < clips else FILLS_UP for place in range(row * each, (row + 1) * each)]


def read_share(
    held_out: HeldOut, row: int = 0, rows: int = 1, reader: Tolerant | None = None
) -> Share:
    """Row `row` of the held-out clips, every clip posed as every task, on the CPU.

    Rows are ranks, or the groups of ranks that share a clip.  `reader` may pass over bad clips.
    ConfigError where there is no clip.
    """
    reader = reader or Tolerant(held_out.clips)
    clips = min(held_out.at_most, len(held_out.clips))
    if clips < 1:
        raise ConfigError(
            f"{held_out.clips.folder}: {len(held_out.clips)} held-out clips, held_out_clips="
            f"{held_out.at_most}; give at least one, or val_every=0"
        )
    places, size = places_of(clips, row, rows), held_out.batch_size
    batches = []
    for number, task in enumerate(held_out.tasks):
        for first in range(0, len(places), size):
            part = places[first : first + size]
            one = partial(read_clip, held_out.clips, task=task)
            read = [reader.read(max(place, 0), one) for place in part]
            rows_of = [number * clips + p if p != FILLS_UP else FILLS_UP for p in part]
            batches.append((collate_clips(held_out.clips, read), rows_of))
    return Share(held_out.tasks, clips, batches)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A copy there; itself where it is there already."""
    told = Conditions(*(part.to(device) for part in batch.conditions))
    weight = batch.weight.to(device)
    return batch._replace(latents=batch.latents.to(device), conditions=told, weight=weight)


def autocast_dtype(net: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """What autocast is to use so that `net` computes in `dtype`; fp32, which is none, where the
    parameters themselves are in `dtype`."""
    whole = any(parameter.dtype == torch.float32 for parameter in net.parameters())
    return dtype if whole else torch.float32


@contextmanager
def unchanged(net: nn.Module, device: torch.device) -> Iterator[None]:
    """`net` evaluates, without dropout; afterwards its modes and all random states are as before.

    Of torch on the CPU and on `device`, of numpy and of Python.
    """
    modes = [(module, module.training) for module in net.modules()]
    python, ours = random.getstate(), np.random.get_state()
    gpus = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=gpus):
            net.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        random.setstate(python)
        np.random.set_state(ours)


@torch.no_grad()
def held_out_errors(
    net: nn.Module, batch: Batch, phases: Allocator, sigmas: Sequence[float], seed: int
) -> Tensor:
    """Errors [B, levels] in fp32, nothing dropped; the noise is of (seed, key) alone."""
    shape, keys = tuple(batch.latents.shape[1:]), batch.keys
    noise = draw(keys, shape, seed=seed, epoch=-1).noise.to(batch.latents.device)
    kept = noise.new_zeros(len(keys), 2)
    columns = [
        velocity_error(net, batch, Draws(noise, noise.new_full((len(keys),), s), kept), phases)
        for s in sigmas
    ]
    return torch.stack(columns, 1)


def _table(
    net: nn.Module,
    share: Share,
    phases: Allocator,
    sigmas: Sequence[float],
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    poll: Poll,
) -> Tensor:
    """[tasks x clips, levels] in fp64 on the CPU, zero where other ranks know the error."""
    table = torch.zeros(len(share.tasks) * share.clips, len(sigmas), dtype=torch.float64)
    cast = autocast_dtype(net, dtype)
    for batch, places in share.batches:
        poll()
        with torch.autocast(device.type, cast, enabled=cast != torch.float32):
            found = held_out_errors(net, on_device(batch, device), phases, sigmas, seed)
        own = [i for i, place in enumerate(places) if place != FILLS_UP]
        table[[places[i] for i in own]] = found.cpu().double()[own]
    return table


def means_of(
    table: Tensor, tasks: Sequence[str], sigmas: Sequence[float], prefix: str
) -> dict[str, float]:
    """`loss`, `error/<task>` and `error/sigma_<level>` of a whole table, below `prefix`."""
    by_task = table.reshape(len(tasks), -1, len(sigmas))
    found = {f"{prefix}/loss": float(table.mean())}
    for task, part in zip(tasks, by_task, strict=True):
        found[f"{prefix}/error/{task}"] = float(part.mean())
    for sigma, column in zip(sigmas, table.T, strict=True):
        found[f"{prefix}/error/sigma_{sigma:g}"] = float(column.mean())
    return found


def validate(
    net: nn.Module,
    ema: Ema,
    masters: Masters,
    share: Share,
    phases: Allocator,
    sigmas: Sequence[float],
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    counts: bool = True,
    poll: Poll = lambda: None,
) -> Mapping[str, float]:
    """Held-out errors of the averaged weights (`val/...`) and of the raw ones (`val_raw/...`).

    Collective: every rank calls it with its share and gets the same values.  The network computes
    in `dtype`, as in training.  `counts` is false on ranks whose clips another one has too.  `poll`
    is called before each batch, of which all ranks have equally many.
    """
    shared: dict[str, Any] = {"seed": seed, "device": device, "dtype": dtype, "poll": poll}
    with unchanged(net, device):
        with ema.applied(masters):
            averaged = _table(net, share, phases, sigmas, **shared)
        raw = _table(net, share, phases, sigmas, **shared)
    both = torch.stack([averaged, raw])
    if not counts:
        both = torch.zeros_like(both)
    whole = torch.tensor(distributed.sums(both.flatten().tolist()), dtype=torch.float64).view_as(
        both
    )
    return means_of(whole[0], share.tasks, sigmas, AVERAGED) | means_of(
        whole[1], share.tasks, sigmas, RAW
    )
