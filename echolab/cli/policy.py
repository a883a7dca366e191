"""Networks by name, and trained ones from their checkpoints."""

from pathlib import Path
from typing import Any

from echolab.errors import CheckpointError
from echolab.models.transformer import EchoTransformer
from echolab.training.checkpoint import latest_valid, load_ema_weights, open_checkpoint


def last_checkpoint(run: Path) -> Path:
    """The newest whole checkpoint of a run folder, or the folder itself where it is one."""
    if (run / "manifest.json").is_file():
        return run
    found, rejected = latest_valid(run / "checkpoints")
    if found is None:
        why = f" ({rejected[0]})" if rejected else ""
        raise CheckpointError(f"{run}: no whole checkpoint in it{why}; train first")
    return found.path


def load_policy(checkpoint: Path) -> EchoTransformer:
    """The network of a checkpoint with its averaged weights, frozen."""
    architecture: dict[str, Any] = open_checkpoint(checkpoint).state["architecture"]
    net = EchoTransformer(**architecture)
    net.load_state_dict(load_ema_weights(checkpoint))
    return net.eval().requires_grad_(False)


def check_encoders(checkpoint: Path, fingerprints: dict[str, str]) -> None:
    """CheckpointError where a checkpoint was trained on what other encoders made."""
    trained = open_checkpoint(checkpoint).state["encoders"]
    for name, value in fingerprints.items():
        if trained.get(name) != value:
            raise CheckpointError(
                f"{checkpoint}: was trained with the {name} encoder {trained.get(name, '-')[:12]}, "
                f"this is {value[:12]}; give the one it was trained with"
            )
