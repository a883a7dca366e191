"""`echolab evaluate watch=RUN` scores every checkpoint once, with the numbers of training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import rank_evaluation
import small_run

from echolab.cli.__main__ import main
from echolab.errors import ConfigError
from echolab.evaluation.records import FOLDER, RESULTS
from echolab.inference import commands, watch
from echolab.launch import run_dir
from echolab.tracking.metrics import EVALUATIONS, METRICS, read_metrics, read_run_metrics

STEPS = 4
MEASURED = {"eval/seconds", "eval/time_share", "eval/clips"}


def train(root: Path, run: Path, *words: str) -> None:
    """Train by the command, in a process of its own."""
    arguments = [
        "debug=cpu", "model.dim=48", "model.ffn_dim=64", "model.num_layers=1", "model.num_heads=2",
        f"data.clips={root / 'encoded'}", f"run_dir={run}", "metrics=demo", "verify_export=false",
        f"metrics.networks={root / 'networks'}", f"metrics.real={root / 'raw'}",
        f"schedule.epochs=[{{kind:sft,steps:{STEPS}}}]", "tasks=i2v", "evaluation=demo",
        f"evaluation.raw={root / 'raw'}", f"evaluation.clips={root / 'encoded'}",
        f"evaluation.vae={root / 'autoencoder.safetensors'}", "evaluation.num_steps=2",
        "evaluation.num_clips=3", "evaluation.batch_size=2", "evaluation.num_videos=1", *words,
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "echolab.cli", "train", *arguments], check=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make clips, networks, a run with evaluations and one without."""
    root = tmp_path_factory.mktemp("watched")
    small_run.make(root)
    rank_evaluation.save_networks(root / "networks")
    train(root, root / "evaluated", "evaluation.every=2")
    train(root, root / "plain", "evaluation.every=0")
    return root


def scores(rows: list[dict[str, float]]) -> dict[float, dict[str, float]]:
    """Return the scores of rows by step."""
    return {
        row["step"]: {k: v for k, v in row.items() if k.startswith("eval/") and k not in MEASURED}
        for row in rows
        if "eval/seconds" in row
    }


def test_a_watcher_scores_each_checkpoint_once_with_the_numbers_of_training(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = root / "plain"
    before = (run / METRICS).read_bytes()
    assert main(["evaluate", f"watch={run}"]) == 0  # ends with the last step of the run
    assert "2 checkpoints scored" in capsys.readouterr().out
    expected = scores(read_metrics(root / "evaluated" / METRICS))
    assert scores(read_run_metrics(run)) == expected and set(expected) == {2, 4}
    assert (run / METRICS).read_bytes() == before  # training may be writing it
    # The same files as an evaluation in training, but for the time.
    for step in (2, 4):
        name = Path(FOLDER) / f"step-{step:08d}" / RESULTS
        ours, theirs = (
            json.loads((root / one / name).read_text()) for one in ("plain", "evaluated")
        )
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert len(list((run / FOLDER).glob("*/*.mp4"))) == 2
    # A second watcher, or the same one after a restart, has nothing to do.
    assert main(["evaluate", f"watch={run}", "once=true"]) == 0
    assert "0 checkpoints scored" in capsys.readouterr().out
    assert len((run / EVALUATIONS).read_text().splitlines()) == 2


def test_a_checkpoint_that_another_watcher_scores_is_left_to_it(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, held = root / "evaluated", root / "evaluated" / FOLDER / "step-00000002"
    (held / RESULTS).unlink()
    with run_dir.held(held):
        assert watch.watch(run, once=True, poll_seconds=1) == 0
        assert "0 checkpoints scored" in capsys.readouterr().out
    # One that was killed before it wrote its results left no result: the next one scores.
    assert watch.watch(run, once=True, poll_seconds=1) == 0
    assert "1 checkpoints scored" in capsys.readouterr().out


def test_other_settings_than_the_runs_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="num_steps=: has no effect with watch="):
        commands.evaluate([f"watch={root / 'plain'}", "num_steps=3"])
    with pytest.raises(ConfigError, match="watch=.*none: not there"):
        commands.evaluate([f"watch={root / 'none'}"])


def test_a_run_without_a_held_out_set_is_refused_in_words(root: Path, tmp_path: Path) -> None:
    config = json.loads((root / "plain" / "config.json").read_text())
    config["evaluation"]["raw"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="evaluation.raw: an evaluation needs it; give its path"):
        watch.watch(tmp_path, once=True, poll_seconds=1)
