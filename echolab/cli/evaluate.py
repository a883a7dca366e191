"""`echolab evaluate RUN`: sample held-out clips from a checkpoint and score them: one table row."""

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from torch import Tensor

from echolab.arguments import parse
from echolab.atomic_io import prove_writable, write_whole
from echolab.config.networks import check_encoders, last_checkpoint, load_policy
from echolab.data.clips import load_clips, to_frames
from echolab.data.media import write_video
from echolab.data.shard_reader import open_dataset
from echolab.diffusion.guidance import Net
from echolab.encoders.encode import demo_encoders
from echolab.errors import ConfigError, DataError
from echolab.inference.judging import (
    Sampling,
    check_same_clips,
    load_autoencoder,
    load_judges,
    sample_pixels,
)
from echolab.metrics.scores import Judges, cepstra_of, score_clips
from echolab.progress import progress
from echolab.tasks.table import DEFAULT_TASK, TASKS
from echolab.tracking.score_table import REFERENCES
from echolab.types import Clips

UNGUIDED = ("sync_c_demo", "mouth_corr")  # scores that are also taken without audio guidance


@dataclass(frozen=True)
class EvaluateArguments:
    """Sample held-out clips with a checkpoint's averaged weights and score them.

    Scores are those of demo networks (`_demo`): Sync-C and Sync-D by the published formula, FID and
    FVD against clips of `real`, the correlation of the mouth with the true visemes if those are
    known, PSNR of the first frame.  With reference= the held-out clips themselves are scored.
    """

    checkpoint: Path | None = field(default=None, metadata={"help": "run or checkpoint"})
    reference: Literal["none", *REFERENCES] = field(  # type: ignore[valid-type]
        default="none",
        metadata={
            "help": "score the clips themselves, with their own or the previous clip's audio"
        },
    )
    raw: Path = field(
        default=Path("runs/demo/data/raw_held_out"), metadata={"help": "held-out clips, raw"}
    )
    clips: Path = field(
        default=Path("runs/demo/data/held_out"), metadata={"help": "the same clips, encoded"}
    )
    real: Path = field(
        default=Path("runs/demo/data/raw_train"), metadata={"help": "raw clips that FID compares"}
    )
    networks: Path = field(
        default=Path("runs/demo/networks"), metadata={"help": "folder of networks of `echolab fit`"}
    )
    task: Literal[TASKS] = field(default=DEFAULT_TASK, metadata={"help": "task to sample"})  # type: ignore[valid-type]
    num_clips: int = field(default=64, metadata={"ge": 1, "help": "number of clips"})
    num_steps: int = field(default=10, metadata={"ge": 1, "help": "solver steps"})
    flow_shift: float = field(
        default=3.0, metadata={"gt": 0, "le": 1000, "help": "flow shift of the noise levels"}
    )
    audio_guidance_scale: float = field(
        default=2.0, metadata={"ge": 0, "help": "audio guidance scale; 1 is no guidance"}
    )
    unguided: bool = field(
        default=False, metadata={"help": "sample and score without audio guidance as well"}
    )
    seed: int = field(default=0, metadata={"ge": 0, "help": "seed of the noise"})
    scores: Path | None = field(
        default=None, metadata={"help": "scores.json to add the row to, for `echolab report`"}
    )
    name: str | None = field(default=None, metadata={"help": "name of the row; none: the run's"})
    train_seed: int = field(default=0, metadata={"ge": 0, "help": "seed of the row's training"})
    samples: Path | None = field(
        default=None, metadata={"help": "folder for the first clips, as mp4 with their audio"}
    )
    num_samples: int = field(default=6, metadata={"ge": 1, "help": "clips to keep in samples"})
    task_samples: Path | None = field(
        default=None, metadata={"help": "folder for one clip of every other task, as mp4"}
    )
    format: Literal["text", "json"] = field(default="text", metadata={"help": "output format"})

    @property
    def row_name(self) -> str:
        """Name of the row in the score table."""
        if self.name or self.reference != "none":
            return self.name or str(self.reference)
        return str(self.checkpoint and self.checkpoint.resolve().name)

    @property
    def sampling(self) -> Sampling:
        """Settings of the sampler, with guidance."""
        return Sampling(self.num_steps, self.flow_shift, self.audio_guidance_scale, self.seed)


