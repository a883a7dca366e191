"""Metrics of a run as append-only JSON lines, which wandb and the report show.

A run has one or more attempts: each requeue or restart is a new one.  An attempt that resumes from
a checkpoint repeats steps that an earlier attempt logged.  The older rows are kept in the file, and
`read_metrics` skips them.
"""

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from echolab.atomic_io import LineLog
from echolab.errors import DataError

METRICS = "metrics.jsonl"
EVALUATIONS = Path("evaluations") / METRICS  # written by `echolab evaluate watch=`


class MetricsLog:
    """Appends rows to a file; a row is passed to the operating system before `log` returns.

    A failed write does not stop the run: the rows wait for the next write (`LineLog`).
    """

    def __init__(self, path: Path, attempt: int) -> None:
        """Open the file; a higher `attempt` is a later one."""
        self.attempt = attempt
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = LineLog(path)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append a row; values that are not finite are written as null, because JSON has no NaN."""
        # Every row names its attempt, so that `read_metrics` can skip repeated steps.
        row: dict[str, Any] = {"step": step, "attempt": self.attempt, "time": time.time()}
        for name, value in values.items():
            row[name] = float(value) if math.isfinite(value) else None
        self._lines.add(json.dumps(row, allow_nan=False) + "\n")

    def close(self) -> None:
        """Write the rows that are still waiting."""
        self._lines.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows without superseded ones, in step order; null is read as NaN.

    Rows of an older attempt end at the first step of any later attempt (including that step if
    they share a name); rows of the same attempt end where it rolled back.  Lines that a killed
    process left incomplete are skipped.  Raises DataError if no line can be read.
    """
    # A run without logged steps has no file.
    if not path.is_file():
        raise DataError(f"{path}: no such file; a run writes it from its first logged step on")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = _without_rolled_back(row for line in lines if (row := _row(line)) is not None)
    if lines and not rows:
        raise DataError(f"{path}: none of {len(lines)} lines is a metrics row; is it another file?")
    # Later attempts replace the rows that they repeated.
    first_steps = _first_steps(rows)
    kept = [row for row in rows if not _is_superseded(row, first_steps)]
    return sorted(kept, key=lambda row: row["step"])  # stable: rows of one step keep their order


def read_run_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the rows of a run folder, with those of evaluations by other jobs, in step order.

    The last evaluation of a step counts; evaluations of steps that the run has not logged, or that
    were undone by a rollback, are skipped.  Raise DataError as `read_metrics` does.
    """
    rows = read_metrics(run / METRICS)
    path = run / EVALUATIONS
    if not path.is_file():
        return rows
    # Checkpoints of undone steps no longer exist, and the steps may be trained again.
    last = max((row["step"] for row in rows), default=0)
    lines = path.read_text(encoding="utf-8").splitlines()
    evaluations = {row["step"]: row for line in lines if (row := _row(line)) is not None}
    kept = [row for step, row in evaluations.items() if step <= last]
    return sorted([*rows, *kept], key=lambda row: row["step"])


def _first_steps(rows: list[dict[str, Any]]) -> dict[int, tuple[int, set[str]]]:
    """Return the first step of each attempt and the names that it logged there."""
    first_steps: dict[int, tuple[int, set[str]]] = {}
    # Rows of one step may be written one after another: collect their names.
    for row in rows:
        step, names = first_steps.get(row["attempt"], (row["step"], set()))
        if row["step"] <= step:
            kept = names if row["step"] == step else set()
            first_steps[row["attempt"]] = row["step"], kept | _names(row)
    return first_steps


def _is_superseded(row: dict[str, Any], first_steps: dict[int, tuple[int, set[str]]]) -> bool:
    """Return whether a later attempt repeated a row.

    An attempt that only repeats the validation of the last step has no new row of the step itself.
    """
    return any(
        row["step"] > step or (row["step"] == step and bool(names & _names(row)))
        for attempt, (step, names) in first_steps.items()
        if attempt > row["attempt"]
    )


def _names(row: dict[str, Any]) -> set[str]:
    return set(row) - {"step", "attempt", "time"}


def _without_rolled_back(log: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop rows that the same attempt logged before it rolled back to an earlier checkpoint.

    A step below that of the previous row marks a rollback.
    """
    rows: list[dict[str, Any]] = []
    for row in log:
        last = rows[-1] if rows else row
        # A step back within one attempt: drop the rows that were undone.
        if row["attempt"] == last["attempt"] and row["step"] < last["step"]:
            rows = [r for r in rows if r["attempt"] != row["attempt"] or r["step"] < row["step"]]
        rows.append(row)
    return rows


def series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one metric, without rows that lack it or hold NaN."""
    points = [(row["step"], row[name]) for row in rows if not math.isnan(row.get(name, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not {"step", "attempt"} <= set(row):
        return None
    return {key: math.nan if value is None else value for key, value in row.items()}
