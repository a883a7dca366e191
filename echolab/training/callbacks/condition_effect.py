"""The effect of each condition: what changes if text, image or audio is that of another clip.

    val/effect/audio          rise of the held-out error, as a share of the error
    val/effect_output/audio   squared change of the output, as a share of the output's square

A network that ignores its audio has effects of zero, long before its samples could show it.  The
values are those of the averaged weights, for one task at one noise level, with the noise of
validation; each clip gets the condition of the next one.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from echolab.data.bad_samples import TolerantReader
from echolab.data.collate import collate_clips, read_clip
from echolab.diffusion.objectives import velocity_error
from echolab.diffusion.phases import Allocator
from echolab.diffusion.sigmas import draw_noise
from echolab.tasks.table import DEFAULT_TASK
from echolab.training import distributed
from echolab.training.callbacks.callback import RunState
from echolab.training.callbacks.validation import (
    FILLS_UP,
    Poll,
    Validation,
    autocast_dtype,
    compute_dtype,
    on_device,
    places_of,
    unchanged,
)
from echolab.training.datamodule import ValData
from echolab.types import Batch, Conditions, Draws

MODALITIES = ("text", "image", "audio")
ERROR, OUTPUT = "val/effect", "val/effect_output"


class ProbeShare(NamedTuple):
    """This rank's held-out clips, each with the conditions of the next clip."""

    clips: int  # number of clips, over all ranks
    batches: list[tuple[Batch, Conditions, list[int]]]  # with table rows; FILLS_UP marks padding


def read_probe(val_data: ValData, row: int, rows: int, reader: TolerantReader) -> ProbeShare | None:
    """Read row `row` of the held-out clips and their partners; None for less than two clips."""
    clips = min(val_data.num_clips, len(val_data.clips))
    if clips < 2:
        return None
    # One task: effects differ little among tasks, and each costs four network calls per clip.
    task = DEFAULT_TASK if DEFAULT_TASK in val_data.tasks else val_data.tasks[0]
    read_task, places = partial(read_clip, val_data.clips, task=task), places_of(clips, row, rows)
    batches = []
    for first in range(0, len(places), val_data.batch_size):
        part = places[first : first + val_data.batch_size]
        own = [reader.read(max(place, 0), read_task) for place in part]
        others = [reader.read((max(place, 0) + 1) % clips, read_task) for place in part]
        partner = collate_clips(val_data.clips, others).conditions
        batches.append((collate_clips(val_data.clips, own), partner, part))
    return ProbeShare(clips, batches)


class ConditionEffect(Validation):
    """Logs the effect of each condition with the held-out errors."""

    def _read(self, val_data: ValData, row: int, rows: int, reader: TolerantReader) -> Any:
        """Return this rank's held-out clips, for the errors and for the effects."""
        share = super()._read(val_data, row, rows, reader)
        return share, read_probe(val_data, row, rows, reader)

    def _errors(self, state: RunState, share: Any) -> dict[str, float]:
        """Return errors and effects over all ranks; collective."""
        of_errors, probe = share
        errors = super()._errors(state, of_errors)
        return errors if probe is None else errors | self._effects(state, probe)

    def _effects(self, state: RunState, share: ProbeShare) -> dict[str, float]:
        val_data, phases, net = self.config.val_data, self.config.phases, state.module.net
        assert val_data and phases  # checked by `config.check`
        device, dtype = state.module.device, compute_dtype(self.config.machine)
        with unchanged(net, device), self.ema.applied(self.masters):
            table = effect_table(
                net, share, phases, middle(val_data.sigmas), seed=self.config.seed, device=device,
                dtype=dtype, poll=partial(self.sync.poll, state),
            )  # fmt: skip
        # Zeros for clips of other ranks, and on ranks whose clips another rank counts.
        if self.data.writer is None:
            table = torch.zeros_like(table)
        sums = torch.tensor(distributed.sums(table.flatten().tolist()), dtype=torch.float64)
        return effects_of(sums.view_as(table))


def middle(sigmas: Sequence[float]) -> float:
    """Return the noise level in the middle, at which conditions decide most."""
    return sorted(sigmas)[len(sigmas) // 2]


@torch.no_grad()
def effect_table(
    net: nn.Module,
    share: ProbeShare,
    phases: Allocator,
    sigma: float,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    poll: Poll,
) -> Tensor:
    """Return [clips, 4, 2] in fp64: error, and squared change of the output by its square.

    The first entry of the second axis is the clip with its own conditions, whose second value is 0;
    the others have text, image or audio of the next clip.
    """
    table = torch.zeros(share.clips, 1 + len(MODALITIES), 2, dtype=torch.float64)
    cast = autocast_dtype(net, dtype)
    for batch, partner, places in share.batches:
        poll()
        on, other = on_device(batch, device), Conditions(*(part.to(device) for part in partner))
        with torch.autocast(device.type, cast, enabled=cast != torch.float32):
            values = _effects(net, on, other, phases, sigma, seed)
        counted = [i for i, place in enumerate(places) if place != FILLS_UP]
        table[[places[i] for i in counted]] = values.cpu().double()[counted]
    return table


def _effects(
    net: nn.Module, batch: Batch, partner: Conditions, phases: Allocator, sigma: float, seed: int
) -> Tensor:
    """Return [B, 4, 2] as `effect_table` does."""
    # The noise of validation, and no dropout of modalities.
    latents, outputs = batch.latents, list[Tensor]()
    noise = draw_noise(batch.keys, tuple(latents.shape[1:]), seed=seed, epoch=-1).noise
    noise = noise.to(latents.device)
    draws = Draws(noise, noise.new_full((len(latents),), sigma), noise.new_zeros(len(latents), 2))

    def recorded(*inputs: Any) -> Tensor:
        outputs.append(net(*inputs).float())
        return outputs[-1]

    # First with the clip's own conditions, then with one of the partner's at a time.
    columns = []
    exchanges = [{}, *({name: getattr(partner, name)} for name in MODALITIES)]
    for exchange in exchanges:
        given = batch._replace(conditions=batch.conditions._replace(**exchange))
        error = velocity_error(recorded, given, draws, phases)
        change = (outputs[-1] - outputs[0]).flatten(1).square().sum(1)
        change = change / outputs[0].flatten(1).square().sum(1).clamp_min(1e-12)
        columns.append(torch.stack([error, change], 1))
    return torch.stack(columns, 1)


def effects_of(table: Tensor) -> dict[str, float]:
    """Return the effects by name from the table [clips, 4, 2] of all ranks."""
    # Means over clips first: a ratio per clip would be ruled by clips with a small error.
    means = table.mean(0)
    effects = {}
    for index, name in enumerate(MODALITIES, start=1):
        own = float(means[0, 0])
        effects[f"{ERROR}/{name}"] = (float(means[index, 0]) - own) / max(own, 1e-12)
        effects[f"{OUTPUT}/{name}"] = float(means[index, 1])
    return effects
