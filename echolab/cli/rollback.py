"""`echolab rollback RUN to=STEP [skip=A:B]`: resume from an earlier checkpoint, skip batches."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from echolab.arguments import argument, parse
from echolab.errors import ConfigError

if TYPE_CHECKING:
    from echolab.training.guards.events import Event
    from echolab.training.schedule import Schedule, Skip


@dataclass(frozen=True)
class RollbackArguments:
    """Resume a run from an earlier checkpoint, and optionally skip batches.

    The next start of the run resumes from this checkpoint.  Newer checkpoints are moved to another
    folder, not deleted.  The rollback is logged to events.jsonl.  The total number of steps does
    not change; later batches replace the skipped ones.
    """

    run: Path = argument("run folder; no process may be training it", aka=("run_dir",))
    to: int = argument("step of the checkpoint", ge=0)
    skip: str | None = argument("A:B skips global batches A to B - 1", None)
    kind: Literal["sft", "preference"] = argument("epochs whose batches are skipped", "sft")
    format: Literal["text", "json"] = argument("output format", "text")


def main(argv: list[str]) -> int:
    """Roll back and print the new position."""
    # Do the checks that need no torch first.
    arguments = parse(
        RollbackArguments, argv, command="echolab rollback", positional=("run", "to", "skip")
    )
    run, to = arguments.run, arguments.to
    batches = parse_skip(arguments.skip) if arguments.skip else None
    from echolab.launch import run_dir

    config = run_dir.config_of(run)
    from echolab.config.build import schedule_from
    from echolab.training.checkpoints.checkpoint import folder_of, open_checkpoint, saved_steps
    from echolab.training.checkpoints.retention import set_aside
    from echolab.training.guards import events
    from echolab.training.schedule import Skip

    # Check the request against the run's checkpoints and schedule.
    skip = Skip(arguments.kind, *batches) if batches else None
    folder = run / "checkpoints"
    with run_dir.held(run):
        steps = saved_steps(folder)
        if to not in steps:
            known = ", ".join(map(str, sorted(steps))) or "none"
            raise ConfigError(f"{run}: to={to}: no checkpoint of that step; there are {known}")
        open_checkpoint(folder_of(folder, to))
        schedule = schedule_from(config).leaving_out(events.skips(run))
        if skip:
            schedule = schedule.skipping(skip, to)
            _check_is_met(schedule, skip, to)

        # Log the event first: after an interruption here, a start that would train on skipped
        # batches is refused, and the same rollback command completes the rollback.
        skipped = list(skip) if skip else None
        event = events.append(run, steps[0], "rollback", by="command", to=to, skip=skipped)
        moved = set_aside(folder, to)
    _report(arguments, event, skip, moved)
    return 0


def parse_skip(text: str) -> tuple[int, int]:
    """Return the first batch and the number of batches of A:B; raise ConfigError for other text."""
    first, _, stop = text.partition(":")
    if not (first.isdecimal() and stop.isdecimal() and int(first) < int(stop)):
        raise ConfigError(
            f"skip={text}: give first:stop, such as 950:1150 for batches 950 to 1149; batches are "
            "counted among steps of their kind"
        )
    return int(first), int(stop) - int(first)


def _check_is_met(schedule: "Schedule", skip: "Skip", to: int) -> None:
    """Raise ConfigError for a skip of batches that no remaining step would train on."""
    end = schedule.begun(skip.kind, schedule.steps)
    if skip.first >= end:
        raise ConfigError(
            f"skip={skip.first}:{skip.stop}: the run's {skip.kind} batches after step "
            f"{to} are {schedule.begun(skip.kind, to)} to {end - 1}; give some of these"
        )


def _report(
    arguments: RollbackArguments, event: "Event", skip: "Skip | None", moved: Path | None
) -> None:
    """Print the new position."""
    if arguments.format == "json":
        about = {"run": str(arguments.run), "event": event.id, "moved_to": moved and str(moved)}
        print(json.dumps({**about, "to": arguments.to, "skip": list(skip) if skip else None}))
        return
    without = f", without {skip.kind} batches {arguments.skip}" if skip else ""
    newer = f"; newer checkpoints are in {moved}" if moved else ""
    print(f"{arguments.run}: resumes from step {arguments.to}{without} (event {event.id}){newer}")
