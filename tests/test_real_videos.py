"""The README's commands, from real videos to a talking portrait."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import pytest

VIDEOS = ("th_may5s.mp4", "grid_bbaf2n.mpg", "noaudio_iplap129.mp4", "bad_rot90.mov")


def run(where: Path, weights: Path, *words: str) -> str:
    environment = {**os.environ, "WANDB_MODE": "offline", "ECHOLAB_WEIGHTS": str(weights)}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=where, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{words}: {done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.media
def test_the_readmes_commands_lead_from_real_videos_to_a_talking_portrait(
    media: Path, weights: Path, tmp_path: Path
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in VIDEOS:
        (videos / name).symlink_to((media / "video" / name).resolve())
    real = tmp_path / "runs" / "real"
    network = real / "networks" / "autoencoder.safetensors"

    output = run(tmp_path, weights, "data_prep", "run", str(videos), str(real / "raw"),
               "frames=25", "size=64", "format=json")  # fmt: skip
    assert json.loads(output)["clips"] >= 4
    refused = [json.loads(line) for line in (real / "raw" / "refused.jsonl").open()]
    reasons = {entry["source"]: entry["reason"] for entry in refused}
    assert "no audio" in reasons["noaudio_iplap129.mp4"] and "bad_rot90.mov" in reasons
    assert all(
        set(entry) == {"source", "start_seconds", "end_seconds", "reason"} for entry in refused
    )

    run(tmp_path, weights, "echolab.cli", "fit", "autoencoder", str(real / "raw"), str(network),
        "steps=20")  # fmt: skip
    run(tmp_path, weights, "data_prep", "encode", str(real / "raw"), str(real / "encoded"),
        f"vae={network}")  # fmt: skip
    run(tmp_path, weights, "echolab.cli", "data", "verify", str(real / "encoded"))

    run(tmp_path, weights, "echolab.cli", "train", "experiment=real_smoke")
    rows = [json.loads(line) for line in (tmp_path / "runs/real_smoke/metrics.jsonl").open()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) >= 2 and losses[-1] < losses[0]

    out = tmp_path / "talking.mp4"
    run(tmp_path, weights, "echolab.cli", "generate",
        f"image={media / 'image' / 'hallo_1.jpg'}", f"audio={media / 'audio' / 'hallo_1.wav'}",
        f"out={out}", "checkpoint=runs/real_smoke", f"vae={network}", "seconds=2", "num_steps=3",
        )  # fmt: skip
    with av.open(str(out)) as video:
        assert len(video.streams.video) == 1 and len(video.streams.audio) == 1
        assert sum(1 for _ in video.decode(video=0)) == 50
