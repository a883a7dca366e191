"""The whole demo in a few steps a stage: stopped, killed, started again, and what it leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from echolab.cli.demo import CHECKPOINTS
from echolab.tracking.metrics import read_metrics
from echolab.tracking.score_table import REFERENCES

TINY = (
    "train_clips=16", "held_out_clips=16", "autoencoder_steps=4", "sync_steps=4",
    "feature_steps=4", "sft_steps=24", "preference_steps=4", "prompts=16", "candidates=2",
    "sampling_steps=2",
)  # fmt: skip
ROWS = ("ground_truth", "shuffled_sound", *CHECKPOINTS)
SCORES = {"sync_c_demo", "sync_d_demo", "fid_demo", "fvd_demo", "mouth_corr", "psnr_first_frame"}


def demo(out: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "echolab.cli", "demo", f"out={out}", *TINY, "format=json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        # a test run in the background of a shell ignores SIGINT, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for(process: "subprocess.Popen[str]", path: Path, pattern: str) -> None:
    end = time.monotonic() + 900
    while not list(path.glob(pattern)):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < end, f"{path}/{pattern} did not come"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    out = tmp_path / "demo"

    first = demo(out)  # Ctrl-C while the judges are fitted
    wait_for(first, out, "networks/autoencoder.safetensors")
    first.send_signal(signal.SIGINT)
    assert first.wait(900) == 130, first.stderr and first.stderr.read()

    second = demo(out)  # killed during supervised training
    wait_for(second, out, "seed_0/sft/metrics.jsonl")
    second.kill()
    second.wait()
    assert not (out / "report.html").exists()

    third = demo(out)
    output, errors = third.communicate(timeout=1500)
    assert third.returncode == 0, errors
    answer = json.loads(output.splitlines()[-1])
    rows = json.loads((out / "scores.json").read_text())["rows"]
    assert [(row["checkpoint"], row["seed"]) for row in rows] == [(name, 0) for name in ROWS]
    assert all(set(row["scores"]) == SCORES for row in rows if row["checkpoint"] in REFERENCES)
    unguided = {"sync_c_unguided_demo", "mouth_corr_unguided"}
    trained = [row for row in rows if row["checkpoint"] not in REFERENCES]
    assert all(set(row["scores"]) == SCORES | unguided for row in trained)
    assert answer["scores"] == rows
    assert (out / "report.html").stat().st_size > 50_000
    losses = [row["step"] for row in read_metrics(out / "seed_0/sft/metrics.jsonl")
              if "train/loss" in row]  # fmt: skip
    assert losses == sorted(set(losses)) and losses[-1] == 24

    before = (out / "scores.json").read_bytes()  # a fourth start has nothing left to do
    fourth = demo(out)
    output, errors = fourth.communicate(timeout=900)
    assert fourth.returncode == 0, errors
    assert (out / "scores.json").read_bytes() == before


def test_a_demo_of_other_settings_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text('{"settings": {"sft_steps": 7}, "seconds": {}}')
    process = demo(tmp_path)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 1
    assert errors.strip().count("\n") == 0
    assert str(tmp_path) in errors and "out=FOLDER" in errors
