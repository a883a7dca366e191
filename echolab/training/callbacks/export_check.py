"""The export check at the end of a run: the exported network must match the training model.

Samples of the training model (in its engine, with the averaged weights swapped in) are compared
with samples of a second network, which the ordinary loader reads from an export of the checkpoint.
This tests the swap of averages, the gathering of shards, the file, the parameter names and the
merging of adapters.  Only the training model is compiled, sharded and uses activation
checkpointing.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from echolab.atomic_io import ABSENT, FULL, read_file, write_atomic
from echolab.data.bad_samples import TolerantReader
from echolab.data.collate import collate_clips, read_clip
from echolab.diffusion.pipeline import generate
from echolab.errors import DiskFullError, EcholabError, ParityError, StorageError
from echolab.models.export import write_original
from echolab.models.loading import load_released, released_values
from echolab.models.state_dict import AUDIO_PARTS, IMAGE_PARTS, assign_parameters, meta_network
from echolab.models.transformer import EchoTransformer
from echolab.training import distributed
from echolab.training.adapters.lora_base import exported_weights
from echolab.training.callbacks.callback import Callback, RunState
from echolab.training.callbacks.metrics import LogMetrics
from echolab.training.callbacks.step_sync import EvaluationInterrupted, StepSync
from echolab.training.callbacks.validation import (
    Poll,
    autocast_dtype,
    compute_dtype,
    on_device,
    unchanged,
)
from echolab.training.checkpoints.checkpoint import open_checkpoint
from echolab.training.config import TrainConfig
from echolab.training.engine.ema import Ema
from echolab.training.engine.master_weights import Masters
from echolab.training.engine.placement import HOST, Placement
from echolab.types import Batch

STEPS = 4  # steps of the Euler solver
TOLERANCE = 1e-4  # relative difference allowed in fp32
REPORT, EXPORT = "parity.json", "parity-export.safetensors"
FAILURES = (ParityError, ParityError, StorageError, DiskFullError)  # by index; 0 means no failure
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
REMEDY = (
    "check the swap of averages (training/engine/ema.py), the names (models/export.py) and, with "
    "trainer.compile=true, the compiler; the checkpoint is complete, its export is another model"
)


class Sampling(NamedTuple):
    """Sampling settings of both networks."""

    seed: int
    shift: float
    steps: int = STEPS


class Parity(NamedTuple):
    """Difference between the samples, relative to their norm."""

    difference: float  # the largest over the tasks
    bound: float  # the largest difference allowed

    @property
    def passed(self) -> bool:
        """Return whether the difference is within the bound; False for NaN."""
        return self.difference <= self.bound

    def values(self) -> dict[str, float]:
        """Return the values to log."""
        return {"parity/difference": self.difference, "parity/bound": self.bound}


def parity_clips(reader: TolerantReader, tasks: Sequence[str]) -> list[Batch]:
    """Return the first clip of a dataset, or its replacement, as a batch of one for each task."""
    # One clip is enough: a wrong weight changes any sample.
    dataset = reader.dataset
    clips = [reader.read(0, partial(read_clip, dataset, task=task)) for task in tasks]
    return [collate_clips(dataset, [clip]) for clip in clips]


def sample(
    net: nn.Module,
    clips: Sequence[Batch],
    how: Sampling,
    *,
    device: torch.device,
    dtype: torch.dtype,
    poll: Poll = lambda: None,
) -> list[Tensor]:
    """Sample latents [B, C, F, H, W] for each batch; return them in fp32 on the CPU.

    The noise depends only on the seed and the clips' keys.  `poll` is called after each step of the
    sampler.
    """
    # A few steps suffice; the fixed seed gives both networks the same noise.
    samples = []
    for clip in clips:
        latents = generate(
            net,
            on_device(clip, device).conditions,
            clip.keys,
            steps=how.steps,
            shift=how.shift,
            audio_scale=1.0,
            seed=how.seed,
            dtype=autocast_dtype(net, dtype),
            on_step=lambda step, latents: poll(),
        )
        samples.append(latents.float().cpu())
    return samples


def relative(sampled: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference divided by the norm of `expected`."""
    return float((sampled - expected).double().norm() / expected.double().norm())


def _load_released(
    path: Path, architecture: Mapping[str, Any], seed: int, placement: Placement = HOST
) -> EchoTransformer:
    net = meta_network(architecture)
    _, values = released_values(net, path, fresh=(IMAGE_PARTS, AUDIO_PARTS), seed=seed)
    assign_parameters(net, values(), placement.device)
    return net


