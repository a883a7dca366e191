"""`echolab evaluate checkpoint=RUN`: one row of the score table for a checkpoint."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from echolab.arguments import parse
from echolab.config.networks import check_encoders, last_checkpoint, load_policy
from echolab.data.clips import load_clips
from echolab.data.shard_reader import open_dataset
from echolab.encoders.encode import demo_encoders
from echolab.inference.judging import (
    Sampling,
    check_same_clips,
    load_autoencoder,
    load_judges,
    sample_pixels,
)
from echolab.metrics.scores import cepstra_of, score_clips
from echolab.progress import progress
from echolab.tasks.table import DEFAULT_TASK, TASKS


@dataclass(frozen=True)
class EvaluateArguments:
    """Sample held-out clips from a checkpoint's averaged weights and score them.

    The scores are those of stand-in networks (`_demo`): Sync-C and Sync-D by the published formula,
    FID and FVD against clips of `real`, the mouth's correlation with the true visemes where those
    are known, PSNR of the first frame.
    """

    checkpoint: Path = field(metadata={"help": "a run, or one of its checkpoints"})
    raw: Path = field(
        default=Path("runs/demo/data/raw_held_out"), metadata={"help": "held-out clips, raw"}
    )
    clips: Path = field(
        default=Path("runs/demo/data/held_out"), metadata={"help": "the same clips, encoded"}
    )
    real: Path = field(
        default=Path("runs/demo/data/raw_train"), metadata={"help": "raw clips to compare with"}
    )
    networks: Path = field(
        default=Path("runs/demo/networks"), metadata={"help": "fitted networks of `echolab fit`"}
    )
    task: Literal[TASKS] = field(default=DEFAULT_TASK, metadata={"help": "what is given"})  # type: ignore[valid-type]
    count: int = field(default=64, metadata={"ge": 1, "help": "how many clips"})
    steps: int = field(default=10, metadata={"ge": 1, "help": "of the sampler"})
    shift: float = field(
        default=3.0, metadata={"gt": 0, "le": 1000, "help": "of the sampler's noise levels"}
    )
    audio_scale: float = field(
        default=2.0, metadata={"ge": 0, "help": "guidance by sound; 1 is none"}
    )
    seed: int = field(default=0, metadata={"ge": 0, "help": "of the clips' noise"})
    format: Literal["text", "json"] = field(default="text", metadata={"help": "of the answer"})


def main(argv: list[str]) -> int:
    arguments = parse(
        EvaluateArguments, argv, command="echolab evaluate", positional=("checkpoint",)
    )
    checkpoint = last_checkpoint(arguments.checkpoint)
    truth, dataset = load_clips(arguments.raw, arguments.count), open_dataset(arguments.clips)
    check_same_clips(truth, dataset)
    sampling = Sampling(arguments.steps, arguments.shift, arguments.audio_scale, arguments.seed)
    video, numbers = load_autoencoder(arguments.networks), range(len(truth.keys))
    check_encoders(checkpoint, demo_encoders(video).fingerprints)
    check_encoders(checkpoint, dataset.encoders)
    net = load_policy(checkpoint)
    with progress("sampling", len(numbers)) as advance:
        pixels = sample_pixels(net, video, dataset, numbers, str(arguments.task), sampling,
                               lambda done: advance(done, ""))  # fmt: skip
    judges = load_judges(arguments.networks, load_clips(arguments.real, 4 * len(numbers)))
    scores = score_clips(judges, pixels, truth, cepstra_of(truth))
    if arguments.format == "json":
        print(json.dumps({"checkpoint": str(checkpoint), "scores": scores}))
    else:
        table = Table("score", "value")
        for name, value in scores.items():
            table.add_row(name, f"{value:.3f}")
        Console().print(table)
    return 0
