"""`report.html`: samples, scores and curves of a run in one self-contained file.

Videos are embedded as base64, curves as inline SVG, style and script as text.  A content security
policy prevents the page from loading anything else.
"""

import base64
import json
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from echolab.atomic_io import write_atomic
from echolab.errors import DataError, MediaError
from echolab.tasks.table import TASK_TABLE, TASKS
from echolab.tracking.curves import Series, area_chart, line_chart
from echolab.tracking.metrics import read_metrics, read_run_metrics, series
from echolab.tracking.score_table import CHECKPOINTS, score_table

MIN_COLUMNS, MAX_COLUMNS = 4, 8  # clips in a row

# Every checkpoint and task has the same color in all charts; other names get FREE_COLORS in turn.
COLORS = {
    "ground_truth": "truth", "shuffled_sound": "chance",
    "sft": "run-0", "sft_longer": "run-1", "ndpo": "run-2", "dpo": "run-3",
}  # fmt: skip
FREE_COLORS = ("run-4", "run-5", "run-6", "run-7")
TASK_TITLES = {name: task.title for name, task in TASK_TABLE.items()}

TITLES = {
    "train/loss": "Training loss", "val/loss": "Validation loss",
    "train/margin": "Preference margin", "train/accuracy": "Preference accuracy",
    "train/gradient_factor": "Gradient factor", "train/beta": "Beta",
    "train/sync_accuracy": "Windows whose own audio is closest",
    "train/lr": "Learning rate", "train/gradient_norm": "Gradient norm",
    "perf/steps_per_second": "Steps per second",
}  # fmt: skip
SECTIONS = {
    "Loss": ("train/loss", "val/loss"),
    "Preference training": (
        "train/margin", "train/accuracy", "train/gradient_factor", "train/beta",
    ),
    "Lip sync": ("train/sync_accuracy",),
    "Optimizer and speed": ("train/lr", "train/gradient_norm", "perf/steps_per_second"),
}  # fmt: skip
WIDE = ("train/loss",)
HALVES = ("chosen", "rejected")  # clips of a pair: train/error/chosen, .../reference_chosen

PREFIXES = ("train/error/", "val/error/", "tasks/probability/")
SHIFTED = ("val/accuracy/shift_", "val_raw/accuracy/shift_")  # accuracies of SyncNet

Rows = list[dict[str, Any]]


class Video(NamedTuple):
    """An mp4 file to show; videos of one `group` share a row under its name."""

    path: Path
    title: str
    caption: str = ""
    group: str = ""


