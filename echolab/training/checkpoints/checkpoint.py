"""Checkpoints, independent of ranks and ZeRO stages.

    step-000123/  master-00001-of-00002.safetensors ...   likewise exp_avg, exp_avg_sq, ema
                  state.json     step, schedule, curriculum, data, objectives, architecture
                  manifest.json  files with sizes and sha256; written last

Every tensor is complete, fp32 and stored under its parameter's name, so any world size and ZeRO
stage loads it bit-exactly.  The folder is renamed to its final name once all files are on disk
(`writer`).  No pickle is used.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from echolab.atomic_io import ABSENT, read_error, read_file, retry
from echolab.errors import CheckpointError, StorageError
from echolab.training import distributed
from echolab.training.checkpoints.manifest import (
    MANIFEST,
    REMEDY,
    STATE,
    Manifest,
    faults,
    files_of,
    read_manifest,
    shallow_faults,
)
from echolab.training.checkpoints.schema import state_faults
from echolab.training.engine.ema import EMA, POWER, Ema, part_names
from echolab.training.engine.master_weights import MASTER, MOMENTS, Masters

PARTS = (MASTER, *MOMENTS, EMA)  # parts of every checkpoint; additional averages may follow
NAME = re.compile(r"step-(\d{6,})")
REPLACED = ".replaced-"  # prefix of an old checkpoint while a new one of the same step replaces it


class Tensors(Mapping[str, Tensor]):
    """The tensors of one part by parameter name; values are read from disk when used."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = {}
        for path in files:
            opened = _open_file(path)
            for name in opened.keys():
                self._files[name] = opened

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _open_file(path: Path) -> Any:
    """Map a safetensors file into memory; raise StorageError if the file system fails."""
    try:
        return retry(lambda: safe_open(path, "pt"))
    except ABSENT:
        raise
    except OSError as error:
        raise read_error(path, error) from error


class Checkpoint:
    """A complete checkpoint on disk."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @cached_property
    def state(self) -> dict[str, Any]:
        """The content of state.json: all saved state except the tensors."""
        state: dict[str, Any] = json.loads(read_file(self.path / STATE))
        return state

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.manifest["step"])

    @property
    def digest(self) -> str:
        """Hash of the manifest, which identifies the content of all files."""
        return str(self.manifest["sha256"])

    @property
    def parts(self) -> list[str]:
        """Names of the parts: PARTS and additional averages."""
        return list(files_of(self.manifest))

    def tensors(self, part: str) -> Tensors:
        """Return the tensors of one of `parts` by parameter name, on the CPU."""
        names = files_of(self.manifest).get(part)
        if names is None:
            raise CheckpointError(f"{self.path}: has no {part}, but {', '.join(self.parts)}")
        return Tensors([self.path / name for name in names])


def folder_of(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return folder / f"step-{step:06d}"


def recover(folder: Path) -> None:
    """Restore the name of a replaced checkpoint if the save that replaced it was killed."""
    for path in folder.glob(f"{REPLACED}*"):
        # The new checkpoint of that step was never published, so the old one is still valid.
        complete = folder / path.name.removeprefix(REPLACED)
        if not complete.exists():
            path.rename(complete)


def discard(path: Path) -> None:
    """Remove a checkpoint; its manifest first, which makes it invalid at once."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint and verify every byte; raise CheckpointError with the first fault."""
    manifest = read_manifest(path)
    # Verify the bytes first, so that contents are read only from undamaged files.
    if wrong := faults(path, manifest) or content_faults(Checkpoint(path, manifest)):
        raise CheckpointError(wrong[0])
    return Checkpoint(path, manifest)


def content_faults(checkpoint: Checkpoint) -> list[str]:
    """Return one line for each invalid state entry, part or tensor.

    The bytes of all files must have been verified against the manifest before.
    """
    file = checkpoint.path / STATE
    try:
        state = checkpoint.state
    except (ValueError, RecursionError) as error:
        return [f"{file}: is no JSON ({error}); {REMEDY}"]
    # Check types and ranges of the state before using any entry.
    if wrong := state_faults(state, checkpoint.step):
        return [f"{file}: {fault}; {REMEDY}" for fault in wrong]
    return _part_faults(checkpoint) or _tensor_faults(checkpoint)


def _part_faults(checkpoint: Checkpoint) -> list[str]:
    """Compare the parts with the averages that the state lists."""
    manifest, ema = checkpoint.manifest, checkpoint.state["ema"]
    averages = part_names(
        ema.get("more", []), ema.get("widths", []), ema.get("keeps_reference", False)
    )
    expected = {MASTER, *MOMENTS, *averages}
    powers = {part for part in averages if part.startswith(POWER)}
    # A checkpoint has all parts, a snapshot only the power averages.
    if set(checkpoint.parts) not in (expected, powers):
        expected_names, present = ", ".join(sorted(expected)), ", ".join(checkpoint.parts)
        return [
            f"{checkpoint.path}: has the parts {present}, "
            f"its state names {expected_names}; {REMEDY}"
        ]
    return [
        f"{checkpoint.path / MANIFEST}: {name} shares the values of {other}, which is not there; "
        f"{REMEDY}"
        for name, other in manifest["tied"].items()
        if other not in manifest["parameters"]
    ]