def exported_net(checkpoint: Path, file: Path) -> EchoTransformer:
    """Export a checkpoint to `file` and load the network from that file; fp32, on the CPU."""
    # Write the weights as `echolab export` does, in one file.
    opened = open_checkpoint(checkpoint)
    net, tensors = exported_weights(opened, _load_released)
    size = sum(tensor.numel() * 4 for tensor in tensors.values())
    file.unlink(missing_ok=True)
    write_original(file, net, tensors, dtype=torch.float32, shard_bytes=2 * size + 1)
    # Read the file with the ordinary loader, as a user would.
    exported = load_released(file, opened.state["architecture"]).net
    return exported.eval().requires_grad_(False)


class _ComputeOptions(NamedTuple):
    device: torch.device
    dtype: torch.dtype  # dtype of the computation
    cast: bool  # cast the parameters to that dtype; otherwise use autocast


def _sample_differences(
    fresh: nn.Module,
    live: Sequence[Tensor],
    clips: Sequence[Batch],
    how: Sampling,
    where: _ComputeOptions,
    poll: Poll,
) -> tuple[list[float], float]:
    """Return the difference for each batch, and the bound.

    In a lower-precision dtype, the error of the exported network against fp32 is measured.  Both
    networks may have that error, so their difference may be twice as large.
    """
    device, dtype, cast = where
    shared: dict[str, Any] = {"device": device, "poll": poll}
    # Sample the exported network in fp32 as the exact result.
    exact = expected = sample(fresh.to(device), clips, how, dtype=torch.float32, **shared)
    bound = TOLERANCE
    # In a lower-precision dtype the bound is twice the measured rounding error.
    if dtype != torch.float32:
        expected = sample(fresh.to(dtype) if cast else fresh, clips, how, dtype=dtype, **shared)
        rounding = [relative(a, b) for a, b in zip(expected, exact, strict=True)]
        bound = max(bound, 2 * max(rounding))
    return [relative(a, b) for a, b in zip(live, expected, strict=True)], bound


def _compare(
    checkpoint: Path,
    folder: Path,
    live: Sequence[Tensor],
    clips: Sequence[Batch],
    how: Sampling,
    where: _ComputeOptions,
    poll: Poll,
) -> tuple[list[float], float]:
    """Return the difference for each batch and the bound; write the report into `folder`."""
    try:
        fresh = exported_net(checkpoint, folder / EXPORT)
        with unchanged(fresh, where.device):
            differences, bound = _sample_differences(fresh, live, clips, how, where, poll)
    finally:
        (folder / EXPORT).unlink(missing_ok=True)
    parity = judged(differences, bound)
    report: dict[str, Any] = {"checkpoint": checkpoint.name}
    report |= {"passed": parity.passed, **parity._asdict()}
    report |= {"by_task": _by_task(clips, differences)}
    report |= {"dtype": NAMES[where.dtype], "sampling": how._asdict()}
    write_atomic(folder / REPORT, json.dumps(report, indent=1).encode(), patient=True)
    return differences, bound


def _compare_export(
    checkpoint: Path,
    folder: Path,
    live: Sequence[Tensor],
    clips: Sequence[Batch],
    how: Sampling,
    where: _ComputeOptions,
    poll: Poll,
) -> tuple[list[float], float, Exception | None]:
    """Return differences for each batch, the bound and an error; zeros on ranks other than 0."""
    # Only rank 0 compares.
    fault: Exception | None = None
    differences, bound = [0.0] * len(clips), 0.0
    # Polling is collective: every rank must poll as often as rank 0.
    passes = 1 if where.dtype == torch.float32 else 2
    polls = iter([poll] * (passes * len(clips) * how.steps))  # one per step of the sampler
    if distributed.rank() == 0:
        try:
            differences, bound = _compare(
                checkpoint, folder, live, clips, how, where, lambda: next(polls)()
            )
        except (EcholabError, OSError, torch.OutOfMemoryError) as error:
            fault = error
    for remaining in polls:  # all polls of other ranks, or the rest if rank 0 failed
        remaining()
    return differences, bound, fault


def _fault_code(fault: BaseException | None) -> int:
    """Return the index in FAILURES of an exception, 0 for none.

    Storage failures count as such, not as a bad export.
    """
    kind = int(fault is not None)
    while fault is not None:
        if isinstance(fault, DiskFullError) or (isinstance(fault, OSError) and fault.errno in FULL):
            return FAILURES.index(DiskFullError)
        if isinstance(fault, StorageError | OSError):
            return FAILURES.index(StorageError)
        fault = fault.__cause__
    return kind


