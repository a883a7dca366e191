"""Checkpoints that know nothing of ranks or ZeRO stages.

    step-000123/  master.safetensors  exp_avg.safetensors  exp_avg_sq.safetensors  ema.safetensors
                  state.json          step, schedule, curriculum, data, objectives, architecture
                  manifest.json       size and sha256 of the others; written last

Every tensor is whole, fp32 and under the parameter's own name, so any world size and stage loads
it bit for bit.  The folder gets its name once all of it is on disk.  Nothing is ever unpickled.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from echolab.errors import CheckpointError
from echolab.training import ranks
from echolab.training.ema import Ema
from echolab.training.masters import MASTER, MOMENTS, Masters, shape

FORMAT = 1
EMA = "ema"
PARTS = (MASTER, *MOMENTS, EMA)
NAME = re.compile(r"step-(\d{6,})")


class Checkpoint(NamedTuple):
    """A whole checkpoint on disk."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])

    def tensors(self, part: str) -> dict[str, Tensor]:
        """One of PARTS by parameter name, on the CPU."""
        return load_file(self.path / f"{part}.safetensors")


def folder_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:06d}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_parts(masters: Masters, ema: Ema) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each part whole; collective, and only rank 0 keeps the tensors."""
    keep = ranks.rank() == 0
    for part in (MASTER, *MOMENTS):
        yield part, {name: tensor for name, tensor in masters.read(part) if keep}
    with ema.in_masters(masters):
        yield EMA, {name: tensor for name, tensor in masters.read(MASTER) if keep}


def _write_manifest(partial: Path) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(partial.iterdir())
    }
    for name in files:
        _sync(partial / name)
    manifest = partial / "manifest.json"
    manifest.write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
    _sync(manifest)


def _publish(partial: Path, path: Path) -> None:
    if path.exists():  # damaged, or of the same step: the new one counts
        discard(path)
    partial.rename(path)
    _sync(path.parent)


def save(folder: Path, state: dict[str, Any], masters: Masters, ema: Ema) -> Path:
    """Write the checkpoint of state["step"]; collective.  Raises CheckpointError on every rank.

    A rank that fails to write still takes part in the gathering: no other rank is left waiting.
    """
    path = folder_of(folder, state["step"])
    partial = folder / f".partial-{path.name}"
    fault: OSError | None = None
    first = ranks.rank() == 0
    try:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / "state.json").write_text(json.dumps(state, indent=1))
    except OSError as error:
        fault = error
    for part, tensors in _read_parts(masters, ema):
        if first and fault is None:
            try:
                save_file(tensors, partial / f"{part}.safetensors")
            except (OSError, safetensors.SafetensorError) as error:
                fault = error if isinstance(error, OSError) else OSError(str(error))
    if first and fault is None:
        try:
            _write_manifest(partial)
            _publish(partial, path)
        except OSError as error:
            fault = error
    if ranks.largest([int(fault is not None)])[0]:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{path}: could not be written ({fault or 'rank 0 says why'}); nothing was kept of it, "
            "earlier checkpoints are whole; make room there and run the same command again"
        )
    return path


def discard(path: Path) -> None:
    """Remove a checkpoint; without its manifest it does not count from the first moment on."""
    (path / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def open_checkpoint(path: Path) -> Checkpoint:
    """Verify sizes and hashes of all of `path`; raises CheckpointError saying what is wrong."""
    remedy = "take another checkpoint"
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{path}: format {manifest['format']}, this program reads {FORMAT}; {remedy}"
            )
        wanted = {"state.json", *(f"{part}.safetensors" for part in PARTS)}
        for name in sorted(wanted | set(manifest["files"])):
            told, file = manifest["files"].get(name), path / name
            size = file.stat().st_size if file.is_file() else None
            if told is None or size != told["bytes"]:
                raise CheckpointError(
                    f"{file}: {size} bytes, the manifest says {told and told['bytes']}; {remedy}"
                )
            if _sha256(file) != told["sha256"]:
                raise CheckpointError(f"{file}: its sha256 is not the manifest's; {remedy}")
        return Checkpoint(path, json.loads((path / "state.json").read_bytes()))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no whole checkpoint, no {error.filename}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {remedy}") from error


def saved_steps(folder: Path) -> list[int]:
    """Steps of all folders that look like checkpoints, newest first."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(m[1]) for m in map(NAME.fullmatch, names) if m), reverse=True)


def latest_valid(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and one line for each newer one that is not."""
    rejected: list[str] = []
    for step in saved_steps(folder):
        try:
            return open_checkpoint(folder_of(folder, step)), rejected
        except CheckpointError as error:
            rejected.append(str(error))
    return None, rejected


def check_architecture(checkpoint: Checkpoint, architecture: Mapping[str, Any]) -> None:
    """Raise CheckpointError naming the first setting in which two networks differ."""
    saved, given = checkpoint.state["architecture"], json.loads(json.dumps(dict(architecture)))
    for key in sorted(set(saved) | set(given)):
        if saved.get(key) != given.get(key):
            raise CheckpointError(
                f"{checkpoint.path}: of another network: {key} is {saved.get(key)} there, "
                f"{given.get(key)} here; set model.{key}={saved.get(key)} or give another folder"
            )


def check_adapters(checkpoint: Checkpoint, adapters: Mapping[str, Any] | None) -> None:
    """Raise CheckpointError where one has adapters and the other not, or others on another base."""
    saved, given = checkpoint.state.get("adapters") or {}, json.loads(json.dumps(adapters or {}))
    for key in ("targets", "rank", "alpha", "base"):
        if saved.get(key) != given.get(key):
            remedy = "weights= or initial=" if key == "base" else f"lora.{key}={saved.get(key)}"
            raise CheckpointError(
                f"{checkpoint.path}: of other adapters: {key} is {saved.get(key)} there, "
                f"{given.get(key)} here; give {remedy} as it was, or another folder"
            )


def _check_shapes(path: Path, net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    own = {name: tuple(shape(p)) for name, p in net.named_parameters() if p.requires_grad}
    there = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in [*own, *there]:
        if own.get(name) != there.get(name):
            raise CheckpointError(
                f"{path}: of another network: {name} is {there.get(name, 'missing')} there, "
                f"{own.get(name, 'missing')} here; give a checkpoint of this network"
            )


def restore(checkpoint: Checkpoint, net: nn.Module, masters: Masters, ema: Ema) -> None:
    """Set weights, moments, step counts and average, bit for bit; collective."""
    _check_shapes(checkpoint.path, net, average := checkpoint.tensors(EMA))
    masters.prepare()
    masters.write(MASTER, average)
    ema.start(masters)
    for part in (MASTER, *MOMENTS):
        masters.write(part, checkpoint.tensors(part))
    masters.updates = int(checkpoint.state["optimizer_updates"])
    ema.updates = int(checkpoint.state["ema"]["updates"])
    masters.show()


def load_ema_weights(path: Path) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint by parameter name, fp32, after verifying it whole."""
    return open_checkpoint(path).tensors(EMA)
