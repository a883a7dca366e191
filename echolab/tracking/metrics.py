"""A run's metrics as JSON lines: append-only, the truth that wandb and the report mirror.

A run is one or more attempts: each requeue or restart is a new one.  An attempt that resumes from
a checkpoint repeats steps that an earlier attempt had logged already; those older rows stay in the
file, but they do not belong to the series any more, and `read_metrics` leaves them out.
"""

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from echolab.atomic_io import LineLog
from echolab.errors import DataError


class MetricsLog:
    """Appends rows to a file; each is on its way to disk when `log` returns.

    A file that cannot be written stops no run: rows wait for the next time (`LineLog`).
    """

    def __init__(self, path: Path, attempt: int) -> None:
        """`attempt` counts from 0 (or 1): higher is later."""
        self.attempt = attempt
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = LineLog(path)

    def log(self, step: int, values: dict[str, float]) -> None:
        """One row.  Values that are not finite are written as null, which JSON has, unlike NaN."""
        row: dict[str, Any] = {"step": step, "attempt": self.attempt, "time": time.time()}
        for name, value in values.items():
            row[name] = float(value) if math.isfinite(value) else None
        self._lines.add(json.dumps(row, allow_nan=False) + "\n")

    def close(self) -> None:
        """Write what waits."""
        self._lines.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of the effective series, in step order; null is read as NaN.

    A row of an older attempt is superseded from the first step of any later attempt on (at that
    step itself, if they share a name), and so is one of the same attempt where it went back.
    Lines that a killed process left unfinished are passed over; a file in which no line can be
    read raises DataError.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; a run writes it from its first logged step on")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = _without_what_led_nowhere(row for line in lines if (row := _row(line)) is not None)
    if lines and not rows:
        raise DataError(f"{path}: none of {len(lines)} lines is a metrics row; is it another file?")
    begins = _begins(rows)
    kept = [row for row in rows if not _superseded(row, begins)]
    return sorted(kept, key=lambda row: row["step"])  # stable: rows of one step keep their order


def _begins(rows: list[dict[str, Any]]) -> dict[int, tuple[int, set[str]]]:
    """Return the first step of each attempt and the names that it logged there."""
    begins: dict[int, tuple[int, set[str]]] = {}
    for row in rows:
        step, names = begins.get(row["attempt"], (row["step"], set()))
        if row["step"] <= step:
            kept = names if row["step"] == step else set()
            begins[row["attempt"]] = row["step"], kept | _names(row)
    return begins


def _superseded(row: dict[str, Any], begins: dict[int, tuple[int, set[str]]]) -> bool:
    """Return whether a later attempt repeated what a row tells.

    An attempt that only repeats the checks of the last step has no new row of the step itself.
    """
    return any(
        row["step"] > step or (row["step"] == step and bool(names & _names(row)))
        for attempt, (step, names) in begins.items()
        if attempt > row["attempt"]
    )


def _names(row: dict[str, Any]) -> set[str]:
    return set(row) - {"step", "attempt", "time"}


def _without_what_led_nowhere(told: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A step below that of the row before: the attempt went back to a checkpoint before it."""
    rows: list[dict[str, Any]] = []
    for row in told:
        last = rows[-1] if rows else row
        if row["attempt"] == last["attempt"] and row["step"] < last["step"]:
            rows = [r for r in rows if r["attempt"] != row["attempt"] or r["step"] < row["step"]]
        rows.append(row)
    return rows


def series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, without the rows that lack it or hold NaN."""
    found = [(row["step"], row[name]) for row in rows if not math.isnan(row.get(name, math.nan))]
    return [step for step, _ in found], [value for _, value in found]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not {"step", "attempt"} <= set(row):
        return None
    return {key: math.nan if value is None else value for key, value in row.items()}
