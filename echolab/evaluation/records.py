"""The records of evaluations in a run folder, written by training and by `echolab evaluate watch=`.

RUN/evaluations/step-00000200/results.json   scores, intervals, flags and metric cards
RUN/evaluations/step-00000200/KEY.mp4        the first clips with their audio
"""

import json
import shutil
from pathlib import Path

from echolab.atomic_io import write_atomic
from echolab.data.media import write_video
from echolab.evaluation.scoring import Results
from echolab.metrics.metric import VideoClip

FOLDER, RESULTS = "evaluations", "results.json"
KEPT = 5  # evaluations whose videos are kept
PREFIX = "eval/"


def keep_video(folder: Path, num_videos: int, index: int, clip: VideoClip) -> None:
    """Write a clip as mp4 with its audio if it is one of the first `num_videos`."""
    # The same clips in every evaluation, so that videos can be compared over steps.
    if index < num_videos:
        folder.mkdir(parents=True, exist_ok=True)
        write_clip(folder / f"{clip.key}.mp4", clip)


def write_clip(path: Path, clip: VideoClip) -> None:
    """Write a clip as an mp4 file with its audio."""
    frames = clip.frames.permute(0, 2, 3, 1).numpy()
    write_video(path, frames, None if clip.samples is None else clip.samples.numpy())


def write_results(run_dir: Path, step: int, results: Results, seconds: float) -> None:
    """Write results.json, after the videos: an evaluation without it was interrupted."""
    folder = folder_of(run_dir, step)
    folder.mkdir(parents=True, exist_ok=True)
    record = results.to_json() | {"step": step, "seconds": seconds}
    write_atomic(folder / RESULTS, json.dumps(record, indent=1).encode(), patient=True)


def videos_of(run_dir: Path, step: int) -> dict[str, Path]:
    """Return the kept videos of an evaluation by their name in the tracker."""
    paths = sorted(folder_of(run_dir, step).glob("*.mp4"))
    return {f"{PREFIX}video/{path.stem}": path for path in paths}


def is_recorded(run_dir: Path, step: int) -> bool:
    """Return whether the checkpoint of a step was evaluated."""
    return (folder_of(run_dir, step) / RESULTS).is_file()


def folder_of(run_dir: Path, step: int) -> Path:
    """Return the folder of the evaluation at a step."""
    return run_dir / FOLDER / f"step-{step:08d}"


def last_time(run_dir: Path) -> tuple[int, float]:
    """Return clips and seconds of the newest evaluation of a run; zeros if there is none."""
    for folder in sorted((run_dir / FOLDER).glob("step-*"), reverse=True):
        try:
            record = json.loads((folder / RESULTS).read_text())
            return int(record["clips"]), float(record["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # an evaluation that was interrupted has no results
    return 0, 0.0


def remove_old_videos(run_dir: Path) -> None:
    """Remove the videos of all but the newest evaluations; their results are kept."""
    # Videos are most of the bytes; a long run would fill the disk with them.
    for folder in sorted((run_dir / FOLDER).glob("step-*"))[:-KEPT]:
        for path in folder.glob("*.mp4"):
            path.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
