"""The schema of a checkpoint: types and ranges of all entries of its manifest and its state.

To add an entry to the state, add one line to `STATE`.  Unknown entries are allowed, so that an
older version of the program can read a newer checkpoint.  A check is a function of a value and its
dotted name; it yields one line for each fault.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from echolab.tasks.table import TASKS
from echolab.training.schedule import GROUPS, KINDS

Check = Callable[[Any, str], Iterator[str]]
SHOWN = 60  # maximum characters of a wrong value in a message
SUM_TOLERANCE = 1e-6  # allowed deviation from 1 of the sum of task probabilities


def _fault(value: Any, name: str, expected: str) -> str:
    excerpt = repr(value)
    excerpt = excerpt if len(excerpt) <= SHOWN else f"{excerpt[:SHOWN]}..."
    return f"{name} is {excerpt}, must be {expected}"


def integer(least: int = 0) -> Check:
    """Accept integers of `least` or more, but no bool."""

    def check(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            yield _fault(value, name, f"an integer of {least} or more")

    return check


def number(least: float = -math.inf, most: float = math.inf) -> Check:
    """Accept finite numbers from `least` to `most`, but no bool."""
    bounds = "" if math.isinf(least) else f" from {least:g} to {most:g}"

    def check(value: Any, name: str) -> Iterator[str]:
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not numeric or not math.isfinite(value) or not least <= value <= most:
            yield _fault(value, name, f"a finite number{bounds}")

    return check


def true() -> Check:
    """Accept only true, for a flag that is absent otherwise."""

    def check(value: Any, name: str) -> Iterator[str]:
        if value is not True:
            yield _fault(value, name, "true")

    return check


def text(*choices: str) -> Check:
    """Accept any text, or only one of `choices` if given."""

    def check(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, str) or (choices and value not in choices):
            yield _fault(value, name, f"one of {', '.join(choices)}" if choices else "text")

    return check


def items(each: Check) -> Check:
    """Accept a list whose items all pass `each`."""

    def check(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, list):
            yield _fault(value, name, "a list")
            return
        for position, item in enumerate(value):
            yield from each(item, f"{name}[{position}]")

    return check


def row(*columns: Check) -> Check:
    """Accept a list whose first items pass `columns`, one each; more items are allowed."""

    def check(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, list) or len(value) < len(columns):
            yield _fault(value, name, f"a list of {len(columns)}")
            return
        for position, column in enumerate(columns):
            yield from column(value[position], f"{name}[{position}]")

    return check


def mapping(values: Check, *keys: str) -> Check:
    """Accept a mapping whose values all pass `values`; if given, only `keys` may be keys."""

    def check(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield _fault(value, name, "a mapping")
            return
        for key, entry in value.items():
            if keys and key not in keys:
                yield f"{name} has the key {key!r}, must be one of {', '.join(keys)}"
            yield from values(entry, f"{name}.{key}")

    return check


def fields(required: Mapping[str, Check], **optional: Check) -> Check:
    """Accept a mapping with all `required` keys; `optional` and unknown keys may be present."""

    def check(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield _fault(value, name, "a mapping")
            return
        # Allow unknown keys, since a newer version may add some.
        for key, check_entry in {**required, **optional}.items():
            full = f"{name}.{key}" if name else key
            if key in value:
                yield from check_entry(value[key], full)
            elif key in required:
                yield f"{full} is missing"

    return check


def nullable(other: Check) -> Check:
    """Accept null and every value that `other` accepts."""
    return lambda value, name: iter(()) if value is None else other(value, name)


def anything(value: Any, name: str) -> Iterator[str]:
    """Accept every value."""
    return iter(())


# The manifest: files and parameter shapes.
MANIFEST = fields({
    "step": integer(),
    "parameters": mapping(items(integer())),
    "tied": mapping(text()),
    "files": mapping(fields({"bytes": integer(), "sha256": text()})),
})  # fmt: skip
# The state: everything but tensors; entries of later versions are optional.
STATE = fields(
    {
        "step": integer(),
        "optimizer_updates": integer(),
        "ema": fields(
            {"updates": integer()}, decay=number(0, 1), more=items(number(0, 1)),
            widths=items(number(0, 1)), keeps_reference=true(),
        ),
        # Progress of the run: schedule and curriculum.
        "schedule": fields(
            {"epochs": items(row(text(*KINDS), integer(1), number(0)))},
            skipped=items(row(text(*GROUPS), integer(), integer(1))),
            rates=items(fields({
                "first": integer(), "epochs": items(row(text(*KINDS), integer(1), number(0))),
                "warmup": integer(), "decay": text("constant", "cosine"),
            })),
        ),
        "curriculum": fields(
            {"step": integer(), "probabilities": mapping(number(0, 1), *TASKS)},
            before=integer(), stages_left=integer(),
        ),
        # Running state of callbacks.
        "objectives": mapping(mapping(number()), *KINDS),
        "spikes": mapping(
            fields({
                "epoch": integer(), "loss": items(number()), "gradient_norm": items(number()),
            }),
            *KINDS,
        ),
        "architecture": mapping(anything),
    },
    # The inputs and the environment of the run.
    origin=fields({}, world=integer(1), masters=text()),
    adapters=nullable(mapping(anything)),
    encoders=mapping(text()),
    data=items(fields({
        "first": integer(),
        "clips": items(row(text(), text(), text())), "pairs": items(row(text(), text(), text())),
    })),
    origins=mapping(fields({"content": text()}, step=integer(), run=nullable(text()))),
    seed=integer(-(2**63)),
    batch_size=integer(1),
)  # fmt: skip


def state_faults(state: Any, step: int) -> list[str]:
    """Return one line for each invalid entry of the state of step `step`."""
    # Check types and ranges first: the consistency checks rely on them.
    wrong = list(STATE(state, ""))
    return wrong or list(_contradictions(state, step))


def _contradictions(state: Mapping[str, Any], step: int) -> Iterator[str]:
    if state["step"] != step:
        yield f"step is {state['step']}, the manifest says {step}"
    # A run cannot have done more steps than its schedule contains.
    planned = sum(epoch[1] for epoch in state["schedule"]["epochs"])
    if planned < step:
        yield f"schedule.epochs are {planned} steps, {step} are done"
    curriculum = state["curriculum"]
    if curriculum["step"] > step:
        yield f"curriculum.step is {curriculum['step']}, {step} are done"
    # Task probabilities must add up to 1, up to rounding.
    total = sum(curriculum["probabilities"].values())
    if abs(total - 1) > SUM_TOLERANCE:
        yield f"curriculum.probabilities add up to {total:g}, must be 1"
