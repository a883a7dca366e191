"""The sections of the report that hold curves: which metric is drawn where, and beside which."""

from collections.abc import Mapping, Sequence
from typing import Any

from echolab.tasks.table import TASK_TABLE, TASKS
from echolab.tracking.curves import Series, area_chart, line_chart
from echolab.tracking.metrics import series
from echolab.tracking.score_table import CHECKPOINTS

# Every checkpoint and task keeps its colour on the whole page; others take the free ones in turn.
COLOURS = {
    "ground_truth": "truth", "shuffled_sound": "chance",
    "sft": "run-0", "sft_longer": "run-1", "ndpo": "run-2", "dpo": "run-3",
}  # fmt: skip
FREE_COLOURS = ("run-4", "run-5", "run-6", "run-7")
TASK_TITLES = {name: task.title for name, task in TASK_TABLE.items()}

TITLES = {
    "train/loss": "Training loss", "val/loss": "Held-out loss",
    "train/margin": "Preference margin", "train/accuracy": "Pairs ranked right",
    "train/gradient_factor": "Gradient factor", "train/beta": "Beta",
    "train/lr": "Learning rate", "train/gradient_norm": "Gradient norm",
    "perf/steps_per_second": "Steps a second",
}  # fmt: skip
SECTIONS = {
    "Loss": ("train/loss", "val/loss"),
    "Preference training": (
        "train/margin", "train/accuracy", "train/gradient_factor", "train/beta",
    ),
    "Optimiser and speed": ("train/lr", "train/gradient_norm", "perf/steps_per_second"),
}  # fmt: skip
WIDE = ("train/loss",)
HALVES = ("chosen", "rejected")  # of a pair: train/error/chosen, train/error/reference_chosen

PREFIXES = ("train/error/", "val/error/", "tasks/probability/")

Rows = list[dict[str, Any]]


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """CSS variable of each run or checkpoint."""
    others = [name for name in dict.fromkeys(names) if name not in COLOURS]
    free = {name: FREE_COLOURS[n % len(FREE_COLOURS)] for n, name in enumerate(others)}
    return {**COLOURS, **free}


def curve_sections(logs: Mapping[str, Rows], colours: Mapping[str, str]) -> dict[str, str]:
    """Section title -> its charts."""
    names = {name for rows in logs.values() for row in rows for name in row}
    names -= {"step", "attempt", "time"}
    known = {name for group in SECTIONS.values() for name in group}
    other = sorted(name for name in names - known if not name.startswith(PREFIXES))
    charts = {
        section: "".join(_chart(name, logs, colours) for name in group)
        for section, group in SECTIONS.items()
    }
    return {
        "Loss": _grid(charts["Loss"]),
        "Tasks": _grid(_probabilities(logs) + _tasks(names, logs, colours)),
        "Noise levels": _grid(_noise_levels(names, logs)),
        "Preference training": _grid(charts["Preference training"] + _halves(logs)),
        "Optimiser and speed": _grid(charts["Optimiser and speed"]),
        "Other measurements": _grid("".join(_chart(name, logs, colours) for name in other)),
    }


def _grid(charts: str) -> str:
    return f'<div class="charts">{charts}</div>' if charts else ""


def _chart(name: str, logs: Mapping[str, Rows], colours: Mapping[str, str]) -> str:
    lines = [
        Series(_run_title(run), colours[run], *series(rows, name)) for run, rows in logs.items()
    ]
    title = TITLES.get(name, name.split("/", 1)[-1].replace("_", " "))
    return line_chart(title, name, lines, wide=name in WIDE)


def _tasks(names: set[str], logs: Mapping[str, Rows], colours: Mapping[str, str]) -> str:
    """One chart a task: its error in training, and held out (dashed)."""
    errors = [(name, prefix) for prefix in PREFIXES[:2] for name in names]
    seen = {name.removeprefix(prefix) for name, prefix in errors if name.startswith(prefix)}
    charts = []
    for task in [*TASKS, *sorted(seen - set(TASKS))]:
        if task not in seen or task.startswith("sigma_") or task.endswith(HALVES):
            continue
        lines = []
        for run, rows in logs.items():
            train, held_out = (series(rows, f"{prefix}{task}") for prefix in PREFIXES[:2])
            lines.append(Series(_run_title(run), colours[run], *train))
            lines.append(Series(_run_title(run), colours[run], *held_out, dashed="held out"))
        charts.append(line_chart(TASK_TITLES.get(task, task), f"train/error/{task}", lines))
    return "".join(charts)


def _halves(logs: Mapping[str, Rows]) -> str:
    """One chart a run: whether the errors of both halves of the pairs go up together."""
    charts = []
    for run, rows in logs.items():
        lines = [
            Series(half, f"half-{half}", *series(rows, f"{PREFIXES[0]}{name}"), dashed=meaning)
            for half in HALVES
            for name, meaning in ((half, ""), (f"reference_{half}", "reference"))
        ]
        title = f"Errors of the pairs, {_run_title(run)}"
        charts.append(line_chart(title, "train/error/chosen, rejected", lines, wide=True))
    return "".join(charts)


def _probabilities(logs: Mapping[str, Rows]) -> str:
    """One chart a run: how often each task is drawn, over the steps."""
    charts = []
    for run, rows in logs.items():
        prefix = PREFIXES[2]
        found = dict.fromkeys(n for row in rows for n in row if n.startswith(prefix))
        names = sorted(found, key=lambda name: _task_order(name.removeprefix(prefix)))
        whole = [row for row in rows if all(name in row for name in names)] if names else []
        areas = [
            Series(TASK_TITLES.get(task, task), f"task-{min(_task_order(task), 5)}", *values)
            for name in names
            if (task := name.removeprefix(prefix)) and (values := series(whole, name))
        ]
        if areas and len(areas[0].steps) > 1:
            title = f"How often each task is drawn, {_run_title(run)}"
            charts.append(area_chart(title, f"{prefix}*", areas))
    return "".join(charts)


def _task_order(task: str) -> int:
    return TASKS.index(task) if task in TASKS else len(TASKS)


def _noise_levels(names: set[str], logs: Mapping[str, Rows]) -> str:
    """One chart a run: held-out error at each fixed noise level."""
    levels = sorted(name for name in names if name.startswith("val/error/sigma_"))
    charts = []
    for run, rows in logs.items():
        lines = [
            Series(
                "σ " + level.rsplit("_", 1)[-1],
                f"ramp-{round(4 * n / max(1, len(levels) - 1))}",
                *series(rows, level),
            )
            for n, level in enumerate(levels)
        ]
        charts.append(line_chart(f"By noise level, {_run_title(run)}", "val/error/sigma_*", lines))
    return "".join(charts)


def _run_title(run: str) -> str:
    return CHECKPOINTS[run][0] if run in CHECKPOINTS else run
