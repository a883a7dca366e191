"""`echolab report RUN`: write report.html for a run folder, or for a folder of several runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echolab.arguments import argument, parse
from echolab.atomic_io import check_writable
from echolab.errors import DataError
from echolab.tasks.table import TASK_TABLE
from echolab.tracking.metrics import read_metrics
from echolab.tracking.report import Video, inside, validated_scores, write_again, write_report
from echolab.tracking.score_table import CHECKPOINTS

METRICS = ("metrics.jsonl", "*/metrics.jsonl", "*/*/metrics.jsonl")
# Layout of samples.png: number of clips, interval of the frames shown, magnification.
SHEET_CLIPS, SHEET_STRIDE, SHEET_SCALE = 3, 3, 2


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Write report.html in a run folder, or in a folder that holds several runs.

    It shows metrics.jsonl of each run, scores.json, the clips in samples/, and the facts in
    summary.json, if these exist.  report.json stores the inputs of a report; without further
    arguments an existing report is written again from it.
    """

    run: Path = argument("run folder, such as runs/demo", aka=("run_dir",))
    title: str | None = argument("title of the page", None, default_text="the folder's name")
    compare: tuple[str, ...] = argument(
        "groups of samples to set one above the other in samples.png", ()
    )
    wandb_project: str | None = argument(
        "wandb project to log scores and samples to", None, default_text="not logged"
    )
    wandb_id: str = argument("id of the wandb run of the scores", "scores")


def main(argv: list[str]) -> int:
    """Write the report and print its path."""
    arguments = parse(ReportArguments, argv, command="echolab report", positional=("run",))
    run = arguments.run
    if not run.is_dir():
        raise DataError(f"{run}: no such folder; give one that `echolab train` or `evaluate` wrote")
    out = run / "report.html"
    check_writable(out)
    # Without further arguments an existing report is written again.
    if out.with_suffix(".json").is_file() and arguments == ReportArguments(run=run):
        write_again(out)
    else:
        _write(arguments, out)
    print(out)
    return 0


def _write(arguments: ReportArguments, out: Path) -> None:
    """Write the page, samples.png and the wandb run from the contents of the folder."""
    run, scores = arguments.run, _scores(arguments.run / "scores.json")
    # List runs and clips in the order of the score table.
    order = list(dict.fromkeys(str(row["checkpoint"]) for row in scores))
    runs, videos = _runs(run, order), _videos(run, order)
    write_report(
        out,
        title=arguments.title or run.resolve().name,
        runs=runs,
        scores=scores,
        videos=videos,
        summary=_summary(run, runs),
    )
    if arguments.compare:
        _write_sheet(run, arguments.compare)
    if arguments.wandb_project:
        _log_to_wandb(arguments, scores, videos)


# -- contents of the folder ----------------------------------------------------------------------


def _runs(run: Path, order: Sequence[str]) -> dict[str, Path]:
    """Return the metrics files by name of their run, in the order of the score table."""
    paths = [_path_inside(run, path) for pattern in METRICS for path in sorted(run.glob(pattern))]
    if not paths:
        return {run.resolve().name: run / METRICS[0]}  # `write_report` reports a missing file
    short = [path.parent.resolve().name for path in paths]
    # Name folders by their path if their names are not unique.
    unique = len(set(short)) == len(short)
    named = {
        name if unique else str(path.parent.relative_to(run)): path
        for name, path in zip(short, paths, strict=True)
    }
    return dict(sorted(named.items(), key=lambda item: _rank(item[1].parent.name, order)))


def _videos(run: Path, order: Sequence[str]) -> list[Video]:
    """Return all clips in samples/; the clips of a folder form one row."""
    folder = run / "samples"
    clips = sorted(folder.rglob("*.mp4"), key=lambda clip: _rank(clip.parent.name, order))
    videos = []
    for clip in clips:
        # The folder name is the checkpoint, the file name the clip or its task.
        group = "" if clip.parent == folder else clip.parent.name
        title = CHECKPOINTS[group][0] if group in CHECKPOINTS else group.replace("_", " ")
        task = TASK_TABLE.get(clip.stem)
        videos.append(
            Video(
                path=_path_inside(run, clip),
                title=task.title if task else clip.stem.replace("_", " "),
                caption=task.given if task else "",
                group=title,
            )
        )
    return videos


def _rank(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)


def _path_inside(run: Path, path: Path) -> Path:
    """Return a path in the folder.  Raise DataError if it is a link that leaves the folder."""
    try:
        return inside(run, path.relative_to(run))
    except ValueError as error:
        raise DataError(f"{path}: a link out of the run folder; remove it") from error


def _summary(run: Path, runs: dict[str, Path]) -> dict[str, Any]:
    """Return the facts for the top of the page: summary.json, or counts from the metrics."""
    path = run / "summary.json"
    if path.is_file():
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            return {str(name): str(value) for name, value in facts.items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}: not a table of facts ({error}); remove it") from error
    # Without summary.json, count the metrics.
    rows = [row for metrics in runs.values() for row in read_metrics(metrics)]
    return {
        "Steps": max((row["step"] for row in rows), default=0),
        "Attempts": len({row["attempt"] for row in rows}),
    }


def _scores(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        return validated_scores(json.loads(path.read_text(encoding="utf-8"))["rows"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not a table of scores ({error}); score the run again") from error


# -- other outputs -------------------------------------------------------------------------------


def _write_sheet(run: Path, groups: Sequence[str]) -> None:
    """Write samples.png: frames of the first clips, with one row for each clip of each group."""
    import numpy as np
    from PIL import Image

    from echolab.data.media import decode_mp4

    samples = run / "samples"
    rows = []
    for clip in sorted((samples / groups[0]).glob("*.mp4"))[:SHEET_CLIPS]:
        for group in groups:
            path = _path_inside(run, samples / group / clip.name)
            if not path.is_file():
                raise DataError(f"{path}: no such clip; compare= takes groups of the same clips")
            frames = decode_mp4(path.read_bytes())[::SHEET_STRIDE]
            rows.append(np.concatenate(list(frames), axis=1))
    if not rows:
        raise DataError(f"{samples / groups[0]}: no clips; compare= takes folders in samples/")
    # One row of frames for each clip of each group.
    sheet = np.concatenate(rows, axis=0).repeat(SHEET_SCALE, 0).repeat(SHEET_SCALE, 1)
    Image.fromarray(sheet).save(run / "samples.png")


def _log_to_wandb(
    arguments: ReportArguments, scores: list[dict[str, Any]], videos: list[Video]
) -> None:
    """Log the score table and the sample clips to a separate wandb run."""
    from echolab.tracking.wandb_run import WandbRun

    assert arguments.wandb_project
    wandb_run = WandbRun(
        arguments.run, project=arguments.wandb_project, run_id=arguments.wandb_id, name="scores",
        config={"rows": len(scores)},
    )  # fmt: skip
    try:
        columns = list(dict.fromkeys(name for row in scores for name in row["scores"]))
        table = [
            [row["checkpoint"], row.get("seed"), *(row["scores"].get(name) for name in columns)]
            for row in scores
        ]
        wandb_run.log_table("eval/scores", ["checkpoint", "seed", *columns], table)
        first = next((row.get("seed") for row in scores), None)
        wandb_run.log(0, {
            f"eval/{row['checkpoint']}/{name}": value
            for row in scores if row.get("seed") == first
            for name, value in row["scores"].items() if value is not None
        })  # fmt: skip
        wandb_run.log_videos(0, {
            f"samples/{video.path.parent.name}/{video.path.stem}": video.path for video in videos
        })  # fmt: skip
    finally:
        wandb_run.finish()
