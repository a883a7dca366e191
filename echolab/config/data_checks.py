"""Check that the datasets and checkpoints of a run belong together."""

import sys
from collections.abc import Sequence
from pathlib import Path

from echolab.data.shard_reader import ShardDataset, check_same_encoders, shared_samples
from echolab.errors import ConfigError, DataError
from echolab.launch.run_dir import rank_from_environment
from echolab.training.checkpoints.checkpoint import open_verified

ACCEPT = "data.val_overlaps=accept"


def check_checkpoints(checkpoints: Sequence[Path | None], clips: ShardDataset) -> None:
    """Raise DataError for a checkpoint that was trained on what other encoders made."""
    for path in checkpoints:
        if path:
            encoders = open_verified(path).state.get("encoders") or {}
            check_same_encoders(path, encoders, clips.folder, clips.encoders)


def check_held_out(
    held_out: ShardDataset,
    clips: Sequence[ShardDataset],
    pairs: Sequence[ShardDataset],
    accepted: bool,
) -> None:
    """Raise DataError for held-out clips that are trained on; some of them are a warning.

    What is trained on has no held-out error.  With `accepted`, that is only said.
    """
    for dataset in clips:
        if dataset.fingerprint == held_out.fingerprint:
            _say(
                f"data.val_clips: {held_out.folder} is the training set {dataset.folder}", accepted
            )
        elif shared := shared_samples(held_out, dataset):
            few = shared < len(held_out)
            words = f"{shared} of its {len(held_out)} samples are in the training set"
            _say(f"data.val_clips: {held_out.folder}: {words} {dataset.folder}", accepted or few)
    for dataset in pairs:
        if dataset.description.get("prompts") == held_out.fingerprint:
            words = f"data.pairs: {dataset.folder} was sampled from the held-out clips"
            _say(f"{words} {held_out.folder}", accepted)


def _say(words: str, accepted: bool) -> None:
    """Print a warning, or raise what is not accepted."""
    if not accepted:
        raise DataError(f"{words}; give other clips, or {ACCEPT} if that is meant")
    if rank_from_environment() == 0:
        print(
            f"echolab: warning: {words}: val/loss says nothing about new clips there",
            file=sys.stderr,
        )


def check_base(weights: str | None, initial: Path | None) -> None:
    """Raise ConfigError for adapters on a network of random values, whose gradients are all 0."""
    if not weights and not initial:
        raise ConfigError(
            "lora.target_modules: adapters need a trained base, and without one all their "
            "gradients are "
            "0; give pretrained= or init_from="
        )