def write_report(
    out: Path,
    *,
    title: str,
    runs: Mapping[str, Path],
    scores: Sequence[Mapping[str, Any]],
    videos: Sequence[Video],
    summary: Mapping[str, Any],
) -> None:
    """Write one self-contained page to `out`, atomically.

    `runs`: metrics.jsonl, or the folder that holds it, by run name.  `scores`: the rows of
    scores.json.  `summary`: facts for the top of the page; its entry `about` is the opening
    paragraph.  The inputs are stored next to the page for `write_again`: `report.json` for
    `report.html`.  Raise MediaError for a missing video, DataError for unreadable metrics.
    """
    logs = {
        name: read_run_metrics(path) if path.is_dir() else read_metrics(path)
        for name, path in runs.items()
    }
    # Sections of the page.
    colors = assign_colors([*logs, *(str(row["checkpoint"]) for row in scores)])
    sections = {
        "Samples": _samples(videos),
        "Scores": score_table(scores, colors),
        **curve_sections(logs, colors),
    }
    page = _page(title, summary, {name: body for name, body in sections.items() if body})
    # Store the inputs, for `write_again`.
    given = {
        "title": title,
        "runs": {name: _relative(out.parent, path) for name, path in runs.items()},
        "scores": [dict(row) for row in scores],
        "videos": [{**v._asdict(), "path": _relative(out.parent, v.path)} for v in videos],
        "summary": {name: str(value) for name, value in summary.items()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out.with_suffix(".json"), json.dumps(given, indent=1).encode())
    # A file name that is not UTF-8 contains surrogates, which UTF-8 cannot encode.
    write_atomic(out, page.encode(errors="backslashreplace"))


def write_again(out: Path) -> None:
    """Write the page again, with rows logged since, from the inputs in the JSON file next to it.

    The file is not trusted, so paths outside of its folder are refused.  Raise DataError if it is
    not valid.
    """
    kept = out.with_suffix(".json")
    try:
        given = json.loads(kept.read_text(encoding="utf-8"))
        # Paths must lie in the folder, values must have their types.
        runs = {name: inside(out.parent, path) for name, path in given["runs"].items()}
        videos = [
            Video(
                inside(out.parent, v["path"]), *(str(v[k]) for k in ("title", "caption", "group"))
            )
            for v in given["videos"]
        ]
        title, scores, summary = (
            str(given["title"]),
            validated_scores(given["scores"]),
            given["summary"],
        )
        summary = {name: str(value) for name, value in summary.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{kept}: not the inputs of a report ({type(error).__name__}: {error})"
        raise DataError(f"{problem}; delete it to make the report from the run folder") from error
    write_report(out, title=title, runs=runs, scores=scores, videos=videos, summary=summary)


def inside(folder: Path, name: Path | str) -> Path:
    """Return the path of a file in `folder`; raise ValueError if it is outside, also by a link."""
    # A link may lead out of the folder, so resolve the path first.
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name} lies outside {folder}")
    return path


def validated_scores(rows: Any) -> list[dict[str, Any]]:
    """Return validated rows of scores; raise ValueError, KeyError or TypeError for invalid ones."""
    return [
        {
            **row,
            "checkpoint": str(row["checkpoint"]),
            "scores": {n: None if v is None else float(v) for n, v in row["scores"].items()},
        }
        for row in rows
    ]


def _relative(folder: Path, path: Path) -> str:
    """Return `path` relative to `folder`, so that a run folder can be moved."""
    return os.path.relpath(path, folder)


def _samples(videos: Sequence[Video]) -> str:
    groups: dict[str, list[Video]] = {}
    for video in videos:
        groups.setdefault(video.group, []).append(video)
    if not groups:
        return ""
    # Use as many columns as the longest row has clips, so that rows are aligned.
    columns = min(MAX_COLUMNS, max(MIN_COLUMNS, *(len(group) for group in groups.values())))
    rows = "".join(
        f'<div class="group{"" if name else " unnamed"}"><h3>{escape(name)}</h3>'
        f'<div class="clips" style="--columns:{columns}">{"".join(map(_clip, group))}</div></div>'
        for name, group in groups.items()
    )
    return (
        '<div class="tools" hidden><button data-do="play">Pause</button>'
        '<button data-do="restart">Restart</button>'
        '<button data-do="slow" aria-pressed="false">Half speed</button>'
        '<button data-do="loop" aria-pressed="true">Loop</button>'
        '<button data-do="smooth" aria-pressed="false">Smooth</button>'
        '<span class="hint">Click a clip to hear its audio.</span></div>' + rows
    )


def _clip(video: Video) -> str:
    try:
        content = video.path.read_bytes() if video.path.is_file() else None
    except OSError as error:
        raise MediaError(
            f"{video.path}: {error.strerror}; the report embeds it, check the file"
        ) from error
    if content is None or content[4:8] != b"ftyp":
        fault = "not found" if content is None else "not an mp4 file"
        raise MediaError(f"{video.path}: {fault}; remove it, or write the video again")
    # Embed the video, so that the page is a single file.
    data = base64.b64encode(content).decode("ascii")
    caption = f"<small>{escape(video.caption)}</small>" if video.caption else ""
    return (
        f'<figure class="clip"><div class="frame"><video controls loop muted playsinline '
        f'preload="auto" aria-label="{escape(f"{video.title} {video.group}".strip())}" '
        f'src="data:video/mp4;base64,{data}"></video></div>'
        f"<figcaption><b>{escape(video.title)}</b>{caption}</figcaption></figure>"
    )


def _page(title: str, summary: Mapping[str, Any], sections: Mapping[str, str]) -> str:
    # One section with an anchor for each part of the page.
    anchors = {name: re.sub(r"\W+", "-", name.lower()) for name in sections}
    links = "".join(f'<a href="#{anchors[name]}">{escape(name)}</a>' for name in sections)
    body = "".join(
        f'<section id="{anchors[name]}"><h2>{escape(name)}</h2>{_NOTES.get(name, "")}{inner}'
        "</section>"
        for name, inner in sections.items()
    )
    facts = "".join(
        f"<div><dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in summary.items()
        if name != "about"
    )
    about = f'<p class="about">{escape(str(summary["about"]))}</p>' if "about" in summary else ""
    templates = files("echolab.tracking")
    # Fill in the template.
    parts = {
        "style": (templates / "report.css").read_text(encoding="utf-8"),
        "script": (templates / "report.js").read_text(encoding="utf-8"),
        "title": escape(title),
        "head": about + (f'<dl class="facts">{facts}</dl>' if facts else ""),
        "links": links,
        "body": body,
    }
    frame = (templates / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], frame)