def _tensor_faults(checkpoint: Checkpoint) -> list[str]:
    """Compare names, shapes and dtype with the manifest; check that all values are finite."""
    shapes = {name: tuple(dims) for name, dims in checkpoint.manifest["parameters"].items()}
    wrong = []
    # Use threads: reading and summing release the GIL.
    with ThreadPoolExecutor(min(len(shapes), os.cpu_count() or 1, 8) or 1) as pool:
        for part in checkpoint.parts:
            try:
                tensors = checkpoint.tensors(part)
            except SafetensorError as error:
                wrong.append(f"{checkpoint.path}: {part} cannot be read ({error}); {REMEDY}")
                continue
            # Every part must have exactly the parameters of the manifest.
            if extra := sorted(set(tensors) ^ set(shapes)):
                wrong.append(
                    f"{checkpoint.path}: {part} and the manifest's parameters differ in "
                    f"{extra[0]}; {REMEDY}"
                )
                continue
            checked = pool.map(partial(_tensor_fault, part, tensors), shapes, shapes.values())
            wrong += [
                f"{checkpoint.path}: {part}: {name} {fault}; {REMEDY}"
                for name, fault in zip(shapes, checked, strict=True)
                if fault
            ]
    return wrong


def _tensor_fault(
    part: str, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]
) -> str:
    tensor = tensors[name]
    if tensor.dtype is not torch.float32 or tuple(tensor.shape) != shape:
        actual = f"{tuple(tensor.shape)} of {tensor.dtype}"
        return f"is {actual}, must be {shape} of torch.float32"
    # A finite sum implies finite values and needs no second tensor; it may overflow fp32, so check
    # every value otherwise.
    finite = torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all()
    if not finite:
        return "holds values that are not finite"
    # The second moment is an average of squares, so it cannot be negative.
    negative = part == MOMENTS[1] and tensor.numel() and tensor.min() < 0
    return "holds negative squares" if negative else ""


def open_verified(path: Path) -> Checkpoint:
    """Open a checkpoint that another rank has verified; check only its manifest and sizes."""
    manifest = read_manifest(path)
    if wrong := shallow_faults(path, manifest):
        raise CheckpointError(wrong[0])
    return Checkpoint(path, manifest)


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of all folders named like checkpoints, newest first."""
    try:
        names = retry(lambda: os.listdir(folder))
    except ABSENT:
        names = []
    except OSError as error:
        raise read_error(folder, error) from error
    return sorted((int(m[1]) for m in map(NAME.fullmatch, names) if m), reverse=True)


def latest_valid(folder: Path, at_most: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest valid checkpoint up to step `at_most`, and one line for each rejected one.

    Raise StorageError if a checkpoint cannot be read: it may be valid, and resuming from an older
    one would lose steps.
    """
    rejected: list[str] = []
    for step in saved_steps(folder):
        if at_most is not None and step > at_most:
            continue
        path = folder_of(folder, step)
        try:
            checkpoint = open_checkpoint(path)
        except CheckpointError as error:
            rejected.append(str(error))
            continue
        # Reject a folder that was renamed to another step.
        if checkpoint.step == step:
            return checkpoint, rejected
        rejected.append(f"{path}: is the checkpoint of step {checkpoint.step}, not of its name")
    return None, rejected