def judged(differences: Sequence[float], bound: float) -> Parity:
    """Return the largest difference over all batches, with the bound."""
    return Parity(float(torch.tensor(differences).max()), bound)  # torch's max keeps NaN


def _by_task(clips: Sequence[Batch], differences: Sequence[float]) -> dict[str, float]:
    return {clip.tasks[0]: value for clip, value in zip(clips, differences, strict=True)}


def check_parity(
    net: nn.Module,
    ema: Ema,
    masters: Masters,
    *,
    checkpoint: Path,
    folder: Path,
    clips: Sequence[Batch],
    how: Sampling,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    poll: Poll = lambda: None,
) -> Parity:
    """Compare the training model with the export of `checkpoint`, which was saved just before.

    Collective: all ranks sample the training model; rank 0 exports into `folder`, samples the
    export (which needs memory for another copy of the weights) and writes `parity.json`.  `poll` is
    called on all ranks at each sampler step.  Raise ParityError on every rank if the samples differ
    or the export fails, StorageError if the storage fails.
    """
    with unchanged(net, device), ema.applied(masters):
        live = sample(net, clips, how, device=device, dtype=dtype, poll=poll)
    where = _ComputeOptions(device, dtype, autocast_dtype(net, dtype) != dtype)
    differences, bound, fault = _compare_export(checkpoint, folder, live, clips, how, where, poll)
    *differences, bound, failed = distributed.sums([*differences, bound, float(_fault_code(fault))])
    parity = judged(differences, bound)
    if failed:  # all ranks know the kind of error; only rank 0 has the message
        why = " ".join(str(fault or "see rank 0").split()) or type(fault).__name__
        kind = FAILURES[int(failed)]
        raise kind(f"{checkpoint}: its export cannot be compared: {why}")
    if not parity.passed:
        by_task = _by_task(clips, differences).items()
        differing = ", ".join(f"{task} {value:.2e}" for task, value in by_task)
        raise ParityError(
            f"{folder / REPORT}: samples of the training model and of the export of "
            f"{checkpoint.name} differ by {parity.difference:.2e} ({differing}), at most "
            f"{bound:.2e} in {NAMES[dtype]}; {REMEDY}"
        )
    return parity


def passed_before(folder: Path, checkpoint: Path) -> bool | None:
    """Return whether the report in the run folder says that this checkpoint passed the check.

    Return None without a report for it.  A passed check is not repeated when the run is started
    again.
    """
    try:
        report = json.loads(read_file(folder / REPORT))
    except (*ABSENT, ValueError):
        return None
    return bool(report["passed"]) if report.get("checkpoint") == checkpoint.name else None


class ExportCheck(Callback):
    """Checks the export of the last checkpoint before the run counts as done."""

    def __init__(
        self, config: TrainConfig, masters: Masters, ema: Ema, sync: StepSync, log: LogMetrics
    ):
        self.config, self.masters, self.ema = config, masters, ema
        self.sync, self.log = sync, log

    def on_end(self, state: RunState) -> None:
        """Check the export of a finished run; raise ParityError on every rank if it differs.

        If a rank requests an end during the check, the run ends unverified; its next start repeats
        the check.
        """
        done = state.step == state.schedule.steps and not state.unsaved
        if not (done and self.config.verify_export and state.checkpoint):
            return
        self.sync.heartbeat.enter("eval")
        try:
            parity = self._check(state, state.checkpoint)
        except EvaluationInterrupted as interruption:
            subject = "the check of the export"
            self.sync.accept_interruption(state, interruption, subject, "the next start repeats it")
            state.unverified = True
        else:
            self.log.log(state, parity.values())

    def _check(self, state: RunState, checkpoint: Path) -> Parity:
        config = self.config
        clips = config.val_data.clips if config.val_data else config.clips[0]
        steps = config.schedule.supervised_steps(config.schedule.steps)
        trained = [t for t, p in config.curriculum.probabilities(steps).items() if p > 0]
        return check_parity(
            state.module.net,
            self.ema,
            self.masters,
            checkpoint=checkpoint,
            folder=config.run_dir,
            clips=parity_clips(config.reader_of(clips), trained),
            how=Sampling(config.seed, config.flow_shift),
            device=state.module.device,
            dtype=compute_dtype(config.machine),
            poll=partial(self.sync.poll, state),
        )
