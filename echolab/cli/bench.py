"""`echolab bench ACTION`: speed on this machine, compared with other programs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from echolab.arguments import Action, parse, run_action
from echolab.bench.options import DataArguments, GenerateArguments, StepArguments

if TYPE_CHECKING:
    from echolab.bench.measure import Row

ACTIONS = {
    "step": Action("echolab.cli.bench:step", "a training step, compared with diffusers' network"),
    "generate": Action("echolab.cli.bench:generate", "a video by solver, steps and window"),
    "data": Action(
        "echolab.cli.bench:data", "reading shards, compared with plain webdataset and the disk"
    ),
}


def main(argv: list[str]) -> int:
    """Run one benchmark.

    With format=json it prints a list of rows, each with name, value, unit, baseline, baseline_value
    and ratio = value / baseline_value.
    """
    return run_action(argv, ACTIONS, command="echolab bench")


def step(argv: list[str]) -> None:
    """Measure a training step and print the rows."""
    arguments = parse(StepArguments, argv, command="echolab bench step")
    from echolab.bench.step import rows_of

    _print_rows(rows_of(arguments), arguments.format)


def generate(argv: list[str]) -> None:
    """Measure the generation of videos and print the rows."""
    arguments = parse(GenerateArguments, argv, command="echolab bench generate")
    from echolab.bench.generate import rows_of

    _print_rows(rows_of(arguments), arguments.format)


def data(argv: list[str]) -> None:
    """Measure reading and print the rows."""
    arguments = parse(DataArguments, argv, command="echolab bench data")
    from echolab.bench.data import rows_of

    _print_rows(rows_of(arguments), arguments.format)


def _print_rows(rows: "Sequence[Row]", style: str) -> None:
    from echolab.bench.measure import as_json, as_table

    print(as_json(rows) if style == "json" else as_table(rows))
