"""The demo's last pages: sample videos, the wandb table, report.html."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from echolab.config.networks import last_checkpoint, load_policy
from echolab.data.clips import load_clips, to_frames
from echolab.data.media import decode_mp4, write_video
from echolab.data.shard_reader import open_dataset
from echolab.demo.settings import DemoSettings, Folder
from echolab.inference.judging import load_autoencoder, sample_pixels
from echolab.progress import progress
from echolab.tasks.table import DEFAULT_TASK, TASK_TABLE, TASKS
from echolab.tracking.report import Video, write_report
from echolab.tracking.wandb_run import WandbRun
from echolab.types import Clips

SHOWN = 6  # clips of each checkpoint in the report
SHEET_TALKERS, SHEET_EVERY, SHEET_SCALE = 3, 3, 2  # of samples.png
TITLES = {
    "ground_truth": "Ground truth",
    "sft": "Supervised",
    "sft_longer": "Supervised for longer",
    "ndpo": "After negative preference",
    "dpo": "After paired preference",
}
OTHER_TASKS = tuple(task for task in TASKS if task != DEFAULT_TASK)  # one sample of each
ABOUT = (
    "Talking faces drawn by the program, with a synthesised voice. The network has seen none of "
    "these talkers: it is given the first frame, the sound and a caption, and makes the rest. "
    "Scores come from small stand-in networks and say so in their names; press a clip for sound."
)


def keep_samples(folder: Path, pixels: Tensor, truth: Clips) -> None:
    """The first clips as mp4 files with their sound."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(min(SHOWN, len(pixels))):
        path = folder / f"{truth.keys[number]}.mp4"
        write_video(path, to_frames(pixels[number]), truth.samples[number].numpy())


def write_sheet(out: Folder, seed: int) -> None:
    """samples.png: talkers as they are, and as the last checkpoint makes them, side by side."""
    rows = []
    for path in sorted((out.samples / "seed_0" / "ground_truth").glob("*.mp4"))[:SHEET_TALKERS]:
        for name in ("ground_truth", "dpo"):
            folder = out.samples / f"seed_{0 if name == 'ground_truth' else seed}" / name
            frames = decode_mp4((folder / path.name).read_bytes())[::SHEET_EVERY]
            rows.append(np.concatenate(list(frames), axis=1))
    sheet = np.concatenate(rows, axis=0).repeat(SHEET_SCALE, 0).repeat(SHEET_SCALE, 1)
    Image.fromarray(sheet).save(out.root / "samples.png")


def sample_tasks(settings: DemoSettings, out: Folder, seed: int) -> None:
    """One clip of each task, from the last checkpoint."""
    truth, dataset = load_clips(out.raw_held_out, len(OTHER_TASKS) + 1), open_dataset(out.held_out)
    net, video = load_policy(last_checkpoint(out.run("dpo", seed))), load_autoencoder(out.networks)
    folder = out.samples / f"seed_{seed}" / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    with progress("sampling every task", len(OTHER_TASKS)) as advance:
        for number, task in enumerate(OTHER_TASKS):
            pixels = sample_pixels(net, video, dataset, range(number, number + 1), task,
                                   settings.sampling(), lambda done: None)  # fmt: skip
            samples = truth.samples[number].numpy()
            write_video(folder / f"{task}.mp4", to_frames(pixels[0]), samples)
            advance(number + 1, task)


def videos_of(out: Folder, seed: int) -> list[Video]:
    """All sample videos, in the order of the page."""
    found = []
    for name, title in TITLES.items():
        base = out.samples / f"seed_{0 if name == 'ground_truth' else seed}" / name
        paths = sorted(base.glob("*.mp4"))
        found += [Video(path, path.stem.replace("_", " "), group=title) for path in paths]
    tasks = out.samples / f"seed_{seed}" / "tasks"
    for task in OTHER_TASKS:
        given = TASK_TABLE[task].given
        found.append(Video(tasks / f"{task}.mp4", task, given, "The other tasks"))
    return found


def write_pages(settings: DemoSettings, out: Folder, seeds: int, seconds: dict[str, float]) -> None:
    """report.html, and the same table and samples to wandb."""
    rows = json.loads(out.scores.read_text())["rows"]
    names = [name for name in TITLES if name != "ground_truth"]
    runs = {
        name if seeds == 1 else f"{name} {seed}": out.run(name, seed)
        for seed in range(seeds)
        for name in names
    }
    videos = videos_of(out, 0)
    summary = {
        "about": ABOUT,
        "Talkers": f"{settings.train_clips} to train on, {settings.held_out_clips} held out",
        "Clip": "1 s, 64 x 64, 25 frames a second, 16 kHz",
        "Supervised steps": settings.sft_steps,
        "Seeds": seeds,
        "Work": f"{sum(seconds.values()) / 60:.1f} min",
    }
    write_report(out.report, title="echolab demo", runs=runs, scores=rows, videos=videos,
                 summary=summary)  # fmt: skip
    write_sheet(out, 0)
    log_to_wandb(out, rows, videos)


def log_to_wandb(out: Folder, rows: list[dict[str, Any]], videos: list[Video]) -> None:
    """The score table and the sample videos, as a wandb run of their own."""
    run = WandbRun(out.root, project="echolab-demo", run_id=f"demo-{out.token}-scores",
                   name="scores", config={"rows": len(rows)})  # fmt: skip
    try:
        columns = list(dict.fromkeys(name for row in rows for name in row["scores"]))
        table = [
            [row["checkpoint"], row["seed"], *(row["scores"].get(name) for name in columns)]
            for row in rows
        ]
        run.log_table("eval/scores", ["checkpoint", "seed", *columns], table)
        run.log(0, {
            f"eval/{row['checkpoint']}/{name}": value
            for row in rows if row["seed"] == 0 for name, value in row["scores"].items()
        })  # fmt: skip
        run.log_videos(0, {
            f"samples/{video.path.parent.name}/{video.path.stem}": video.path for video in videos
        })  # fmt: skip
    finally:
        run.finish()
