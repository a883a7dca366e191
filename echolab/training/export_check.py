"""The last gate of a run: what is exported computes what was trained.

Samples of the training model (in its engine, with the averaged weights swapped in) are compared
with samples of a fresh network that the ordinary loader made of an export of the checkpoint.  In
between lie the swap, the gathering of shards, the file, the names and the merging of adapters;
compilation, checkpointing and sharding are on the one side only.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from echolab.atomic_io import ABSENT, FULL, read_whole, write_whole
from echolab.data.bad_samples import Tolerant
from echolab.data.collate import collate_clips, read_clip
from echolab.diffusion.pipeline import generate
from echolab.errors import DiskFullError, EcholabError, ParityError, StorageError
from echolab.models.export import write_original
from echolab.models.loading import load_released, released_values
from echolab.models.transformer import EchoTransformer
from echolab.models.weights import AUDIO_PARTS, IMAGE_PARTS, meta_network, place
from echolab.training import distributed
from echolab.training.adapters.lora_base import exported_weights
from echolab.training.checkpoints.checkpoint import open_checkpoint
from echolab.training.engine.ema import Ema
from echolab.training.engine.master_weights import Masters
from echolab.training.engine.placement import HOST, Placement
from echolab.training.validation import Poll, autocast_dtype, on_device, unchanged
from echolab.types import Batch

STEPS = 4  # of Euler's method
TOLERANCE = 1e-4  # relative, in fp32
REPORT, EXPORT = "parity.json", "parity-export.safetensors"
FAILURES = (ParityError, ParityError, StorageError, DiskFullError)  # by number; 0 is none
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
REMEDY = (
    "look at the swap of averages (training/engine/ema.py), the names (models/export.py) and, with "
    "trainer.compile=true, the compiler; the checkpoint is whole, but its export is not this model"
)


class Sampling(NamedTuple):
    """How both are sampled."""

    seed: int
    shift: float
    steps: int = STEPS


class Parity(NamedTuple):
    """How far the samples are apart, as shares of their size."""

    difference: float  # the largest of the tasks
    bound: float

    @property
    def passed(self) -> bool:
        """Whether that is near enough; NaN is not."""
        return self.difference <= self.bound

    def values(self) -> dict[str, float]:
        """To be logged."""
        return {"parity/difference": self.difference, "parity/bound": self.bound}


def parity_clips(reader: Tolerant, tasks: Sequence[str]) -> list[Batch]:
    """The first clip of a dataset, or its stand-in, posed as each of the tasks."""
    clips = reader.dataset
    one = [reader.read(0, partial(read_clip, clips, task=task)) for task in tasks]
    return [collate_clips(clips, [clip]) for clip in one]


def sample(
    net: nn.Module,
    clips: Sequence[Batch],
    how: Sampling,
    *,
    device: torch.device,
    dtype: torch.dtype,
    poll: Poll = lambda: None,
) -> list[Tensor]:
    """Latents [B, C, F, H, W] of each batch, on the CPU in fp32; the noise is of the keys alone.

    `poll` is called after each step of the sampler.
    """
    found = []
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
        found.append(latents.float().cpu())
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    """Size of the difference, as a share of the expected."""
    return float((found - expected).double().norm() / expected.double().norm())


def _load(
    path: Path, architecture: Mapping[str, Any], seed: int, placement: Placement = HOST
) -> EchoTransformer:
    net = meta_network(architecture)
    _, values = released_values(net, path, fresh=(IMAGE_PARTS, AUDIO_PARTS), seed=seed)
    place(net, values(), placement.device)
    return net


def exported_net(checkpoint: Path, file: Path) -> EchoTransformer:
    """A network of the export of a checkpoint, which is written to `file`; fp32, on the CPU."""
    opened = open_checkpoint(checkpoint)
    net, tensors = exported_weights(opened, _load)
    size = sum(tensor.numel() * 4 for tensor in tensors.values())
    file.unlink(missing_ok=True)
    write_original(file, net, tensors, dtype=torch.float32, shard_bytes=2 * size + 1)
    made = load_released(file, opened.state["architecture"]).net
    return made.eval().requires_grad_(False)


class _Where(NamedTuple):
    device: torch.device
    dtype: torch.dtype  # to compute in
    cast: bool  # the parameters are of that dtype too; else autocast


def _beside(
    fresh: nn.Module,
    live: Sequence[Tensor],
    clips: Sequence[Batch],
    how: Sampling,
    where: _Where,
    poll: Poll,
) -> tuple[list[float], float]:
    """Differences by batch, and the bound.

    Each of two computations in a smaller dtype may be as far from fp32 as the exported weights are
    measured to be, so they may be twice that apart.
    """
    device, dtype, cast = where
    shared: dict[str, Any] = {"device": device, "poll": poll}
    exact = own = sample(fresh.to(device), clips, how, dtype=torch.float32, **shared)
    bound = TOLERANCE
    if dtype != torch.float32:
        own = sample(fresh.to(dtype) if cast else fresh, clips, how, dtype=dtype, **shared)
        apart = [relative(a, b) for a, b in zip(own, exact, strict=True)]
        bound = max(bound, 2 * max(apart))
    return [relative(a, b) for a, b in zip(live, own, strict=True)], bound


def _compare(
    checkpoint: Path,
    folder: Path,
    live: Sequence[Tensor],
    clips: Sequence[Batch],
    how: Sampling,
    where: _Where,
    poll: Poll,
) -> tuple[list[float], float]:
    """Return differences by batch and the bound, and write them to the report in `folder`."""
    try:
        fresh = exported_net(checkpoint, folder / EXPORT)
        with unchanged(fresh, where.device):
            differences, bound = _beside(fresh, live, clips, how, where, poll)
    finally:
        (folder / EXPORT).unlink(missing_ok=True)
    told: dict[str, Any] = {"checkpoint": checkpoint.name}
    found = judged(differences, bound)
    told |= {"passed": found.passed, **found._asdict()}
    told |= {"by_task": _by_task(clips, differences)}
    told |= {"dtype": NAMES[where.dtype], "sampling": how._asdict()}
    write_whole(folder / REPORT, json.dumps(told, indent=1).encode(), patient=True)
    return differences, bound


def _exported(
    checkpoint: Path,
    folder: Path,
    live: Sequence[Tensor],
    clips: Sequence[Batch],
    how: Sampling,
    where: _Where,
    poll: Poll,
) -> tuple[list[float], float, Exception | None]:
    """Differences by batch, the bound, and what went wrong; zeros on ranks other than 0."""
    fault: Exception | None = None
    differences, bound = [0.0] * len(clips), 0.0
    passes = 1 if where.dtype == torch.float32 else 2
    polls = iter([poll] * (passes * len(clips) * how.steps))  # one a step of the sampler
    if distributed.rank() == 0:
        try:
            differences, bound = _compare(
                checkpoint, folder, live, clips, how, where, lambda: next(polls)()
            )
        except (EcholabError, OSError, torch.OutOfMemoryError) as error:
            fault = error
    for left in polls:  # the other ranks, or a rank 0 that failed, come to as many
        left()
    return differences, bound, fault


def _failure(fault: BaseException | None) -> int:
    """Return which of FAILURES an exception is, 0 for none: a disk says nothing of an export."""
    kind = int(fault is not None)
    while fault is not None:
        if isinstance(fault, DiskFullError) or (isinstance(fault, OSError) and fault.errno in FULL):
            return FAILURES.index(DiskFullError)
        if isinstance(fault, StorageError | OSError):
            return FAILURES.index(StorageError)
        fault = fault.__cause__
    return kind


def judged(differences: Sequence[float], bound: float) -> Parity:
    """Of all batches together."""
    return Parity(float(torch.tensor(differences).max()), bound)  # torch's max hands on NaN


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
    """Compare the training model with the export of `checkpoint`, the one it has just saved.

    Collective: all ranks sample, with the same clips; rank 0 exports into `folder`, reads that back
    and writes `parity.json`.  Raises ParityError on every rank where the samples are too far apart,
    or where the export cannot be made; StorageError where a disk is at fault.  Needs memory for one
    more copy of the weights on rank 0.
    `poll` is called on all ranks after each step of the sampler, here and on rank 0.
    """
    with unchanged(net, device), ema.applied(masters):
        live = sample(net, clips, how, device=device, dtype=dtype, poll=poll)
    where = _Where(device, dtype, autocast_dtype(net, dtype) != dtype)
    differences, bound, fault = _exported(checkpoint, folder, live, clips, how, where, poll)
    *differences, bound, failed = distributed.sums([*differences, bound, float(_failure(fault))])
    found = judged(differences, bound)
    if failed:  # any rank knows how; rank 0 knows why
        why = " ".join(str(fault or "see rank 0").split()) or type(fault).__name__
        kind = FAILURES[int(failed)]
        raise kind(f"{checkpoint}: its export cannot be compared: {why}")
    if not found.passed:
        by_task = _by_task(clips, differences).items()
        differing = ", ".join(f"{task} {value:.2e}" for task, value in by_task)
        raise ParityError(
            f"{folder / REPORT}: samples of the training model and of the export of "
            f"{checkpoint.name} differ by {found.difference:.2e} ({differing}), at most "
            f"{bound:.2e} in {NAMES[dtype]}; {REMEDY}"
        )
    return found


def passed_before(folder: Path, checkpoint: Path) -> bool | None:
    """What the report in a run's folder says of a checkpoint; None where it says nothing of it.

    A check that passed is not repeated when its run is started again; any other is.
    """
    try:
        told = json.loads(read_whole(folder / REPORT))
    except (*ABSENT, ValueError):
        return None
    return bool(told["passed"]) if told.get("checkpoint") == checkpoint.name else None
