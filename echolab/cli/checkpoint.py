"""`echolab checkpoint inspect|verify|diff`: contents, integrity and differences of checkpoints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from echolab.arguments import Action, argument, parse, run_action
from echolab.errors import CheckpointError

# Every action accepts a checkpoint, or a run, whose newest checkpoint is used.
CHECKPOINT = "checkpoint, or a run or its folder of checkpoints for the newest"


@dataclass(frozen=True)
class InspectArguments:
    """Print the contents of a checkpoint: step, parts, sizes, averages and origin."""

    path: Path = argument(CHECKPOINT)
    format: Literal["text", "json"] = argument("output format", "text")


@dataclass(frozen=True)
class VerifyArguments:
    """Read every byte of a checkpoint; print one line per fault, with exit code 1 if any."""

    path: Path = argument(CHECKPOINT)
    format: Literal["text", "json"] = argument("output format", "text")


@dataclass(frozen=True)
class DiffArguments:
    """Compare two checkpoints; exit code 0 if every tensor and counter is bit-equal, else 1."""

    a: Path = argument(CHECKPOINT)
    b: Path = argument("second checkpoint, or a run for its newest")
    format: Literal["text", "json"] = argument("output format", "text")


# Each action parses its arguments, and then imports torch with `checkpoint_report`.
ACTIONS = {
    "inspect": Action("echolab.cli.checkpoint:inspect", "print the contents of a checkpoint"),
    "verify": Action("echolab.cli.checkpoint:verify", "check every byte of a checkpoint"),
    "diff": Action("echolab.cli.checkpoint:diff", "compare two; exit code 0 if bit-equal"),
}


def main(argv: list[str]) -> int:
    """Run one action."""
    return run_action(argv, ACTIONS, command="echolab checkpoint")


def check_folders(*paths: Path) -> None:
    """Raise CheckpointError for the first path that is not a folder."""
    # The contents are read later, after torch is imported.
    for path in paths:
        # A damaged checkpoint passes here: `verify` reports its faults.
        if not path.is_dir():
            raise CheckpointError(f"{path}: no checkpoint there; give a run, or a checkpoint of it")


def inspect(argv: list[str]) -> int:
    """Print sizes and counters; `verify` reads the contents."""
    command = "echolab checkpoint inspect"
    arguments = parse(InspectArguments, argv, command=command, positional=("path",))
    check_folders(arguments.path)
    from echolab.cli.checkpoint_report import print_contents

    return print_contents(arguments.path, as_json=arguments.format == "json")


def verify(argv: list[str]) -> int:
    """Print the faults of a checkpoint; the newest of a run is checked even if damaged."""
    command = "echolab checkpoint verify"
    arguments = parse(VerifyArguments, argv, command=command, positional=("path",))
    check_folders(arguments.path)
    from echolab.cli.checkpoint_report import print_faults

    return print_faults(arguments.path, as_json=arguments.format == "json")


def diff(argv: list[str]) -> int:
    """Print the differences of two checkpoints, both verified first."""
    command = "echolab checkpoint diff"
    arguments = parse(DiffArguments, argv, command=command, positional=("a", "b"))
    check_folders(arguments.a, arguments.b)
    from echolab.cli.checkpoint_report import print_differences

    return print_differences(arguments.a, arguments.b, as_json=arguments.format == "json")