def check_architecture(checkpoint: Checkpoint, architecture: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming the first difference, if the architectures differ."""
    # Convert through JSON, so that tuples and lists compare equal.
    saved, given = checkpoint.state["architecture"], json.loads(json.dumps(dict(architecture)))
    for key in sorted(set(saved) | set(given)):
        if saved.get(key) != given.get(key):
            raise CheckpointError(
                f"{checkpoint.path}: of another network: {key} is {saved.get(key)} there, "
                f"{given.get(key)} here; set model.{key}={saved.get(key)} or give another folder"
            )


def check_adapters(checkpoint: Checkpoint, adapters: Mapping[str, Any] | None) -> None:
    """Raise CheckpointError if the adapters differ, or only one side has adapters."""
    saved, given = checkpoint.state.get("adapters") or {}, json.loads(json.dumps(adapters or {}))
    settings = {"targets": "target_modules", "rank": "r", "alpha": "lora_alpha", "base": ""}
    for key, setting in settings.items():
        if saved.get(key) != given.get(key):
            remedy = (
                "pretrained= or init_from=" if key == "base" else f"lora.{setting}={saved.get(key)}"
            )
            raise CheckpointError(
                f"{checkpoint.path}: of other adapters: {key} is {saved.get(key)} there, "
                f"{given.get(key)} here; give {remedy} as it was, or another folder"
            )


def _check_parameters(checkpoint: Checkpoint, masters: Masters) -> None:
    """Raise CheckpointError unless the checkpoint has exactly the trained parameters."""
    manifest, remedy = checkpoint.manifest, "give a checkpoint of this network"
    saved_shapes = {name: tuple(dims) for name, dims in manifest["parameters"].items()}
    for name in [*masters.shapes, *saved_shapes]:
        if masters.shapes.get(name) != saved_shapes.get(name):
            raise CheckpointError(
                f"{checkpoint.path}: of another network: {name} is "
                f"{saved_shapes.get(name, 'missing')} there, "
                f"{masters.shapes.get(name, 'missing')} here; {remedy}"
            )
    for name in sorted({*masters.tied, *manifest["tied"]}):
        current, saved = masters.tied.get(name, "none"), manifest["tied"].get(name, "none")
        if current != saved:
            raise CheckpointError(
                f"{checkpoint.path}: of another network: {name} shares the values of "
                f"{saved} there, of {current} here; {remedy}"
            )


def _check_averages(checkpoint: Checkpoint, ema: Ema) -> None:
    saved = [part for part in checkpoint.parts if part not in (MASTER, *MOMENTS)]
    if sorted(saved) != sorted(ema.parts):
        raise CheckpointError(
            f"{checkpoint.path}: has the averages {', '.join(saved)}, this run keeps "
            f"{', '.join(ema.parts)}; give optim.extra_ema_decays, optim.posthoc_ema_stds and "
            "objective.ref_model_sync_steps as they were, or another folder"
        )


def restore(checkpoint: Checkpoint, masters: Masters, ema: Ema) -> None:
    """Restore weights, moments, step counts and averages bit-exactly; collective.

    A rank reads only the pages of the files that contain its own pieces.
    """
    _check_parameters(checkpoint, masters)
    _check_averages(checkpoint, ema)
    # The optimizer creates moments only in its first step: create them now, to fill them.
    masters.prepare()
    for part in (MASTER, *MOMENTS):
        tensors = checkpoint.tensors(part)
        if {name: tuple(tensors[name].shape) for name in tensors} != masters.shapes:
            raise CheckpointError(f"{checkpoint.path}: {part} is incomplete; {REMEDY}")
        masters.fill(masters.flats(part), tensors)
    # Allocate the averages, then fill them.
    ema.start(masters)
    for part in ema.parts:
        masters.fill(ema.flats[part], checkpoint.tensors(part))
    masters.updates = int(checkpoint.state["optimizer_updates"])
    ema.load_state_dict(checkpoint.state["ema"])
    # Copy the restored fp32 weights into the network.
    masters.show(masters.local)


# -- collective: rank 0 verifies every byte, other ranks check that they open the same checkpoint;
# errors are raised on every rank or on none


def open_on_all_ranks(path: Path) -> Checkpoint:
    """Open the checkpoint at `path` on all ranks; rank 0 verifies every byte."""
    checkpoint = _open_collectively(path.parent, lambda: open_checkpoint(path))
    assert checkpoint
    return checkpoint


def newest(folder: Path, at_most: int | None = None) -> Checkpoint | None:
    """Open the newest valid checkpoint up to step `at_most`; rank 0 prints the rejected ones."""

    def find() -> Checkpoint | None:
        recover(folder)
        checkpoint, rejected = latest_valid(folder, at_most)
        for line in rejected:
            print(f"echolab: skipped: {line}", file=sys.stderr)
        return checkpoint

    return _open_collectively(folder, find)


def oldest(folder: Path, at_most: int) -> Checkpoint | None:
    """Open the oldest valid checkpoint up to step `at_most`."""

    def find() -> Checkpoint | None:
        steps = sorted(step for step in saved_steps(folder) if step <= at_most)
        tried = (latest_valid(folder, step)[0] for step in steps)
        return next((checkpoint for checkpoint in tried if checkpoint), None)

    return _open_collectively(folder, find)


def _open_collectively(folder: Path, find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """Open on all ranks the checkpoint in `folder` that `find` returns on rank 0, if any."""
    checkpoint: Checkpoint | None = None
    fault, broken, message = "", "", "[]"
    if distributed.rank() == 0:
        try:
            checkpoint = find()
        except CheckpointError as error:
            fault = str(error)
        except StorageError as error:
            broken = str(error)
        except OSError as error:
            broken = str(read_error(folder, error))
        message = json.dumps([checkpoint.path.name, checkpoint.digest] if checkpoint else [])
    distributed.raise_together(CheckpointError, fault)
    distributed.raise_together(StorageError, broken)
    # Send only name and hash: the content is on the shared disk.
    message = distributed.gather_text(message)[0]
    if json.loads(message) and distributed.rank() > 0:
        name, digest = json.loads(message)
        try:
            checkpoint = open_verified(folder / name)
            if checkpoint.digest != digest:
                fault = f"{folder / name}: is not the checkpoint that rank 0 opened; {REMEDY}"
        except CheckpointError as error:
            fault = str(error)
        except StorageError as error:
            broken = str(error)
    distributed.raise_together(CheckpointError, fault)
    distributed.raise_together(StorageError, broken)
    return checkpoint
