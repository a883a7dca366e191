"""Networks by name, trained ones from their checkpoints, and released ones from their files."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from echolab.errors import CheckpointError, ConfigError
from echolab.launch import run_dir
from echolab.models import loading
from echolab.models.transformer import EchoTransformer
from echolab.models.weights import AUDIO_PARTS, IMAGE_PARTS
from echolab.training.adapters.lora_base import merged
from echolab.training.checkpoints.checkpoint import (
    EMA,
    latest_valid,
    open_checkpoint,
    open_verified,
)

MODELS = Path(__file__).resolve().parents[2] / "conf" / "model"


def architecture_of(model: str) -> dict[str, Any]:
    """The settings of conf/model/NAME.yaml; ConfigError where there are none."""
    from omegaconf import OmegaConf

    file = MODELS / f"{model}.yaml"
    if file.parent != MODELS or not file.is_file():
        known = ", ".join(sorted(path.stem for path in MODELS.glob("*.yaml")))
        raise ConfigError(f"model={model}: unknown; one of {known}")
    settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(file))  # type: ignore[assignment]
    return settings


def last_checkpoint(run: Path) -> Path:
    """The newest whole one of a run or its folder of checkpoints, or `run` where it is one."""
    if (run / "manifest.json").is_file():
        return run
    own = run / "checkpoints"
    found, rejected = latest_valid(own if own.is_dir() else run)
    if found is None:
        why = f" ({rejected[0]})" if rejected else ""
        raise CheckpointError(f"{run}: no whole checkpoint in it{why}; train first")
    return found.path


def load_policy(checkpoint: Path) -> EchoTransformer:
    """The network of a checkpoint with its averaged weights, frozen; adapters are merged."""
    opened = open_checkpoint(checkpoint)
    if opened.state.get("adapters"):
        return merged(opened, load_start).eval().requires_grad_(False)
    architecture: dict[str, Any] = opened.state["architecture"]
    with torch.device("meta"):
        net = EchoTransformer(**architecture)
    net.load_state_dict(opened.tensors(EMA), assign=True)
    return net.eval().requires_grad_(False)


def load_released(
    path: Path, architecture: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> EchoTransformer:
    """The network of a released file or folder, or of an exported one, frozen; it must be whole."""
    loaded = loading.load_released(path, architecture, dtype=dtype)
    _tell(path, loaded.report.lines())
    return loaded.net.eval().requires_grad_(False)


def load_start(path: Path, architecture: Mapping[str, Any], seed: int) -> EchoTransformer:
    """A network to train, in fp32, from a released file that may lack pictures or sound."""
    loaded = loading.load_released(path, architecture, fresh=(IMAGE_PARTS, AUDIO_PARTS), seed=seed)
    _tell(path, loaded.report.lines())
    return loaded.net


def _tell(path: Path, lines: list[str]) -> None:
    """Where one process of several speaks, it is the first."""
    if run_dir.own_rank() == 0:
        for line in lines:
            print(f"{path}: {line}", file=sys.stderr)


def check_encoders(checkpoint: Path, fingerprints: dict[str, str]) -> None:
    """CheckpointError where a checkpoint was trained on what other encoders made."""
    trained = open_verified(checkpoint).state["encoders"]
    for name, value in fingerprints.items():
        if trained.get(name) != value:
            raise CheckpointError(
                f"{checkpoint}: was trained with the {name} encoder {trained.get(name, '-')[:12]}, "
                f"this is {value[:12]}; give the one it was trained with"
            )
