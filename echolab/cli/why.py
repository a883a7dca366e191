"""`echolab why RUN`: how a run ended, which rank is to blame, and what to do."""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from echolab.arguments import parse
from echolab.errors import ConfigError, StorageError, printable
from echolab.launch import slurm
from echolab.launch.attempts import attempts_of
from echolab.launch.evidence import note
from echolab.launch.explain import figures, words
from echolab.launch.launch_records import read_launches


@dataclass(frozen=True)
class WhyArguments:
    """Say why a run ended: cause, rank, host, section, step, stack and what to do.

    From what its supervisors and ranks wrote into RUN/attempts, on whatever machine.
    """

    run: Path = field(metadata={"help": "the run's folder"})
    over: bool = field(
        default=False,
        metadata={"help": "the job has ended: nodes that told no end are lost"},
    )
    stopped: bool = field(
        default=False,
        metadata={"help": "with over: Slurm ended the job, as its signal to the script tells"},
    )
    format: Literal["text", "json"] = field(default="text", metadata={"help": "of the answer"})


def main(argv: list[str]) -> int:
    """Print it; 0 whatever the run ended with."""
    arguments = parse(WhyArguments, argv, command="echolab why", positional=("run",))
    if arguments.over:
        _note(arguments.run, stopped=arguments.stopped)
    attempts = attempts_of(arguments.run, over=arguments.over)
    if not attempts:
        raise ConfigError(
            f"{arguments.run}: no attempts of a run in it; give what `echolab train` had as "
            "run_dir="
        )
    told = figures(arguments.run, attempts, _infrastructure(arguments.run))
    print(json.dumps(told) if arguments.format == "json" else printable(words(told)))
    return 0


def _note(run: Path, *, stopped: bool) -> None:
    """In the job of the last launch: write down what Slurm says of its nodes, while it knows."""
    launches = read_launches(run)
    about = slurm.parsed(launches[-1][0].launch) if launches else None
    if about and about[0] == os.environ.get("SLURM_JOB_ID"):
        try:
            note(run, launches[-1], job_ended=stopped)
        except StorageError as error:  # a full disk: the verdict does without
            print(f"echolab: {error}", file=sys.stderr)


def _infrastructure(run: Path) -> int:
    """The budget of the run's own settings; of older runs, the usual one."""
    try:
        config: dict[str, Any] = json.loads((run / "config.json").read_text())
    except (OSError, ValueError):  # it ended before its settings were written
        config = {}
    return int(config.get("max_infra_restarts", 3))
