"""`echolab report RUN`: write a run's report.html again, with what has been logged since."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from echolab.arguments import parse
from echolab.atomic_io import prove_writable
from echolab.errors import DataError
from echolab.tracking.metrics import read_metrics
from echolab.tracking.report import Video, checked, inside, write_again, write_report


@dataclass
class Arguments:
    """Write report.html in a run folder again.

    What the report was made from at first is in report.json beside it.  Where there is none, the
    report is made from metrics.jsonl, scores.json and samples/ in the folder.
    """

    run: Path = field(metadata={"help": "the run folder, such as runs/demo"})


def main(argv: list[str]) -> int:
    run = parse(Arguments, argv, command="echolab report", positional=("run",)).run
    if not run.is_dir():
        raise DataError(f"{run}: no such run folder")
    out = run / "report.html"
    prove_writable(out)
    if out.with_suffix(".json").is_file():
        write_again(out)
    else:
        _first(run, out)
    print(out)
    return 0


def _first(run: Path, out: Path) -> None:
    """From the run folder alone: samples of one folder stand in one row."""
    rows = read_metrics(run / "metrics.jsonl")
    clips = sorted((run / "samples").rglob("*.mp4"))
    videos = [
        Video(_own(run, clip), clip.stem.replace("_", " "), group="" if top == "samples" else top)
        for clip in clips
        if (top := clip.parent.name)
    ]
    summary = {
        "Steps": max((row["step"] for row in rows), default=0),
        "Attempts": len({row["attempt"] for row in rows}),
    }
    name = run.resolve().name
    write_report(
        out,
        title=name,
        runs={name: run / "metrics.jsonl"},
        scores=_scores(run / "scores.json"),
        videos=videos,
        summary=summary,
    )


def _own(run: Path, clip: Path) -> Path:
    try:
        return inside(run, clip.relative_to(run))
    except ValueError as error:
        raise DataError(f"{clip}: a link out of the run folder; remove it") from error


def _scores(path: Path) -> list[dict[str, object]]:
    if not path.is_file():
        return []
    try:
        return checked(json.loads(path.read_text(encoding="utf-8"))["rows"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not a table of scores ({error}); score the run again") from error