_NOTES = {
    "Loss": (
        '<p class="note">Faint lines are the logged values, bold lines their moving average. '
        "Point at a chart to see its values.</p>"
    ),
    "Scores": (
        '<p class="note">All measures are computed on clips that were held out. Ground truth: the '
        "scores of these clips themselves. Shuffled audio: the same clips with the audio of "
        "another clip. A bar is empty at shuffled audio and full at ground truth. "
        "<em>demo</em> marks measures of small stand-in networks, which can only be compared "
        "within this table.</p>"
    ),
    "Lip sync": (
        '<p class="note">Windows of 0.2 s of held-out clips. The audio of a window is compared '
        "with that of every other window of its clip, and with the audio some frames earlier and "
        "later; chance is 50 % for the latter.</p>"
    ),
    "Tasks": (
        '<p class="note">The curriculum introduces tasks from hard to easy. The error is the mean '
        "squared error of the velocity over the clips of a task; dashed lines are validation.</p>"
    ),
}


# -- curves ---------------------------------------------------------------------------------------


def assign_colors(names: Sequence[str]) -> dict[str, str]:
    """Return the CSS variable of each run or checkpoint."""
    others = [name for name in dict.fromkeys(names) if name not in COLORS]
    free = {name: FREE_COLORS[n % len(FREE_COLORS)] for n, name in enumerate(others)}
    return {**COLORS, **free}


def curve_sections(logs: Mapping[str, Rows], colors: Mapping[str, str]) -> dict[str, str]:
    """Return the charts as HTML, by section title."""
    names = {name for rows in logs.values() for row in rows for name in row}
    names -= {"step", "attempt", "time"}
    # Metrics that no section names get separate charts.
    known = {name for group in SECTIONS.values() for name in group}
    others = sorted(n for n in names - known if not n.startswith((*PREFIXES, *SHIFTED)))
    charts = {
        section: "".join(_chart(name, logs, colors) for name in group)
        for section, group in SECTIONS.items()
    }
    return {
        "Loss": _chart_grid(charts["Loss"]),
        "Tasks": _chart_grid(_probabilities(logs) + _tasks(names, logs, colors)),
        "Noise levels": _chart_grid(_noise_levels(names, logs)),
        "Preference training": _chart_grid(charts["Preference training"] + _pair_errors(logs)),
        "Lip sync": _chart_grid(charts["Lip sync"] + _shifts(logs)),
        "Optimizer and speed": _chart_grid(charts["Optimizer and speed"]),
        "Other metrics": _chart_grid("".join(_chart(name, logs, colors) for name in others)),
    }


def _chart_grid(charts: str) -> str:
    return f'<div class="charts">{charts}</div>' if charts else ""


def _chart(name: str, logs: Mapping[str, Rows], colors: Mapping[str, str]) -> str:
    lines = [
        Series(_run_title(run), colors[run], *series(rows, name)) for run, rows in logs.items()
    ]
    # The title of a metric defaults to its name.
    title = TITLES.get(name, name.split("/", 1)[-1].replace("_", " "))
    return line_chart(title, name, lines, wide=name in WIDE)