class Sampler:
    """A checkpoint's network, and what it needs to sample held-out clips."""

    def __init__(self, arguments: EvaluateArguments, checkpoint: Path, truth: Clips) -> None:
        """Raise DataError or CheckpointError if clips, encoders and checkpoint do not match."""
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


def main(argv: list[str]) -> int:
    """Sample and score as the arguments say, and print the scores."""
    arguments = parse(
        EvaluateArguments, argv, command="echolab evaluate", positional=("checkpoint",)
    )
    if (arguments.checkpoint is None) == (arguments.reference == "none"):
        raise ConfigError("echolab evaluate: needs checkpoint= or reference=, and not both")
    for folder in (arguments.samples, arguments.task_samples):
        if folder:
            prove_writable(folder, folder=True)

    # Score generated clips, or the held-out clips themselves.
    subject = str(arguments.reference)
    if arguments.checkpoint:
        checkpoint = last_checkpoint(arguments.checkpoint)
        subject, scores = str(checkpoint), score_checkpoint(arguments, checkpoint)
    else:
        scores = score_reference(arguments)

    if arguments.scores:
        add_row(arguments.scores, arguments.row_name, arguments.train_seed, scores)
    if arguments.format == "json":
        print(json.dumps({"checkpoint": subject, "scores": scores}))
    else:
        table = Table("score", "value")
        for name, value in scores.items():
            table.add_row(name, f"{value:.3f}")
        Console().print(table)
    return 0


def score_checkpoint(arguments: EvaluateArguments, checkpoint: Path) -> dict[str, float]:
    """Return the scores of clips sampled from a checkpoint; keep some of the clips."""
    truth = load_clips(arguments.raw, arguments.num_clips)
    cepstra, indices, task = cepstra_of(truth), range(len(truth.keys)), str(arguments.task)
    sampler = Sampler(arguments, checkpoint, truth)
    name, sampling = arguments.row_name, arguments.sampling
    pixels = sampler.sample(f"sampling from {name}", indices, task, sampling)
    judges = judges_of(arguments.networks, arguments.real, 4 * len(indices))
    scores = score_clips(judges, pixels, truth, cepstra)

    # Guidance costs a second pass; preference training can teach part of its effect.
    if arguments.unguided:
        unguided = sampler.sample(f"sampling from {name}, unguided", indices, task,
                                  sampling._replace(audio_scale=1.0))  # fmt: skip
        without = score_clips(judges, unguided, truth, cepstra)
        for score in UNGUIDED:
            if score in without:
                stem = score.removesuffix("_demo")
                scores[f"{stem}_unguided{score.removeprefix(stem)}"] = without[score]

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


@lru_cache(maxsize=1)  # several evaluations of one process, as in the demo, share them
def judges_of(networks: Path, real: Path, num_clips: int) -> Judges:
    """Return the judges, with the features of real clips that FID and FVD compare with."""
    return load_judges(networks, load_clips(real, num_clips))


def sample_tasks(arguments: EvaluateArguments, sampler: Sampler, truth: Clips) -> None:
    """Write one clip of every task that is not scored, each of another talker."""
    assert arguments.task_samples
    arguments.task_samples.mkdir(parents=True, exist_ok=True)
    for index, task in enumerate(name for name in TASKS if name != arguments.task):
        at = index % len(truth.keys)
        pixels = sampler.sample(f"sampling {task}", range(at, at + 1), task, arguments.sampling)
        path = arguments.task_samples / f"{task}.mp4"
        write_video(path, to_frames(pixels[0]), truth.samples[at].numpy())


def keep_samples(folder: Path, pixels: Tensor, truth: Clips, count: int) -> None:
    """Write the first clips as mp4 files with their audio."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, clip, samples in zip(truth.keys[:count], pixels, truth.samples, strict=False):
        write_video(folder / f"{key}.mp4", to_frames(clip), samples.numpy())


def add_row(path: Path, name: str, seed: int, scores: dict[str, float]) -> None:
    """Add a row to a score table, in place of an earlier one of the same name and seed."""
    try:
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        rows = [row for row in rows if (row["checkpoint"], row["seed"]) != (name, seed)]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a table of scores ({error}); remove it") from error
    rows.append({"checkpoint": name, "seed": seed, "scores": scores})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"rows": rows}, indent=1).encode())
