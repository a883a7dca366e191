"""The commands `echolab generate`, `evaluate`, `pairs` and `fit`: arguments and entry points.

This module imports nothing heavy, so that a wrong argument is refused at once.  Each entry point
parses and checks the arguments, and then imports torch with the module that does the work.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from echolab.arguments import argument, check_exists, parse
from echolab.atomic_io import check_writable
from echolab.errors import ConfigError
from echolab.inference.generate_arguments import DEMO_VAE, GenerateArguments
from echolab.tasks.table import DEFAULT_TASK, TASKS
from echolab.tracking.score_table import REFERENCES

DEMO_DATA = Path("runs/demo/data")
MADE = {"sample": "prompts", "score": "verdicts", "pack": "pairs"}  # by action of `pairs`
PAIRS_INPUTS = {"sample": ("clips", "checkpoint"), "score": ("raw", "networks"), "pack": ("clips",)}


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Sample held-out clips with a checkpoint's averaged weights and score them.

    Demo networks compute the scores (`_demo`): Sync-C and Sync-D by the published formula, FID and
    FVD against clips of `real`, the correlation of the mouth with the true visemes if these are
    known, PSNR of the first frame.  With reference= the held-out clips themselves are scored.
    """

    checkpoint: Path | None = argument(
        "run or checkpoint", None, section="What is scored", aka=("run", "run_dir", "weights")
    )
    reference: str | None = argument(
        "score the held-out clips instead: as recorded, after the autoencoder, or with the audio "
        "of another clip", None,
        choices=REFERENCES, default_text="a checkpoint",
    )  # fmt: skip
    watch: Path | None = argument(
        "score each new checkpoint of a run by the run's own settings evaluation.* and metrics.*, "
        "until its last step", None, default_text="a checkpoint",
    )  # fmt: skip
    once: bool = argument("watch: score the checkpoints that exist, and end", False)
    poll_seconds: float = argument(
        "watch: seconds between two looks at the run", 30.0, gt=0, le=86400
    )
    raw: Path = argument("held-out clips, raw", DEMO_DATA / "raw_held_out", section="Data")
    clips: Path = argument("the same clips, encoded", DEMO_DATA / "held_out")
    real: Path = argument("raw clips that FID and FVD compare with", DEMO_DATA / "raw_train")
    metrics: str = argument("metrics: a choice of conf/metrics, or a YAML file", "demo")
    score: tuple[str, ...] = argument(
        "scores to compute; an error if one of them cannot be", (), default_text="all that can be"
    )
    networks: Path = argument("folder of networks of `echolab fit`", DEMO_VAE.parent)
    vae: Path | None = argument(
        "autoencoder of the clips: the demo's file, or the released file or folder", None,
        default_text="that of networks",
    )  # fmt: skip
    task: str = argument("task to sample", DEFAULT_TASK, section="Sampling", choices=TASKS)
    num_clips: int = argument("number of clips", 64, ge=1)
    num_steps: int = argument("solver steps", 10, ge=1)
    flow_shift: float = argument("flow shift of the noise levels", 3.0, gt=0, le=1000)
    audio_guidance_scale: float = argument("audio guidance; 1 is no guidance", 2.0, ge=0)
    unguided: bool = argument("sample and score without audio guidance as well", False)
    seed: int = argument("seed of the noise", 0, ge=0)
    batch_size: int = argument("clips in one call of the network", 32, ge=1)
    scores: Path | None = argument(
        "score table to add a row to, for `echolab report`", None, section="Output",
        default_text="no table",
    )  # fmt: skip
    name: str | None = argument("name of the row", None, default_text="the run's")
    train_seed: int = argument("seed of the training, for the row", 0, ge=0)
    samples: Path | None = argument(
        "folder for the first clips, as mp4 with their audio", None, default_text="not kept"
    )
    num_samples: int = argument("clips to keep in samples", 6, ge=1)
    task_samples: Path | None = argument(
        "folder for one clip of every other task, as mp4", None, default_text="not sampled"
    )
    table: Literal["paper"] | None = argument(
        "print the rows of scores= with published ones, each with its metric card; alone, it "
        "samples nothing", None, default_text="this row",
    )  # fmt: skip
    format: Literal["text", "json"] = argument("output format", "text")

    @property
    def only_table(self) -> bool:
        """True if nothing is scored, and only the rows of a score table are printed."""
        subjects = (self.checkpoint, self.reference, self.watch)
        return self.table is not None and all(subject is None for subject in subjects)

    def check(self) -> None:
        """Raise ConfigError unless exactly one subject of the scores is given, or a table."""
        if self.only_table:
            if self.scores is None:
                raise ConfigError(f"table={self.table}: needs scores= or a run; give one")
            check_exists(self, "scores")
        elif self.watch is not None:
            self._check_watch()
        elif (self.checkpoint is None) == (self.reference is None):
            raise ConfigError(
                "echolab evaluate: needs checkpoint= or reference=, not both; give one"
            )

    def _check_watch(self) -> None:
        """Raise ConfigError for arguments that have no effect, since the run has settings."""
        check_exists(self, "watch")
        for field in fields(self):
            own = field.name in ("watch", "once", "poll_seconds")
            if not own and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"{field.name}=: has no effect with watch=, which uses the run's settings "
                    "evaluation.* and metrics.*; leave it out"
                )

    @property
    def row_name(self) -> str:
        """The name of the row in the score table."""
        return (
            self.name or self.reference or str(self.checkpoint and self.checkpoint.resolve().name)
        )


