"""`echolab demo`: run the public commands on two CPU cores, from drawn talkers to a report.

The demo is a list of commands, as a user would type them.  stages.json records which are done, so
the same `echolab demo` resumes after a stop; each command resumes its own work.
"""

import json
import secrets
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from echolab.arguments import argument, parse
from echolab.atomic_io import write_atomic
from echolab.errors import ConfigError
from echolab.launch.run_dir import held
from echolab.tracking.score_table import BOUNDS

STAGES = "stages.json"
CHECKPOINTS = ("sft", "sft_longer", "ndpo", "dpo")
FIRST_HELD_OUT = 1_000_000  # index of the first held-out talker: none is in the training set
INDEX = "dataset.json"  # the file that every dataset has, written last
BATCH = 16  # batch_size of conf/experiment/demo_sft.yaml: the least size of a dataset
SFT_STEPS, PREFERENCE_STEPS = 800, 30  # as in conf/experiment/demo_*.yaml
ABOUT = (
    "Talking faces drawn by the program, with a synthesized voice. The network has seen none of "
    "these talkers: it is given the first frame, the audio and a caption, and generates the rest. "
    "Scores are those of small demo networks, and say so in their names; click a clip to hear it."
)


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """Draw talkers, train all networks on them, compare supervised and preference training.

    The defaults take about thirteen minutes on two slow cores.  The table in the README is the
    result of `seeds=3`.
    """

    out: Path = argument("folder of the demo", Path("runs/demo"))
    seeds: int = argument("number of trainings, each from another seed", 1, ge=1)
    train_clips: int = argument("talkers to train on", 640, ge=BATCH, section="Data")
    held_out_clips: int = argument("talkers to score on", 64, ge=BATCH)
    data_seed: int = argument("seed of the talkers", 0, ge=0)
    autoencoder_steps: int = argument(
        "optimizer steps of the video autoencoder", 500, ge=1, section="Training"
    )
    sync_steps: int = argument("optimizer steps of each of the two SyncNets", 220, ge=1)
    feature_steps: int = argument("optimizer steps of the frame features", 160, ge=1)
    sft_steps: int = argument("supervised steps over all tasks", SFT_STEPS, ge=1)
    preference_steps: int = argument("preference steps per cycle", PREFERENCE_STEPS, ge=1)
    prompts: int = argument("clips to sample pairs for", 128, ge=1, section="Sampling")
    candidates: int = argument("samples per prompt", 4, ge=2)
    sampling_steps: int = argument("solver steps", 10, ge=1)
    format: Literal["text", "json"] = argument("summary format", "text", section="Output")

    def check(self) -> None:
        """Raise ConfigError for numbers that exclude each other."""
        if self.prompts > self.train_clips:
            raise ConfigError(
                f"prompts={self.prompts}: more than train_clips={self.train_clips}; give fewer"
            )


class Stage(NamedTuple):
    """One command of the demo."""

    name: str
    words: tuple[str, ...]  # for example echolab fit sync DATA OUT
    result: Path | None = None  # file that the command writes last, if any

    @property
    def shown(self) -> str:
        """The command line as a user types it."""
        program = {"data_prep": "python -m data_prep"}.get(self.words[0], self.words[0])
        return f"{program} {shlex.join(self.words[1:])}"


# -- the commands --------------------------------------------------------------------------------


def stages(demo: DemoArguments, token: str) -> Iterator[Stage]:
    """Yield all commands in order.  `token` is part of the wandb ids."""
    yield from preparation(demo)
    for seed in range(demo.seeds):
        yield from one_training(demo, seed)
    yield Stage(
        "report",
        ("echolab", "report", f"{demo.out}", "title=echolab demo", "compare=ground_truth,dpo",
         "wandb_project=echolab-demo", f"wandb_id=demo-{token}-scores"),
    )  # fmt: skip


