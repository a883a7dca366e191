"""Validation: the error on held-out clips, always with the same noise and noise levels.

Validation does not affect training: weights, moments, averages, random states and modes are
restored bit-exactly.

The errors form a table with one entry for each clip, task and noise level; one all-reduce sums the
tables of the ranks.  Each clip counts once for any number of ranks, and all ranks compute the means
in the same order.
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

Poll = Callable[[], None]  # called on all ranks between batches; may raise to interrupt the work
FILLS_UP = -1
AVERAGED, RAW = "val", "val_raw"


class Share(NamedTuple):
    """The batches that one rank evaluates; number and sizes are equal on all ranks."""

    tasks: tuple[str, ...]
    clips: int  # number of clips, over all ranks
    batches: list[tuple[Batch, list[int]]]  # batch and its table rows; FILLS_UP marks padding


def places_of(clips: int, row: int, rows: int) -> list[int]:
    """Return the clip indices of row `row` of `rows`, padded with FILLS_UP to equal length."""
    each = -(-clips // rows)
    return [place if place < clips else FILLS_UP for place in range(row * each, (row + 1) * each)]


def read_share(
    val_data: ValData, row: int = 0, rows: int = 1, reader: TolerantReader | None = None
) -> Share:
    """Read row `row` of the held-out clips, each clip once for every task, on the CPU.

    A row is the share of one rank, or of a group of ranks that share clips.  `reader` may skip bad
    clips.  Raise ConfigError if there is no clip.
    """
    # Use the requested number of clips, or all if there are fewer.
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
    for task_index, task in enumerate(val_data.tasks):
        for first in range(0, len(places), size):
            part = places[first : first + size]
            read_task = partial(read_clip, val_data.clips, task=task)
            read = [reader.read(max(place, 0), read_task) for place in part]
            rows_of = [task_index * clips + p if p != FILLS_UP else FILLS_UP for p in part]
            batches.append((collate_clips(val_data.clips, read), rows_of))
    return Share(val_data.tasks, clips, batches)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on `device`."""
    conditions = Conditions(*(part.to(device) for part in batch.conditions))
    weight = batch.weight.to(device)
    return batch._replace(latents=batch.latents.to(device), conditions=conditions, weight=weight)


