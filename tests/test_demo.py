"""The demo: its commands are valid, it resumes after a stop or a kill, and it writes its files."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.options import DrawOptions, EncodeOptions
from echolab.arguments import parse
from echolab.cli.demo import CHECKPOINTS, DemoArguments, Stage, in_hydra, shortened, stages
from echolab.cli.report import ReportArguments
from echolab.config.compose import compose
from echolab.inference.commands import EvaluateArguments, FitArguments, PairsArguments
from echolab.tracking.metrics import read_metrics
from echolab.tracking.score_table import REFERENCES

TINY = (
    "train_clips=16", "held_out_clips=16", "autoencoder_steps=4", "sync_steps=4",
    "feature_steps=4", "sft_steps=24", "preference_steps=4", "prompts=16", "candidates=2",
    "sampling_steps=2",
)  # fmt: skip
PARSERS = {  # of `echolab` commands: arguments, and those given by position
    "fit": (FitArguments, ("network", "data", "out")),
    "evaluate": (EvaluateArguments, ("checkpoint",)),
    "pairs": (PairsArguments, ("action", "folder")),
    "report": (ReportArguments, ("run",)),
    "draw": (DrawOptions, ("out",)),
    "encode": (EncodeOptions, ("source", "out")),
}
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


def tiny() -> DemoArguments:
    return parse(DemoArguments, list(TINY), command="echolab demo")


@pytest.mark.parametrize("demo", [DemoArguments(), tiny()], ids=["default", "tiny"])
def test_every_command_of_the_demo_is_valid(demo: DemoArguments) -> None:
    trained = []
    for stage in stages(demo, "token"):
        program, command, *words = stage.words
        if command == "train":
            trained.append(compose(words))
        else:
            schema, positional = PARSERS[command]
            parse(schema, words, command=program, positional=positional)
    assert [Path(config["run_dir"]).name for config in trained] == list(CHECKPOINTS)
    assert all(config["verify_export"] for config in trained)


def test_stage_names_are_unique_and_commands_can_be_pasted() -> None:
    all_stages = list(stages(DemoArguments(seeds=2), "token"))
    assert len({stage.name for stage in all_stages}) == len(all_stages)
    stage = Stage("report", ("echolab", "report", "runs/demo", "title=echolab demo"))
    assert shlex.split(stage.shown) == list(stage.words)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_training_of_default_length_is_its_experiment_file(name: str) -> None:
    assert shortened(name, 1.0) == []
    plain = compose([f"experiment=demo_{name}"])
    half = compose([f"experiment=demo_{name}", *shortened(name, 0.5)])
    for long, short in zip(plain["schedule"]["epochs"], half["schedule"]["epochs"], strict=True):
        assert short == {**long, "steps": max(1, round(long["steps"] / 2))}
    assert [s["targets"] for s in half["tasks"]["stages"]] == [
        s["targets"] for s in plain["tasks"]["stages"]
    ]


def test_plain_values_are_written_in_hydra_grammar() -> None:
    assert (
        in_hydra([{"kind": "sft", "lr_scale": 0.25, "x": None}])
        == "[{kind:sft,lr_scale:0.25,x:null}]"
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_demo_resumes_after_a_stop_and_a_kill(tmp_path: Path) -> None:
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
    assert (out / "samples.png").stat().st_size > 1_000
    page = (out / "report.html").read_text()
    assert "Continuation" in page and "DPO" in page and "held out" in page
    losses = [row["step"] for row in read_metrics(out / "seed_0/sft/metrics.jsonl")
              if "train/loss" in row]  # fmt: skip
    assert losses == sorted(set(losses)) and losses[-1] == 24

    before = (out / "scores.json").read_bytes()  # a fourth start has nothing left to do
    fourth = demo(out)
    output, errors = fourth.communicate(timeout=900)
    assert fourth.returncode == 0, errors
    assert (out / "scores.json").read_bytes() == before


def test_demo_with_other_settings_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text('{"settings": {"sft_steps": 7}, "seconds": {}}')
    process = demo(tmp_path)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 1
    assert errors.strip().count("\n") == 0
    assert str(tmp_path) in errors and "out=FOLDER" in errors