def _tasks(names: set[str], logs: Mapping[str, Rows], colors: Mapping[str, str]) -> str:
    """Return one chart for each task: its training error, and its validation error dashed."""
    errors = [(name, prefix) for prefix in PREFIXES[:2] for name in names]
    # Tasks in the order of the task table, then unknown tasks.
    seen = {name.removeprefix(prefix) for name, prefix in errors if name.startswith(prefix)}
    charts = []
    for task in [*TASKS, *sorted(seen - set(TASKS))]:
        if task not in seen or task.startswith("sigma_") or task.endswith(HALVES):
            continue
        lines = []
        for run, rows in logs.items():
            train, validation = (series(rows, f"{prefix}{task}") for prefix in PREFIXES[:2])
            lines.append(Series(_run_title(run), colors[run], *train))
            lines.append(Series(_run_title(run), colors[run], *validation, dashed="validation"))
        charts.append(line_chart(TASK_TITLES.get(task, task), f"train/error/{task}", lines))
    return "".join(charts)


def _pair_errors(logs: Mapping[str, Rows]) -> str:
    """Return one chart for each run: the errors of chosen and rejected clips."""
    charts = []
    for run, rows in logs.items():
        lines = [
            Series(half, f"half-{half}", *series(rows, f"{PREFIXES[0]}{name}"), dashed=meaning)
            for half in HALVES
            for name, meaning in ((half, ""), (f"reference_{half}", "reference"))
        ]
        title = f"Errors of preference pairs, {_run_title(run)}"
        charts.append(line_chart(title, "train/error/chosen, rejected", lines, wide=True))
    return "".join(charts)


def _shifts(logs: Mapping[str, Rows]) -> str:
    """Return one chart for each run: the held-out accuracy of SyncNet by shift of the audio."""
    charts = []
    for run, rows in logs.items():
        names = sorted(
            {name for row in rows for name in row if name.startswith(SHIFTED[0])},
            key=lambda name: int(name.rpartition("_")[2]),
        )
        lines = [
            Series(_shift_title(name), f"task-{min(n, 5)}", *series(rows, name))
            for n, name in enumerate(names)
        ]
        title = f"Accuracy by shift, {_run_title(run)}"
        charts.append(line_chart(title, f"{SHIFTED[0]}K", lines, wide=True))
    return "".join(charts)


def _shift_title(name: str) -> str:
    frames = name.rpartition("_")[2]
    return "closest of the clip" if frames == "0" else f"closer than ±{frames} frames"


def _probabilities(logs: Mapping[str, Rows]) -> str:
    """Return one chart for each run: the sampling probability of each task over the steps."""
    charts = []
    for run, rows in logs.items():
        prefix = PREFIXES[2]
        logged = dict.fromkeys(n for row in rows for n in row if n.startswith(prefix))
        names = sorted(logged, key=lambda name: _task_order(name.removeprefix(prefix)))
        # Probabilities must sum to one, so skip rows that lack a task.
        complete = [row for row in rows if all(name in row for name in names)] if names else []
        areas = [
            Series(TASK_TITLES.get(task, task), f"task-{min(_task_order(task), 5)}", *values)
            for name in names
            if (task := name.removeprefix(prefix)) and (values := series(complete, name))
        ]
        if areas and len(areas[0].steps) > 1:
            title = f"Sampling probability of tasks, {_run_title(run)}"
            charts.append(area_chart(title, f"{prefix}*", areas))
    return "".join(charts)


def _task_order(task: str) -> int:
    return TASKS.index(task) if task in TASKS else len(TASKS)


def _noise_levels(names: set[str], logs: Mapping[str, Rows]) -> str:
    """Return one chart for each run: validation error at each fixed noise level."""
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
        charts.append(
            line_chart(
                f"Validation error by noise level, {_run_title(run)}", "val/error/sigma_*", lines
            )
        )
    return "".join(charts)


def _run_title(run: str) -> str:
    return CHECKPOINTS[run][0] if run in CHECKPOINTS else run
