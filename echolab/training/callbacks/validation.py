"""Validation: the error on clips that are never trained on, always at the same noise and levels.

It leaves no trace: weights, moments, averages, random states and modes are restored bit for bit, so
that a run with validation trains as one without.

The errors go into a table with one entry for each clip, task and level, and one all-reduce adds the
tables of the ranks: each clip counts once for any number of ranks, and the means are taken in the
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

from echolab.data.bad_samples import TolerantReader
from echolab.data.collate import collate_clips, read_clip
from echolab.diffusion.objectives import velocity_error
from echolab.diffusion.phases import Allocator
from echolab.diffusion.sigmas import draw_noise
from echolab.errors import ConfigError
from echolab.training import distributed
from echolab.training.callbacks.callback import Callback, RunState
from echolab.training.callbacks.checkpoints import Checkpoints
from echolab.training.callbacks.metrics import LogMetrics
from echolab.training.callbacks.step_sync import EvaluationInterrupted, StepSync
from echolab.training.config import TrainConfig
from echolab.training.datamodule import ShardDataModule, ValData
from echolab.training.engine.ema import Ema
from echolab.training.engine.machine import Machine
from echolab.training.engine.master_weights import Masters
from echolab.training.intervals import Intervals
from echolab.types import Batch, Conditions, Draws

Poll = Callable[[], None]  # called on all ranks between batches; what it raises ends the work
FILLS_UP = -1
AVERAGED, RAW = "val", "val_raw"


class Share(NamedTuple):
    """What one rank evaluates; all ranks have equally many batches of the same sizes."""

    tasks: tuple[str, ...]
    clips: int  # of all ranks
    batches: list[tuple[Batch, list[int]]]  # rows of the table; FILLS_UP: no row


def places_of(clips: int, row: int, rows: int) -> list[int]:
    """Return the clips of row `row` of `rows`: equally many for each, filled up with FILLS_UP."""
    each = -(-clips // rows)
    return [place if place < clips else FILLS_UP for place in range(row * each, (row + 1) * each)]


def read_share(
    val_data: ValData, row: int = 0, rows: int = 1, reader: TolerantReader | None = None
) -> Share:
    """Read row `row` of the held-out clips, every clip posed as every task, on the CPU.

    Rows are ranks, or the groups of ranks that share a clip.  `reader` may skip bad clips.
    Raise ConfigError if there is no clip.
    """
    # As many clips as asked for, or all there are.
    reader = reader or TolerantReader(val_data.clips)
    clips = min(val_data.num_clips, len(val_data.clips))
    if clips < 1:
        raise ConfigError(
            f"{val_data.clips.folder}: {len(val_data.clips)} held-out clips, data.val_num_clips="
            f"{val_data.num_clips}; give at least one, or val_every=0"
        )
    # Every task uses the same clips, so that errors by task can be compared.
    places, size = places_of(clips, row, rows), val_data.batch_size
    batches = []
    for number, task in enumerate(val_data.tasks):
        for first in range(0, len(places), size):
            part = places[first : first + size]
            one = partial(read_clip, val_data.clips, task=task)
            read = [reader.read(max(place, 0), one) for place in part]
            rows_of = [number * clips + p if p != FILLS_UP else FILLS_UP for p in part]
            batches.append((collate_clips(val_data.clips, read), rows_of))
    return Share(val_data.tasks, clips, batches)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return a copy on `device`; the batch itself if it is there already."""
    conditions = Conditions(*(part.to(device) for part in batch.conditions))
    weight = batch.weight.to(device)
    return batch._replace(latents=batch.latents.to(device), conditions=conditions, weight=weight)


