"""`report.html`: one file that shows what a run has learnt, with nothing outside it.

Videos lie in it as base64, curves as inline SVG, style and script as text; a content policy in the
page forbids it to fetch anything.
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

from echolab.atomic_io import write_whole
from echolab.errors import DataError, MediaError
from echolab.tracking.curve_sections import colours_of, curve_sections
from echolab.tracking.metrics import read_metrics
from echolab.tracking.score_table import score_table

LEAST_COLUMNS, MOST_COLUMNS = 4, 8


class Video(NamedTuple):
    """An mp4 file to show.  Videos of one `group` stand in one row, under its name."""

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
    """Write one self-contained page to `out`, whole or not at all.

    `runs`: run name -> its metrics.jsonl (or the folder that holds it).  `scores`: the rows of
    scores.json.  `summary`: a few facts for the head of the page; `about`, if it is there, is its
    opening paragraph.  What the page was made from is kept beside it, `report.json` for
    `report.html`, for `write_again`.  Raises MediaError for a missing video, DataError for
    unreadable metrics.
    """
    logs = {
        name: read_metrics(path / "metrics.jsonl" if path.is_dir() else path)
        for name, path in runs.items()
    }
    colours = colours_of([*logs, *(str(row["checkpoint"]) for row in scores)])
    sections = {
        "Samples": _samples(videos),
        "Scores": score_table(scores, colours),
        **curve_sections(logs, colours),
    }
    page = _page(title, summary, {name: body for name, body in sections.items() if body})
    given = {
        "title": title,
        "runs": {name: _from(out.parent, path) for name, path in runs.items()},
        "scores": [dict(row) for row in scores],
        "videos": [{**v._asdict(), "path": _from(out.parent, v.path)} for v in videos],
        "summary": {name: str(value) for name, value in summary.items()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out.with_suffix(".json"), json.dumps(given, indent=1).encode())
    # A file name that is no UTF-8 holds surrogates, which UTF-8 has no bytes for.
    write_whole(out, page.encode(errors="backslashreplace"))


def write_again(out: Path) -> None:
    """Write the page anew, with what has been logged since, from the json file beside it.

    That file may be a stranger's: it can name nothing outside its folder.
    """
    kept = out.with_suffix(".json")
    try:
        given = json.loads(kept.read_text(encoding="utf-8"))
        runs = {name: inside(out.parent, path) for name, path in given["runs"].items()}
        videos = [
            Video(
                inside(out.parent, v["path"]), *(str(v[k]) for k in ("title", "caption", "group"))
            )
            for v in given["videos"]
        ]
        title, scores, summary = str(given["title"]), checked(given["scores"]), given["summary"]
        summary = {name: str(value) for name, value in summary.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{kept}: not what a report was made from ({type(error).__name__}: {error})"
        raise DataError(f"{problem}; delete it to start from the run folder") from error
    write_report(out, title=title, runs=runs, scores=scores, videos=videos, summary=summary)


def inside(folder: Path, name: Path | str) -> Path:
    """Return a file in `folder`; ValueError for one that lies elsewhere, be it by a link."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name} lies outside {folder}")
    return path


def checked(rows: Any) -> list[dict[str, Any]]:
    """Return rows of scores as they must be; raises ValueError or the like for others."""
    return [
        {
            **row,
            "checkpoint": str(row["checkpoint"]),
            "scores": {n: None if v is None else float(v) for n, v in row["scores"].items()},
        }
        for row in rows
    ]


def _from(folder: Path, path: Path) -> str:
    """`path` as seen from `folder`, so that a run folder may be moved."""
    return os.path.relpath(path, folder)


def _samples(videos: Sequence[Video]) -> str:
    groups: dict[str, list[Video]] = {}
    for video in videos:
        groups.setdefault(video.group, []).append(video)
    if not groups:
        return ""
    # as many columns as the longest row has clips, so that rows stand under each other
    columns = min(MOST_COLUMNS, max(LEAST_COLUMNS, *(len(group) for group in groups.values())))
    rows = "".join(
        f'<div class="group{"" if name else " unnamed"}"><h3>{escape(name)}</h3>'
        f'<div class="clips" style="--columns:{columns}">{"".join(map(_clip, group))}</div></div>'
        for name, group in groups.items()
    )
    return (
        '<div class="tools" hidden><button data-do="play">Pause</button>'
        '<button data-do="restart">From the start</button>'
        '<button data-do="slow" aria-pressed="false">Half speed</button>'
        '<button data-do="loop" aria-pressed="true">Loop</button>'
        '<button data-do="smooth" aria-pressed="false">Smooth</button>'
        '<span class="hint">Click a clip to hear it.</span></div>' + rows
    )


def _clip(video: Video) -> str:
    try:
        content = video.path.read_bytes() if video.path.is_file() else None
    except OSError as error:
        raise MediaError(f"{video.path}: {error.strerror}; the report embeds it") from error
    if content is None or content[4:8] != b"ftyp":
        what = "not there" if content is None else "no mp4"
        raise MediaError(f"{video.path}: {what}; the report embeds it")
    data = base64.b64encode(content).decode("ascii")
    caption = f"<small>{escape(video.caption)}</small>" if video.caption else ""
    return (
        f'<figure class="clip"><div class="frame"><video controls loop muted playsinline '
        f'preload="auto" aria-label="{escape(f"{video.title} {video.group}".strip())}" '
        f'src="data:video/mp4;base64,{data}"></video></div>'
        f"<figcaption><b>{escape(video.title)}</b>{caption}</figcaption></figure>"
    )


def _page(title: str, summary: Mapping[str, Any], sections: Mapping[str, str]) -> str:
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
    here = files("echolab.tracking")
    parts = {
        "style": (here / "report.css").read_text(encoding="utf-8"),
        "script": (here / "report.js").read_text(encoding="utf-8"),
        "title": escape(title),
        "head": about + (f'<dl class="facts">{facts}</dl>' if facts else ""),
        "links": links,
        "body": body,
    }
    frame = (here / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], frame)


_NOTES = {
    "Loss": (
        '<p class="note">Faint lines are as logged, bold ones their moving average. '
        "Point at a chart for its numbers.</p>"
    ),
    "Scores": (
        '<p class="note">Each measure is taken on clips that were held out. '
        "Ground truth is what those clips themselves score; shuffled sound is the same clips with "
        "the voice of another. A bar is empty at shuffled sound and full at ground truth. "
        "<em>demo</em> marks measures by small stand-in networks: they compare rows of this "
        "table, and nothing else.</p>"
    ),
    "Tasks": (
        '<p class="note">The tasks come in from hard to easy. Errors are squared errors of the '
        "velocity, averaged over the clips of that task.</p>"
    ),
}
