"""`echolab rollback RUN to=STEP [skip=A:B]`: go back to a checkpoint, and leave batches out."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from echolab.arguments import parse
from echolab.config.build import schedule_from
from echolab.errors import ConfigError
from echolab.launch import run_dir
from echolab.training.checkpoints.checkpoint import folder_of, open_checkpoint, saved_steps
from echolab.training.checkpoints.retention import set_aside
from echolab.training.guards import events
from echolab.training.schedule import Schedule, Skip


@dataclass(frozen=True)
class RollbackArguments:
    """Let a run go on from an earlier checkpoint, and never train on some batches.

    The next start of the run goes on from there.  Newer checkpoints move to a folder beside, and
    nothing is removed; events.jsonl tells of it.  Steps stay as many as they were: the batches
    after those that are left out take their place.
    """

    run: Path = field(metadata={"help": "the run's folder; nobody may be training it"})
    to: int = field(metadata={"ge": 0, "help": "step of the checkpoint"})
    skip: str | None = field(
        default=None, metadata={"help": "A:B leaves out global batches A to B - 1 of its datasets"}
    )
    kind: Literal["sft", "preference"] = field(
        default="sft", metadata={"help": "of the epochs whose batches are left out"}
    )
    format: Literal["text", "json"] = field(default="text", metadata={"help": "of the answer"})


def main(argv: list[str]) -> int:
    """Go back, and say to where."""
    arguments = parse(
        RollbackArguments, argv, command="echolab rollback", positional=("run", "to", "skip")
    )
    run, to = arguments.run, arguments.to
    skip = parse_skip(arguments.skip, arguments.kind) if arguments.skip else None
    config = config_of(run)
    folder = run / "checkpoints"
    with run_dir.held(run):
        steps = saved_steps(folder)
        if to not in steps:
            there = ", ".join(map(str, sorted(steps))) or "none"
            raise ConfigError(f"{run}: to={to}: no checkpoint of that step; there are {there}")
        open_checkpoint(folder_of(folder, to))
        schedule = schedule_from(config["schedule"]).leaving_out(events.skips(run))
        if skip:
            schedule = schedule.skipping(skip, to)
            _check_is_met(schedule, skip, to)
        # The event first: if the rest is cut off, a start that would train on what is to be left
        # out is refused, and the same command mends it.
        told = list(skip) if skip else None
        event = events.append(run, steps[0], "rollback", by="command", to=to, skip=told)
        moved = set_aside(folder, to)
    _report(arguments, event, skip, moved)
    return 0


def config_of(run: Path) -> dict[str, Any]:
    """The settings of a run; ConfigError where there is none."""
    path = run / "config.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a run's folder") from error
    return found


def parse_skip(text: str, kind: str) -> Skip:
    """A:B as a skip; raises ConfigError for what is none."""
    first, _, stop = text.partition(":")
    if not (first.isdecimal() and stop.isdecimal() and int(first) < int(stop)):
        raise ConfigError(
            f"skip={text}: give first:stop, such as 950:1150 for batches 950 to 1149; a step's "
            "batch is its number, counted among steps of its kind"
        )
    return Skip(kind, int(first), int(stop) - int(first))


def _check_is_met(schedule: Schedule, skip: Skip, to: int) -> None:
    """A skip that no step would meet is a mistake in its numbers."""
    end = schedule.begun(skip.kind, schedule.steps)
    if skip.first >= end:
        raise ConfigError(
            f"skip={skip.first}:{skip.stop}: the run's {skip.kind} batches after step "
            f"{to} are {schedule.begun(skip.kind, to)} to {end - 1}; give some of these"
        )


def _report(
    arguments: RollbackArguments, event: events.Event, skip: Skip | None, moved: Path | None
) -> None:
    if arguments.format == "json":
        about = {"run": str(arguments.run), "event": event.id, "moved_to": moved and str(moved)}
        print(json.dumps({**about, "to": arguments.to, "skip": list(skip) if skip else None}))
        return
    less = f", without {skip.kind} batches {arguments.skip}" if skip else ""
    where = f"; newer checkpoints are in {moved}" if moved else ""
    print(f"{arguments.run}: goes on from step {arguments.to}{less} (event {event.id}){where}")