def autocast_dtype(net: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """Return the autocast dtype with which `net` computes in `dtype`.

    Return fp32, which means no autocast, if the parameters are already in a lower precision.
    """
    # Parameters in a lower precision need no autocast.
    in_fp32 = any(parameter.dtype == torch.float32 for parameter in net.parameters())
    return dtype if in_fp32 else torch.float32


@contextmanager
def unchanged(net: nn.Module, device: torch.device) -> Iterator[None]:
    """Set `net` to eval mode; restore the modes and all random states afterwards.

    The random states are those of torch on the CPU and on `device`, of numpy and of Python.
    """
    # Save all state that validation changes.
    modes = [(module, module.training) for module in net.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    gpus = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=gpus):
            net.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@torch.no_grad()
def held_out_errors(
    net: nn.Module, batch: Batch, phases: Allocator, sigmas: Sequence[float], seed: int
) -> Tensor:
    """Return errors [B, levels] in fp32, without modality dropout.

    The noise depends only on (seed, key).
    """
    # Every validation uses the same noise, so that errors differ only by the weights.
    shape, keys = tuple(batch.latents.shape[1:]), batch.keys
    noise = draw_noise(keys, shape, seed=seed, epoch=-1).noise.to(batch.latents.device)
    uniforms = noise.new_zeros(len(keys), 2)
    columns = [
        velocity_error(net, batch, Draws(noise, noise.new_full((len(keys),), s), uniforms), phases)
        for s in sigmas
    ]
    return torch.stack(columns, 1)


def _error_table(
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
    """Return errors [tasks x clips, levels] in fp64 on the CPU; zero for clips of other ranks."""
    # With zeros for clips of other ranks, the sum over ranks is the full table.
    table = torch.zeros(len(share.tasks) * share.clips, len(sigmas), dtype=torch.float64)
    cast = autocast_dtype(net, dtype)
    for batch, places in share.batches:
        poll()
        with torch.autocast(device.type, cast, enabled=cast != torch.float32):
            errors = held_out_errors(net, on_device(batch, device), phases, sigmas, seed)
        counted = [i for i, place in enumerate(places) if place != FILLS_UP]
        table[[places[i] for i in counted]] = errors.cpu().double()[counted]
    return table


def means_of(
    table: Tensor, tasks: Sequence[str], sigmas: Sequence[float], prefix: str
) -> dict[str, float]:
    """Return the means `PREFIX/loss`, `PREFIX/error/TASK` and `PREFIX/error/sigma_LEVEL`."""
    # The order of the table, and so of each sum, does not depend on the number of ranks.
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
    """Return held-out errors of the averaged (`val/...`) and the raw weights (`val_raw/...`).

    Collective: every rank passes its share and gets the same values.  The network computes in
    `dtype`, as in training.  `counts` is false on ranks whose clips another rank counts.  `poll` is
    called before each batch; all ranks have the same number of batches.
    """
    shared: dict[str, Any] = {"seed": seed, "device": device, "dtype": dtype, "poll": poll}
    averaged, raw = both_tables(
        lambda: _error_table(net, share, phases, sigmas, **shared),
        net, ema, masters, device=device, counts=counts,
    )  # fmt: skip
    errors = means_of(averaged, share.tasks, sigmas, AVERAGED)
    return errors | means_of(raw, share.tasks, sigmas, RAW)


def both_tables(
    table_of: Callable[[], Tensor],
    net: nn.Module,
    ema: Ema,
    masters: Masters,
    *,
    device: torch.device,
    counts: bool,
) -> tuple[Tensor, Tensor]:
    """Return the tables of all ranks, of the averaged and of the raw weights; collective.

    `table_of` computes this rank's table with the present weights of `net`.
    """
    # Evaluate the averaged weights, then the raw weights, on the same clips.
    with unchanged(net, device):
        with ema.applied(masters):
            averaged = table_of()
        raw = table_of()
    # Sum both tables in one all-reduce.
    both = torch.stack([averaged, raw])
    if not counts:
        both = torch.zeros_like(both)
    sums = torch.tensor(distributed.sums(both.flatten().tolist()), dtype=torch.float64)
    averaged, raw = sums.view_as(both)
    return averaged, raw


def compute_dtype(machine: Machine) -> torch.dtype:
    """Return the dtype in which the network computes in training."""
    return torch.float32 if machine.precision == "32-true" else torch.bfloat16


class Validation(Callback):
    """Logs the held-out errors at intervals and at the end of the run."""

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
        """Read this rank's held-out clips, so that bad clips are detected before the first step."""
        self.config, self.intervals, self.data = config, intervals, data
        self.masters, self.ema = masters, ema
        self.checkpoints, self.sync, self.log = checkpoints, sync, log
        # Ranks that share a clip read the same row.
        self._share: Any = None
        if (val_data := config.val_data) and intervals.val_every:
            group_size = config.machine.sequence_parallel
            row, rows = distributed.rank() // group_size, distributed.world() // group_size
            self._share = self._read(val_data, row, rows, config.reader_of(val_data.clips))

    def _read(self, val_data: ValData, row: int, rows: int, reader: TolerantReader) -> Any:
        """Return this rank's held-out clips."""
        return read_share(val_data, row, rows, reader)

    def after_step(self, state: RunState) -> None:
        """Validate if due, unless a rank requested the end of the run."""
        # The last step of a run is validated too.
        last = state.ends and self.intervals.val_every > 0
        due = self.intervals.due(self.intervals.val_every, state.step) or last
        if not due or state.vote.reason:
            return
        self.run(state)
        # An interrupted validation ends the run: save the last steps.
        if state.vote.reason:
            self.checkpoints.save_if_due(state)

    def run(self, state: RunState) -> None:
        """Log the held-out errors; if a rank requests an end, store that vote in `state`."""
        if self._share is None:
            return
        self.checkpoints.publish(state)  # a long validation could leave no time to publish later
        self.sync.heartbeat.enter("eval")
        try:
            errors = self._errors(state, self._share)
        except EvaluationInterrupted as interruption:
            result = "its errors are not recorded for this step"
            self.sync.accept_interruption(state, interruption, "validation", result)
        else:
            self.log.log(state, errors)
            state.metrics |= errors

    def _errors(self, state: RunState, share: Any) -> dict[str, float]:
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