@dataclass(frozen=True, kw_only=True)
class PairsArguments:
    """Make preference data with a checkpoint: sample candidates, score them, pack best and worst.

    sample: needs checkpoint=, clips= (encoded).  score: needs raw= and networks=.  pack: needs
    clips= and out=.  The same command resumes an action that was stopped.
    """

    action: Literal["sample", "score", "pack"] = argument("step of the preference round")
    folder: Path = argument("folder of candidates and verdicts")
    clips: Path | None = argument("encoded dataset of the prompts", None)
    checkpoint: Path | None = argument(
        "run or checkpoint", None, section="sample", aka=("run", "run_dir", "weights")
    )
    num_prompts: int = argument("clips to sample for", 128, ge=1)
    num_candidates: int = argument("samples per prompt", 4, ge=1)
    num_steps: int = argument("solver steps", 10, ge=1)
    flow_shift: float = argument("flow shift of the noise levels", 5.0, gt=0, le=1000)
    audio_guidance_scales: tuple[float, ...] = argument(
        "audio guidance of the candidates, cycled; 1 is no guidance, 0 no audio",
        (0.0, 1.0, 2.0, 4.0), ge=0,
    )  # fmt: skip
    seed: int = argument("seed of the candidates' noise", 0, ge=0)
    raw: Path | None = argument("the same clips, raw", None, section="score")
    networks: Path | None = argument("folder of networks of `echolab fit`", None)
    out: Path | None = argument("the new preference dataset", None, section="pack")
    min_margin: float = argument("least score difference, in standard deviations", 0.5, ge=0)
    format: Literal["text", "json"] = argument("summary format", "text", section="Output")

    def check(self) -> None:
        """Raise EcholabError unless the paths that the action reads are given and exist."""
        # Datasets must be of the kind that the action reads.
        kinds = {"raw": "raw", "clips": "encoded"}
        for name in PAIRS_INPUTS[self.action]:
            path = self.required(name)
            if name in kinds:
                check_dataset(name, path, kinds[name])
            else:
                check_exists(self, name)
        if self.action == "pack":
            self.required("out")

    # Required inputs depend on the action, so the fields are optional.
    def required(self, name: str) -> Path:
        """Return an argument that the action needs.  Raise ConfigError if it was not given."""
        value: Path | None = getattr(self, name)
        if value is None:
            raise ConfigError(f"echolab pairs {self.action}: give {name}=")
        return value


@dataclass(frozen=True, kw_only=True)
class FitArguments:
    """Fit a demo network on a small raw dataset.

    autoencoder: pixels to latents and back.  sync: lips and speech, for Sync-C_demo.  frames and
    clips: features for FID_demo and FVD_demo, which need drawn talkers, whose visemes are known.
    The same command resumes a fit that was stopped.
    """

    network: Literal["autoencoder", "sync", "frames", "clips"] = argument("network to fit")
    data: Path = argument("raw dataset")
    out: Path = argument("file of the fitted network, .safetensors")
    steps: int = argument("optimizer steps", 800, ge=1)
    first_clip: int = argument("first clip to fit on, from 0", 0, ge=0)
    num_clips: int | None = argument("clips to fit on", None, ge=1, default_text="all others")
    vae: Path | None = argument(
        "autoencoder; sync: fit on its reconstructions of the clips as well", None,
        default_text="none", aka=("autoencoder",),
    )  # fmt: skip
    seed: int = argument("seed of initialization and batches", 0, ge=0)
    format: Literal["text", "json"] = argument("summary format", "text")


