"""`echolab why RUN`: cause of a run's end, rank, host, step and remedy."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from echolab.arguments import argument, parse
from echolab.errors import ConfigError, StorageError, printable
from echolab.launch import slurm
from echolab.launch.attempts import attempts_of
from echolab.launch.evidence import note
from echolab.launch.explain import figures, words
from echolab.launch.launch_records import read_launches


@dataclass(frozen=True)
class WhyArguments:
    """Print why a run ended: cause, rank, host, section, step, stack and remedy.

    Read from what its supervisors and ranks wrote to RUN/attempts, on any machine.
    """

    run: Path = argument("run folder")
    over: bool = argument("the job has ended: treat nodes without a recorded end as lost", False)
    stopped: bool = argument("with over: Slurm ended the job, by its signal to the script", False)
    format: Literal["text", "json"] = argument("output format", "text")


def main(argv: list[str]) -> int:
    """Print the cause; return 0 for any."""
    arguments = parse(WhyArguments, argv, command="echolab why", positional=("run",))
    if arguments.over:
        _note(arguments.run, stopped=arguments.stopped)
    attempts = attempts_of(arguments.run, over=arguments.over)
    if not attempts:
        raise ConfigError(
            f"{arguments.run}: no attempts of a run in it; give what `echolab train` had as "
            "run_dir="
        )
    result = figures(arguments.run, attempts, _infrastructure(arguments.run))
    print(json.dumps(result) if arguments.format == "json" else printable(words(result)))
    return 0


def _note(run: Path, *, stopped: bool) -> None:
    """Record what Slurm reports of the last launch's nodes, if this is still its job."""
    launches = read_launches(run)
    about = slurm.parsed(launches[-1][0].launch) if launches else None
    if about and about[0] == os.environ.get("SLURM_JOB_ID"):
        try:
            note(run, launches[-1], job_ended=stopped)
        except StorageError as error:  # a full disk: continue without
            print(f"echolab: {error}", file=sys.stderr)


def _infrastructure(run: Path) -> int:
    """Return the budget of infrastructure failures in the run's settings, by default 3."""
    try:
        config: dict[str, Any] = json.loads((run / "config.json").read_text())
    except (OSError, ValueError):  # the run ended before its settings were written
        config = {}
    return int(config.get("max_infra_restarts", 3))
