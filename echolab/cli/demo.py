"""`echolab demo`: the whole way on two CPU cores, from drawn talkers to a report.

Every stage leaves its result in the folder and is not done again: stopped at any point, the same
command goes on where it was.
"""

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from echolab.arguments import parse
from echolab.atomic_io import write_whole
from echolab.demo.judges import draw_talkers, encode_talkers, fit_judges
from echolab.demo.pages import sample_tasks, write_pages
from echolab.demo.runs import make_pairs, score, train
from echolab.demo.settings import DemoSettings, Folder
from echolab.errors import ConfigError
from echolab.launch.run_dir import held

STAGES = "stages.json"
CHECKPOINTS = ("sft", "sft_longer", "ndpo", "dpo")


@dataclass(frozen=True)
class DemoArguments(DemoSettings):
    """Draw talkers, train everything on them, compare supervised and preference training.

    The defaults take some thirteen minutes on two slow cores.  `seeds=3` is the longer run
    whose table is in the README.
    """

    out: Path = field(default=Path("runs/demo"), metadata={"help": "the demo's folder"})
    seeds: int = field(default=1, metadata={"ge": 1, "help": "trainings, each from another seed"})
    format: Literal["text", "json"] = field(default="text", metadata={"help": "of the summary"})


class Progress:
    """Which stages are done, and how long each took; kept in the folder."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}
        self.settings = settings
        self.token = secrets.token_hex(4)  # of the demo's wandb runs, kept from the first start
        if path.exists():
            kept = json.loads(path.read_text())
            for key, value in settings.items():
                if kept["settings"].get(key) != value:
                    raise ConfigError(
                        f"{path.parent}: holds a demo with {key}={kept['settings'].get(key)}, "
                        f"not {value}; give out=FOLDER for another"
                    )
            self.seconds, self.token = kept["seconds"], kept["token"]
        else:
            self.write()

    def run(self, name: str, stage: Callable[[], None]) -> None:
        """Do a stage unless it is done."""
        if name in self.seconds:
            return
        began = time.monotonic()
        stage()
        self.seconds[name] = round(time.monotonic() - began, 1)
        self.write()

    def write(self) -> None:
        state = {"settings": self.settings, "token": self.token, "seconds": self.seconds}
        write_whole(self.path, json.dumps(state, indent=1).encode())


def main(argv: list[str]) -> int:
    arguments = parse(DemoArguments, argv, command="echolab demo")
    arguments.check()
    kept = asdict(arguments)
    settings = {name: kept[name] for name in kept if name not in ("out", "format", "seeds")}
    with held(arguments.out):
        progress = Progress(arguments.out / STAGES, settings)
        out = Folder(arguments.out, progress.token)
        run_stages(arguments, out, progress)
    rows = json.loads(out.scores.read_text())["rows"]
    if arguments.format == "json":
        print(json.dumps({"report": str(out.report), "scores": rows, "seconds": progress.seconds}))
    else:
        print_table(rows)
        print(f"{sum(progress.seconds.values()):.0f} s of work; report: {out.report}")
    return 0


def run_stages(arguments: DemoArguments, out: Folder, progress: Progress) -> None:
    """Everything in order."""
    progress.run("draw", lambda: draw_talkers(arguments, out))
    progress.run("judges", lambda: fit_judges(arguments, out))
    progress.run("encode", lambda: encode_talkers(arguments, out))
    progress.run("score truth", lambda: score(arguments, out, "ground_truth", 0))
    progress.run("score shuffled", lambda: score(arguments, out, "shuffled_sound", 0))
    for seed in range(arguments.seeds):
        for name in CHECKPOINTS:
            if name == "ndpo":
                progress.run(f"pairs {seed}", lambda: make_pairs(arguments, out, seed))  # noqa: B023
            progress.run(f"{name} {seed}", lambda: train(arguments, out, name, seed))  # noqa: B023
            progress.run(f"score {name} {seed}", lambda: score(arguments, out, name, seed))  # noqa: B023
        progress.run(f"tasks {seed}", lambda: sample_tasks(arguments, out, seed))  # noqa: B023
    write_pages(arguments, out, arguments.seeds, progress.seconds)


def print_table(rows: list[dict[str, Any]]) -> None:
    """The score table on the terminal."""
    names = list(rows[-1]["scores"])
    table = Table("checkpoint", "seed", *names)
    for row in rows:
        values = [row["scores"].get(name) for name in names]
        shown = ["-" if value is None else f"{value:.3f}" for value in values]
        table.add_row(row["checkpoint"], str(row["seed"]), *shown)
    Console(width=140).print(table)