def preparation(demo: DemoArguments) -> Iterator[Stage]:
    """Yield the commands that make data, demo networks and the reference rows of the table."""
    data, networks = demo.out / "data", demo.out / "networks"
    # Talkers for training, and other talkers for scoring.
    for name, clips, first in (
        ("train", demo.train_clips, 0),
        ("held_out", demo.held_out_clips, FIRST_HELD_OUT),
    ):
        folder = data / f"raw_{name}"
        numbers = (f"num_clips={clips}", f"seed={demo.data_seed}", f"first={first}")
        yield Stage(f"draw {name}", ("data_prep", "draw", f"{folder}", *numbers), folder / INDEX)

    # The SyncNet that judges pairs and the one that evaluates share neither seed nor talkers.
    half, vae = demo.train_clips // 2, networks / "autoencoder.safetensors"
    networks_to_fit: tuple[tuple[str, str, int, int, tuple[str, ...]], ...] = (
        ("autoencoder", "autoencoder", demo.autoencoder_steps, 0, ()),
        ("sync_judge", "sync", demo.sync_steps, 1, (f"num_clips={half}", f"vae={vae}")),
        ("sync_evaluator", "sync", demo.sync_steps, 2, (f"first_clip={half}", f"vae={vae}")),
        ("frames", "frames", demo.feature_steps, 3, ()),
        ("clips", "clips", max(1, demo.feature_steps // 2), 4, ()),
    )
    # Fit each network by a separate command.
    for name, network, steps, seed, further in networks_to_fit:
        file = networks / f"{name}.safetensors"
        words = (network, f"{data}/raw_train", f"{file}", f"steps={steps}", f"seed={seed}")
        yield Stage(f"fit {name}", ("echolab", "fit", *words, *further), file)

    # Encode both datasets with the autoencoder.
    for name in ("train", "held_out"):
        folder = data / name
        encode = ("data_prep", "encode", f"{data}/raw_{name}", f"{folder}", f"vae={vae}")
        yield Stage(f"encode {name}", encode, folder / INDEX)
    # Score the references: the ground truth, and the ground truth with another clip's audio.
    for name in BOUNDS:
        chosen = (f"reference={name}", f"samples={demo.out}/samples/{name}")
        yield Stage(f"score {name}", ("echolab", "evaluate", *chosen, *evaluation(demo)))


def one_training(demo: DemoArguments, seed: int) -> Iterator[Stage]:
    """Yield the commands that train and score all checkpoints from one seed."""
    for name in CHECKPOINTS:
        # Make the preference data with the supervised checkpoint.
        if name == "ndpo":
            yield from preference_round(demo, seed)
        run = demo.out / f"seed_{seed}" / name
        yield Stage(f"{name} {seed}", ("echolab", "train", *training(demo, name, seed)))
        words = [f"name={name}", f"train_seed={seed}", "unguided=true"]
        if seed == 0:  # the report shows clips of one training only
            words.append(f"samples={demo.out}/samples/{name}")
            if name == CHECKPOINTS[-1]:
                words.append(f"task_samples={demo.out}/samples/other_tasks")
        yield Stage(
            f"score {name} {seed}",
            ("echolab", "evaluate", f"{run}", *words, *sampling(demo), *evaluation(demo)),
        )


def training(demo: DemoArguments, name: str, seed: int) -> list[str]:
    """Return the settings of one training: an experiment file, and overrides of the demo."""
    import torch

    from echolab.fitting import work_dtype

    # Replace the folders of the experiment file by folders of this demo.
    folder = demo.out / f"seed_{seed}"
    words = [
        f"experiment=demo_{name}",
        f"run_dir={folder / name}",
        f"data.clips={demo.out}/data/train",
        f"data.val_clips={demo.out}/data/held_out",
    ]
    if work_dtype() == torch.bfloat16:
        words.append("trainer.precision=bf16-mixed")  # the CPU supports bf16
    # Preference runs start from the supervised run, with another seed.
    if name == "sft":
        words += [f"seed={seed}", *shortened(name, demo.sft_steps / SFT_STEPS)]
    else:
        words += [f"seed={1000 + seed}", f"init_from={folder}/sft"]
        words += shortened(name, demo.preference_steps / PREFERENCE_STEPS)
    if name in ("ndpo", "dpo"):
        words.append(f"data.pairs={folder}/pairs")
    return words


def shortened(name: str, scale: float) -> list[str]:
    """Return the settings that make an experiment `scale` times as long; none for 1."""
    if scale == 1:
        return []
    from echolab.config.compose import compose

    # Scale every count of steps of the experiment.
    config = compose([f"experiment=demo_{name}"])
    schedule, tasks = config["schedule"], config["tasks"]
    for part in [*schedule["epochs"], *tasks["stages"]]:
        part["steps"] = max(1, round(part["steps"] * scale))
    ema_decay = max(0.5, 1 - (1 - tasks["ema_decay"]) / scale)
    return [
        f"schedule.epochs={in_hydra(schedule['epochs'])}",
        f"schedule.warmup={max(1, round(schedule['warmup'] * scale))}",
        f"tasks.stages={in_hydra(tasks['stages'])}",
        f"tasks.ema_decay={ema_decay}",
        f"val_every={max(1, round(config['val_every'] * scale))}",
    ]


def in_hydra(value: Any) -> str:
    """Return a plain value in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{in_hydra(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(in_hydra, value)) + "]"
    return "null" if value is None else str(value)


def preference_round(demo: DemoArguments, seed: int) -> Iterator[Stage]:
    """Yield the commands that make preference pairs with the supervised checkpoint."""
    folder, data = demo.out / f"seed_{seed}", demo.out / "data"
    pairs = ("echolab", "pairs")
    yield Stage(
        f"pairs sample {seed}",
        (*pairs, "sample", f"{folder}/candidates", f"checkpoint={folder}/sft",
         f"clips={data}/train", f"num_prompts={demo.prompts}",
         f"num_candidates={demo.candidates}", f"num_steps={demo.sampling_steps}",
         "flow_shift=3.0", f"seed={100 + seed}"),
    )  # fmt: skip
    yield Stage(
        f"pairs score {seed}",
        (*pairs, "score", f"{folder}/candidates", f"raw={data}/raw_train",
         f"networks={demo.out}/networks"),
    )  # fmt: skip
    yield Stage(
        f"pairs pack {seed}",
        (*pairs, "pack", f"{folder}/candidates", f"clips={data}/train", f"out={folder}/pairs"),
        folder / "pairs" / INDEX,
    )


def sampling(demo: DemoArguments) -> list[str]:
    """Return the arguments for sampling from checkpoints."""
    return [f"num_steps={demo.sampling_steps}", "flow_shift=3.0", "audio_guidance_scale=1.5"]


def evaluation(demo: DemoArguments) -> list[str]:
    """Return the arguments that all rows of the score table share."""
    data = demo.out / "data"
    return [
        f"num_clips={demo.held_out_clips}", f"raw={data}/raw_held_out", f"clips={data}/held_out",
        f"real={data}/raw_train", f"networks={demo.out}/networks",
        f"scores={demo.out}/scores.json",
    ]  # fmt: skip


# -- running them --------------------------------------------------------------------------------


class Progress:
    """The stages that are done, with the seconds of each, stored in the folder."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Read the stages of an earlier start.  Raise ConfigError if its settings differ."""
        self.path, self.settings = path, settings
        self.seconds: dict[str, float] = {}
        self.token = secrets.token_hex(4)
        if not path.exists():
            self.write()
            return
        kept = json.loads(path.read_text())
        for key, value in settings.items():
            if kept["settings"].get(key) != value:
                raise ConfigError(
                    f"{path.parent}: holds a demo with {key}={kept['settings'].get(key)}, "
                    f"not {value}; give out=FOLDER for another"
                )
        self.seconds, self.token = kept["seconds"], kept["token"]

    def write(self) -> None:
        """Write the file atomically."""
        state = {"settings": self.settings, "token": self.token, "seconds": self.seconds}
        write_atomic(self.path, json.dumps(state, indent=1).encode())

    def run(self, stage: Stage) -> int:
        """Run a stage's command unless it is done, and return its exit code."""
        # Skip a stage that is recorded as done.
        if stage.name in self.seconds:
            return 0
        began = time.monotonic()
        code = 0
        # The command may be complete although its stage was not recorded.
        if stage.result is None or not stage.result.exists():
            print(f"$ {stage.shown}", file=sys.stderr, flush=True)
            code = self._call(stage)
        if code == 0:
            self.seconds[stage.name] = round(time.monotonic() - began, 1)
            self.write()
        return code

    def _call(self, stage: Stage) -> int:
        from data_prep import __main__ as data_prep
        from echolab.cli import __main__ as echolab_cli

        program, *words = stage.words
        # Call the entry point in this process, to save the imports of a new process.
        entry_point = {"echolab": echolab_cli.main, "data_prep": data_prep.main}[program]
        with redirect_stdout(sys.stderr):  # standard output is the demo's own summary
            return entry_point(words)


def main(argv: list[str]) -> int:
    """Run all commands that are not done, and print the score table."""
    demo = parse(DemoArguments, argv, command="echolab demo")
    demo.check()
    settings = {
        name: value
        for name, value in asdict(demo).items()
        if name not in ("out", "format", "seeds")
    }
    # Only one process at a time may use the folder.
    with held(demo.out):
        progress = Progress(demo.out / STAGES, settings)
        for stage in stages(demo, progress.token):
            # The report shows the seconds of all other stages.
            if stage.name == "report":
                progress.seconds.pop(
                    "report", None
                )  # with more seeds than before it is written again
                write_summary(demo, progress)
            if code := progress.run(stage):
                return code
    print_scores(demo, progress)
    return 0


def write_summary(demo: DemoArguments, progress: Progress) -> None:
    """Write summary.json, which the report shows at its top."""
    facts = {
        "about": ABOUT,
        "Talkers": f"{demo.train_clips} to train on, {demo.held_out_clips} held out",
        "Clip": "1 s, 64 x 64, 25 frames a second, 16 kHz",
        "Supervised steps": demo.sft_steps,
        "Seeds": demo.seeds,
        "Work": f"{sum(progress.seconds.values()) / 60:.1f} min",
    }
    write_atomic(demo.out / "summary.json", json.dumps(facts, indent=1).encode())


def print_scores(demo: DemoArguments, progress: Progress) -> None:
    """Print the score table; with format=json one line with the seconds of each stage too."""
    rows = json.loads((demo.out / "scores.json").read_text())["rows"]
    report = demo.out / "report.html"
    if demo.format == "json":
        print(json.dumps({"report": str(report), "scores": rows, "seconds": progress.seconds}))
        return
    # Use the columns of the last row, which has every score.
    names = list(rows[-1]["scores"])
    table = Table("checkpoint", "seed", *names)
    for row in rows:
        values = [row["scores"].get(name) for name in names]
        shown = ["-" if value is None else f"{value:.3f}" for value in values]
        table.add_row(row["checkpoint"], str(row["seed"]), *shown)
    Console(width=140).print(table)
    print(f"{sum(progress.seconds.values()):.0f} s of work; report: {report}")
