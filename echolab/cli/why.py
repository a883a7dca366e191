"""`echolab why RUN`: how a run ended, in which rank the failure began, and what to do."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from echolab.arguments import argument, parse
from echolab.errors import ConfigError, StorageError, escape_unprintable
from echolab.launch import slurm
from echolab.launch.attempts import attempts_of
from echolab.launch.explain import format_summary, summarize
from echolab.launch.launch_records import read_launches, record_slurm_state


@dataclass(frozen=True)
class WhyArguments:
    """Explain why a run ended: cause, rank, host, section, step, stack and what to do.

    It reads the records of supervisors and ranks in RUN/attempts, on any machine.
    """

    run: Path = argument("run folder", aka=("run_dir",))
    over: bool = argument("the job has ended: count nodes without a recorded end as lost", False)
    stopped: bool = argument(
        "with over=true: Slurm ended the job (its script received SIGTERM)", False
    )
    format: Literal["text", "json"] = argument("output format", "text")


def main(argv: list[str]) -> int:
    """Print the explanation; return 0, however the run ended."""
    arguments = parse(WhyArguments, argv, command="echolab why", positional=("run",))
    # Ask Slurm for the state of nodes that recorded no end.
    if arguments.over:
        _ask_slurm(arguments.run, stopped=arguments.stopped)
    attempts = attempts_of(arguments.run, assume_ended=arguments.over)
    if not attempts:
        raise ConfigError(
            f"{arguments.run}: no attempts of a run in it; give the run folder of `echolab train`"
        )
    # Summarize all attempts; the restart budget decides whether the run is started again.
    summary = summarize(arguments.run, attempts, _max_infrastructure(arguments.run))
    as_json = arguments.format == "json"
    print(json.dumps(summary) if as_json else escape_unprintable(format_summary(summary)))
    return 0


def _ask_slurm(run: Path, *, stopped: bool) -> None:
    """Record Slurm's state of the last launch, if this process runs in the job of that launch."""
    # Only the job of this process may be queried.
    launches = read_launches(run)
    parsed = slurm.parse_launch(launches[-1][0].launch) if launches else None
    if parsed and parsed[0] == os.environ.get("SLURM_JOB_ID"):
        try:
            record_slurm_state(run, launches[-1], job_ended=stopped)
        except StorageError as error:  # a full disk: the diagnosis works without it
            print(f"echolab: {error}", file=sys.stderr)


def _max_infrastructure(run: Path) -> int:
    """Return the budget of machine failures in the run's settings, or the default."""
    try:
        config: dict[str, Any] = json.loads((run / "config.json").read_text())
    except (OSError, ValueError):  # the run ended before its settings were written
        config = {}
    return int(config.get("max_infra_restarts", 3))