def autocast_dtype(net: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of autocast with which `net` computes in `dtype`.

    It is fp32, which means none, if the parameters themselves are in `dtype`.
    """
    # Weights in another dtype than fp32 need no autocast.
    in_fp32 = any(parameter.dtype == torch.float32 for parameter in net.parameters())
    return dtype if in_fp32 else torch.float32


@contextmanager
def unchanged(net: nn.Module, device: torch.device) -> Iterator[None]:
    """Set `net` to evaluate, without dropout; restore its modes and all random states afterwards.

    These are the states of torch on the CPU and on `device`, of numpy and of Python.
    """
    # Everything that validation changes is saved before and restored after it.
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
    """Return errors [B, levels] in fp32, nothing dropped; the noise is of (seed, key) alone."""
    # The same noise at every validation, so that errors differ by the weights alone.
    shape, keys = tuple(batch.latents.shape[1:]), batch.keys
    noise = draw_noise(keys, shape, seed=seed, epoch=-1).noise.to(batch.latents.device)
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
    """Return [tasks x clips, levels] in fp64 on the CPU, zero for the clips of other ranks."""
    # Zero for clips of other ranks, so that a sum over ranks is the full table.
    table = torch.zeros(len(share.tasks) * share.clips, len(sigmas), dtype=torch.float64)
    cast = autocast_dtype(net, dtype)
    for batch, places in share.batches:
        poll()
        with torch.autocast(device.type, cast, enabled=cast != torch.float32):
            errors = held_out_errors(net, on_device(batch, device), phases, sigmas, seed)
        own = [i for i, place in enumerate(places) if place != FILLS_UP]
        table[[places[i] for i in own]] = errors.cpu().double()[own]
    return table


def means_of(
    table: Tensor, tasks: Sequence[str], sigmas: Sequence[float], prefix: str
) -> dict[str, float]:
    """Return `loss`, `error/<task>` and `error/sigma_<level>` of a table, below `prefix`."""
    # Means in the order of the table, the same for any number of ranks.
    by_task = table.reshape(len(tasks), -1, len(sigmas))
    means = {f"{prefix}/loss": float(table.mean())}
    for task, part in zip(tasks, by_task, strict=True):
        means[f"{prefix}/error/{task}"] = float(part.mean())
    for sigma, column in zip(sigmas, table.T, strict=True):
        means[f"{prefix}/error/sigma_{sigma:g}"] = float(column.mean())
    return means


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
    """Return held-out errors of the averaged weights (`val/...`) and of the raw (`val_raw/...`).

    Collective: every rank calls it with its share and gets the same values.  The network computes
    in `dtype`, as in training.  `counts` is false on ranks whose clips another rank counts.  `poll`
    is called before each batch, of which all ranks have equally many.
    """
    # First the averaged weights, then the trained ones, on the same clips.
    shared: dict[str, Any] = {"seed": seed, "device": device, "dtype": dtype, "poll": poll}
    with unchanged(net, device):
        with ema.applied(masters):
            averaged = _table(net, share, phases, sigmas, **shared)
        raw = _table(net, share, phases, sigmas, **shared)
    # One all-reduce for both tables.
    both = torch.stack([averaged, raw])
    if not counts:
        both = torch.zeros_like(both)
    sums = torch.tensor(distributed.sums(both.flatten().tolist()), dtype=torch.float64)
    averaged, raw = sums.view_as(both)
    errors = means_of(averaged, share.tasks, sigmas, AVERAGED)
    return errors | means_of(raw, share.tasks, sigmas, RAW)


def compute_dtype(machine: Machine) -> torch.dtype:
    """Return the dtype in which the network computes while it trains."""
    return torch.float32 if machine.precision == "32-true" else torch.bfloat16


class Validation(Callback):
    """Logs the held-out errors at intervals and at the end."""

    def __init__(
        self,
        config: TrainConfig,
        intervals: Intervals,
        data: ShardDataModule,
        *,
        masters: Masters,
        ema: Ema,
        checkpoints: Checkpoints,
        sync: StepSync,
        log: LogMetrics,
    ) -> None:
        """Read this rank's held-out clips, so that bad ones are known before the first step."""
        self.config, self.intervals, self.data = config, intervals, data
        self.masters, self.ema = masters, ema
        self.checkpoints, self.sync, self.log = checkpoints, sync, log
        # Ranks that share a clip read the same row.
        self._share: Share | None = None
        if (val_data := config.val_data) and intervals.val_every:
            together = config.machine.sequence_parallel
            row, rows = distributed.rank() // together, distributed.world() // together
            self._share = read_share(val_data, row, rows, config.reader_of(val_data.clips))

    def after_step(self, state: RunState) -> None:
        """Validate if it is time, unless the run was requested to end."""
        # The last step is validated too, unless the run was asked to end.
        last = state.ends and self.intervals.val_every > 0
        due = self.intervals.due(self.intervals.val_every, state.step) or last
        if not due or state.vote.reason:
            return
        self.run(state)
        # An interrupted validation ends the run, which is saved as any other that ends.
        if state.vote.reason:
            self.checkpoints.save_if_due(state)

    def run(self, state: RunState) -> None:
        """Log the held-out errors; if a rank requests an end, put that vote into `state`."""
        if self._share is None:
            return
        self.checkpoints.publish(state)  # a validation can take long, and leave no time for it
        self.sync.heartbeat.enter("eval")
        try:
            errors = self._errors(state, self._share)
        except EvaluationInterrupted as interruption:
            result = "its errors are not recorded for this step"
            self.sync.accept_interruption(state, interruption, "validation", result)
        else:
            self.log.log(state, errors)
            state.metrics |= errors

    def _errors(self, state: RunState, share: Share) -> dict[str, float]:
        val_data, phases = self.config.val_data, self.config.phases
        assert val_data and phases  # checked by `config.check`
        errors = validate(
            state.module.net,
            self.ema,
            self.masters,
            share,
            phases,
            val_data.sigmas,
            seed=self.config.seed,
            device=state.module.device,
            dtype=compute_dtype(self.config.machine),
            counts=self.data.writer is not None,
            poll=partial(self.sync.poll, state),
        )
        return dict(errors)