def check_dataset(key: str, folder: Path, kind: str) -> None:
    """Raise DataError, naming the argument, unless a folder holds a dataset of this kind."""
    # Read only the head of dataset.json.
    from echolab.config.paths import check_dataset_head

    check_dataset_head(key, folder, kind)


# -- entry points --------------------------------------------------------------------------------


def generate(argv: list[str]) -> int:
    """Generate a talking video."""
    # Check arguments, then output and inputs, before torch is imported.
    arguments = parse(GenerateArguments, argv, command="echolab generate")
    arguments.check()
    check_writable(arguments.out)
    arguments.check_files()
    from echolab.inference.generate import generate_video

    return generate_video(arguments, argv)


def evaluate(argv: list[str]) -> int:
    """Sample held-out clips from a checkpoint and score them: one row of the score table."""
    command = "echolab evaluate"
    arguments = parse(EvaluateArguments, argv, command=command, positional=("checkpoint",))
    arguments.check()
    if arguments.only_table:
        from echolab.tracking.published import print_paper_table, read_rows

        assert arguments.scores
        print_paper_table(read_rows(arguments.scores), arguments.format)
        return 0
    if arguments.watch:
        from echolab.inference.watch import watch

        return watch(arguments.watch, once=arguments.once, poll_seconds=arguments.poll_seconds)
    check_exists(arguments, "checkpoint")
    # All datasets are checked before torch is imported.
    check_dataset("raw", arguments.raw, "raw")
    check_dataset("real", arguments.real, "raw")
    if arguments.checkpoint:
        check_dataset("clips", arguments.clips, "encoded")
    check_exists(arguments, "networks")
    check_exists(arguments, "vae")
    for folder in (arguments.samples, arguments.task_samples):
        if folder:
            check_writable(folder, folder=True)
    from echolab.inference.evaluate import evaluate_checkpoint

    evaluate_checkpoint(arguments)
    return 0


def pairs(argv: list[str]) -> int:
    """Run one action of a preference round and print a summary."""
    command = "echolab pairs"
    arguments = parse(PairsArguments, argv, command=command, positional=("action", "folder"))
    check_writable(arguments.folder, folder=True)
    arguments.check()
    from echolab.inference.pairs import pack, sample, score

    # Run the action, which returns the number of items that it made.
    made = {"sample": sample, "score": score, "pack": pack}[arguments.action](arguments)
    # Print a summary.
    figures = {"folder": str(arguments.folder), "action": arguments.action, "made": made}
    written = arguments.out if arguments.action == "pack" else arguments.folder
    plain = f"{written}: {made} {MADE[arguments.action]}"
    print(json.dumps(figures) if arguments.format == "json" else plain)
    return 0


def fit(argv: list[str]) -> int:
    """Fit a demo network and print a summary."""
    command = "echolab fit"
    arguments = parse(FitArguments, argv, command=command, positional=("network", "data", "out"))
    if arguments.vae and arguments.network != "sync":
        raise ConfigError(f"vae={arguments.vae}: is for the network sync; leave it out")
    check_writable(arguments.out)
    check_dataset("data", arguments.data, "raw")
    check_exists(arguments, "vae")
    from echolab.inference.fit import fit_network, read_clips

    # Fit, then print the last loss.
    clips = read_clips(arguments.data, arguments.first_clip, arguments.num_clips, arguments.vae)
    loss = fit_network(
        arguments.network, clips, arguments.out, steps=arguments.steps, seed=arguments.seed
    )
    figures = {"out": str(arguments.out), "steps": arguments.steps, "loss": loss}
    plain = f"{arguments.out}: {arguments.network} after {arguments.steps} steps, loss {loss:.4f}"
    print(json.dumps(figures) if arguments.format == "json" else plain)
    return 0
