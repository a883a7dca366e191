"""Sample held-out clips from a checkpoint, score them, and store rows and samples.

Preference rounds use the judges and the sampling for samples of a dataset as well.
"""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from echolab.atomic_io import write_atomic
from echolab.config.networks import check_encoders, last_checkpoint, load_policy
from echolab.data.collate import collate_clips, read_clip
from echolab.data.media import write_video
from echolab.data.shard_reader import ShardDataset, open_dataset
from echolab.diffusion.guidance import Net
from echolab.diffusion.pipeline import generate
from echolab.encoders.demo import CausalAutoencoder
from echolab.encoders.encode import demo_encoders
from echolab.errors import DataError
from echolab.fitting import load_net, work_dtype
from echolab.inference.commands import EvaluateArguments
from echolab.inference.inputs import load_clips, to_frames
from echolab.metrics.demo_networks import ClipFeatures, FrameFeatures, SyncNetDemo
from echolab.metrics.mfcc import cepstra_of
from echolab.metrics.scores import Judges, features_of, score_clips
from echolab.progress import progress
from echolab.tasks.table import TASKS
from echolab.types import Clips

BATCH = 32
AUTOENCODER, FRAMES, CLIPS = "autoencoder", "frames", "clips"
SYNC_JUDGE, SYNC_EVALUATOR = "sync_judge", "sync_evaluator"
UNGUIDED = ("sync_c_demo", "mouth_corr")  # scores that are also computed without audio guidance


class Sampling(NamedTuple):
    """Settings of the sampler."""

    steps: int = 12
    shift: float = 3.0
    audio_scale: float = 1.5
    seed: int = 0


def network_file(networks: Path, name: str) -> Path:
    """Return the file of a fitted network."""
    return networks / f"{name}.safetensors"


def load_autoencoder(networks: Path) -> CausalAutoencoder:
    """Load the demo autoencoder."""
    return load_net(network_file(networks, AUTOENCODER), CausalAutoencoder)


def load_judges(networks: Path, real: Clips, sync: str = SYNC_EVALUATOR) -> Judges:
    """Load the evaluator's networks; compute the features of real clips for FID and FVD."""
    # Features of real clips are computed once for all rows.
    frame = load_net(network_file(networks, FRAMES), FrameFeatures)
    clip = load_net(network_file(networks, CLIPS), ClipFeatures)
    real_frames, real_clips = features_of(frame, clip, real.float_pixels())
    return Judges(
        load_net(network_file(networks, sync), SyncNetDemo), frame, clip, real_frames, real_clips
    )


@torch.no_grad()
def sample_pixels(
    net: Net,
    vae: CausalAutoencoder,
    dataset: ShardDataset,
    indices: range,
    task: str,
    sampling: Sampling,
    report: Callable[[int], None],
) -> Tensor:
    """Generate clips [N, 3, T, Y, X] in [-1, 1] for samples of an encoded dataset."""
    pixels = []
    for first in range(indices.start, indices.stop, BATCH):
        # Generate and decode batch by batch.
        part = range(first, min(first + BATCH, indices.stop))
        clips = collate_clips(dataset, [read_clip(dataset, i, task) for i in part])
        latents = generate(
            net, clips.conditions, clips.keys, steps=sampling.steps, shift=sampling.shift,
            audio_scale=sampling.audio_scale, seed=sampling.seed, dtype=work_dtype(),
        )  # fmt: skip
        pixels.append(vae.decode(latents))
        report(part.stop - indices.start)
    return torch.cat(pixels)


def check_same_clips(raw: Clips, encoded: ShardDataset) -> None:
    """Raise DataError unless both datasets hold the same clips in the same order."""
    if raw.keys != encoded.keys[: len(raw.keys)]:
        raise DataError(
            f"{encoded.folder}: its clips are not those of the raw dataset; encode that one again"
        )


# -- evaluation ----------------------------------------------------------------------------------


def evaluate_checkpoint(arguments: EvaluateArguments) -> None:
    """Score generated clips, or the held-out clips themselves, and print the scores."""
    # Score a checkpoint, or the held-out clips themselves.
    subject = str(arguments.reference)
    if arguments.checkpoint:
        checkpoint = last_checkpoint(arguments.checkpoint)
        subject, scores = str(checkpoint), score_checkpoint(arguments, checkpoint)
    else:
        scores = score_reference(arguments)

    # Add the row to the table, and print it.
    if arguments.scores:
        add_row(arguments.scores, arguments.row_name, arguments.train_seed, scores)
    if arguments.format == "json":
        print(json.dumps({"checkpoint": subject, "scores": scores}))
    else:
        table = Table("score", "value")
        for name, value in scores.items():
            table.add_row(name, f"{value:.3f}")
        Console().print(table)


def sampling_of(arguments: EvaluateArguments) -> Sampling:
    """Return the settings of the sampler, with guidance."""
    scale = arguments.audio_guidance_scale
    return Sampling(arguments.num_steps, arguments.flow_shift, scale, arguments.seed)


