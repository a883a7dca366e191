"""Identify by content what a run starts from: checkpoints, released weights, adapters."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from echolab.config.networks import last_checkpoint
from echolab.errors import CheckpointError, WeightsError
from echolab.launch import run_dir
from echolab.models.loading import weight_files
from echolab.training.checkpoints.checkpoint import (
    folder_of,
    open_verified,
    saved_steps,
)
from echolab.training.checkpoints.manifest import read_manifest


def recorded(run: Path) -> dict[str, Any]:
    """Return the origins that the newest readable checkpoint of a run records; {} without one."""
    folder = run / "checkpoints"
    # The newest checkpoint may be damaged: look further back.
    for step in saved_steps(folder):
        try:
            return dict(open_verified(folder_of(folder, step)).state.get("origins", {}))
        except (CheckpointError, OSError, ValueError):
            continue
    return {}


def checkpoint_of(setting: str | None, record: Mapping[str, Any] | None = None) -> Path | None:
    """Return the checkpoint that a setting names; for a run its newest, or the recorded one.

    A run that starts from another run keeps the checkpoint that it began with, as long as that
    exists, even if the other run has been trained further.
    """
    if not setting:
        return None
    # Use the checkpoint that the run began with, while it exists.
    folder = Path(setting) / "checkpoints"
    for step in saved_steps(folder) if record else []:
        path = folder_of(folder, step)
        try:
            if record and read_manifest(path)["sha256"] == record["content"]:
                return path
        except CheckpointError:
            continue
    return last_checkpoint(Path(setting))


def checkpoints_from(config: Mapping[str, Any]) -> tuple[Path | None, Path | None]:
    """Return the checkpoints of `init_from` and `ref_model` for a new or an existing run."""
    record, reference = recorded(Path(config["run_dir"])), config["ref_model"]
    return (
        checkpoint_of(config["init_from"], record.get("init_from")),
        checkpoint_of(None if reference == "base" else reference, record.get("ref_model")),
    )


def origins_from(
    config: Mapping[str, Any], initial: Path | None, reference: Path | None
) -> dict[str, Any]:
    """Return the origins of a run by setting; only rank 0 hashes files, other ranks return {}."""
    # Hash large files only once.
    if run_dir.rank_from_environment():
        return {}
    # Identify checkpoints by the hash of the manifest, files by the hash of their bytes.
    checkpoints = {"init_from": initial, "ref_model": reference}
    origins: dict[str, Any] = {key: _checkpoint(path) for key, path in checkpoints.items() if path}
    if config["pretrained"]:
        origins["pretrained"] = {"content": _digest(weight_files(Path(config["pretrained"])))}
    if config["lora"]["init_from"]:
        start = Path(config["lora"]["init_from"])
        inside = start.iterdir() if start.is_dir() else [start]
        files = sorted(path for path in inside if path.suffix in (".json", ".safetensors"))
        origins["lora.init_from"] = {"content": _digest(files)}
    return origins


def _checkpoint(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    # The id of the run that wrote the checkpoint.
    identity = path.parent.parent / "run.json"
    try:
        run = json.loads(identity.read_text())["id"]
    except (OSError, ValueError, KeyError, TypeError):
        run = None  # a checkpoint that was not trained by the command line
    return {"content": str(manifest["sha256"]), "step": int(manifest["step"]), "run": run}


def _digest(files: Iterable[Path]) -> str:
    """Return the sha256 over the sha256 of each file, in order."""
    combined = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                combined.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise WeightsError(
                f"{path}: cannot be read ({error.strerror}); give another file"
            ) from error
    return combined.hexdigest()