class Sampler:
    """A checkpoint's network with the dataset and autoencoder to sample held-out clips."""

    def __init__(self, arguments: EvaluateArguments, checkpoint: Path, truth: Clips) -> None:
        """Raise DataError or CheckpointError if clips, encoders and checkpoint do not match."""
        # Clips, encoders and checkpoint must belong together.
        self.dataset = open_dataset(arguments.clips)
        check_same_clips(truth, self.dataset)
        self.vae = load_autoencoder(arguments.networks)
        check_encoders(checkpoint, demo_encoders(self.vae).fingerprints)
        check_encoders(checkpoint, self.dataset.encoders)
        self.net: Net = load_policy(checkpoint)

    def sample(self, title: str, indices: range, task: str, sampling: Sampling) -> Tensor:
        """Return generated clips [N, 3, T, Y, X] in [-1, 1] for some held-out clips."""
        with progress(title, len(indices)) as advance:
            return sample_pixels(self.net, self.vae, self.dataset, indices, task, sampling,
                                 lambda done: advance(done, ""))  # fmt: skip


def score_checkpoint(arguments: EvaluateArguments, checkpoint: Path) -> dict[str, float]:
    """Return the scores of clips sampled from a checkpoint; write some of the clips."""
    # Sample all clips with guidance, and score them.
    truth = load_clips(arguments.raw, arguments.num_clips)
    cepstra, indices, task = cepstra_of(truth), range(len(truth.keys)), str(arguments.task)
    sampler = Sampler(arguments, checkpoint, truth)
    name, sampling = arguments.row_name, sampling_of(arguments)
    pixels = sampler.sample(f"sampling from {name}", indices, task, sampling)
    judges = judges_of(arguments.networks, arguments.real, 4 * len(indices))
    scores = score_clips(judges, pixels, truth, cepstra)

    # Guidance needs a second forward; preference training can teach part of its effect.
    if arguments.unguided:
        unguided = sampler.sample(f"sampling from {name}, unguided", indices, task,
                                  sampling._replace(audio_scale=1.0))  # fmt: skip
        unguided_scores = score_clips(judges, unguided, truth, cepstra)
        for score in UNGUIDED:
            if score in unguided_scores:
                stem = score.removesuffix("_demo")
                scores[f"{stem}_unguided{score.removeprefix(stem)}"] = unguided_scores[score]

    if arguments.samples:
        keep_samples(arguments.samples, pixels, truth, arguments.num_samples)
    if arguments.task_samples:
        sample_tasks(arguments, sampler, truth)
    return scores


def score_reference(arguments: EvaluateArguments) -> dict[str, float]:
    """Return the scores of the held-out clips, with their own audio or the previous clip's."""
    truth = load_clips(arguments.raw, arguments.num_clips)
    if arguments.reference == "shuffled_sound":
        visemes = truth.visemes if truth.visemes is None else truth.visemes.roll(1, 0)
        truth = truth._replace(samples=truth.samples.roll(1, 0), visemes=visemes)
    judges = judges_of(arguments.networks, arguments.real, 4 * len(truth.keys))
    pixels = truth.float_pixels()
    scores = score_clips(judges, pixels, truth, cepstra_of(truth))
    if arguments.samples:
        keep_samples(arguments.samples, pixels, truth, arguments.num_samples)
    return scores


@lru_cache(maxsize=1)  # shared by several evaluations in one process, as in the demo
def judges_of(networks: Path, real: Path, num_clips: int) -> Judges:
    """Return the judges, with the features of real clips for FID and FVD."""
    return load_judges(networks, load_clips(real, num_clips))


def sample_tasks(arguments: EvaluateArguments, sampler: Sampler, truth: Clips) -> None:
    """Write one clip of every task that is not scored, each with another talker."""
    # Each task uses another held-out clip.
    assert arguments.task_samples
    arguments.task_samples.mkdir(parents=True, exist_ok=True)
    for index, task in enumerate(name for name in TASKS if name != arguments.task):
        at = index % len(truth.keys)
        pixels = sampler.sample(f"sampling {task}", range(at, at + 1), task, sampling_of(arguments))
        path = arguments.task_samples / f"{task}.mp4"
        write_video(path, to_frames(pixels[0]), truth.samples[at].numpy())


def keep_samples(folder: Path, pixels: Tensor, truth: Clips, count: int) -> None:
    """Write the first clips as mp4 files with their audio."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, clip, samples in zip(truth.keys[:count], pixels, truth.samples, strict=False):
        write_video(folder / f"{key}.mp4", to_frames(clip), samples.numpy())


def add_row(path: Path, name: str, seed: int, scores: dict[str, float]) -> None:
    """Add a row to a score table, in place of an earlier one of the same name and seed."""
    # Keep the rows of other checkpoints.
    try:
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        rows = [row for row in rows if (row["checkpoint"], row["seed"]) != (name, seed)]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a table of scores ({error}); remove it") from error
    rows.append({"checkpoint": name, "seed": seed, "scores": scores})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"rows": rows}, indent=1).encode())
