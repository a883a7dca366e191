"""The commands fit, evaluate and report: clips to fit on, rows of the score table, the page."""

import json
from pathlib import Path

import pytest
import small_run
import torch

from echolab.cli import report
from echolab.errors import ConfigError, DataError
from echolab.inference import commands
from echolab.inference.evaluate import add_row
from echolab.inference.fit import read_clips
from echolab.inference.inputs import load_clips
from echolab.tasks.table import TASKS
from echolab.tracking.score_table import BOUNDS, REFERENCES

CLIPS = 4  # of `small_run`
SCORES = {"sync_c_demo", "sync_d_demo", "fid_demo", "fvd_demo", "psnr_first_frame", "mouth_corr"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> small_run.SmallRun:
    """Make a small run, and all demo networks by the command."""
    made = small_run.make(tmp_path_factory.mktemp("small") / "networks")
    networks = {
        "sync_judge": ["sync", f"vae={made.video}", "num_clips=2"],
        "sync_evaluator": ["sync", f"vae={made.video}", "first_clip=2"],
        "frames": ["frames"],
        "clips": ["clips"],
    }
    for name, (network, *words) in networks.items():
        out = made.video.with_name(f"{name}.safetensors")
        assert commands.fit([network, str(made.raw), str(out), "steps=1", *words]) == 0
    return made


def words_of(made: small_run.SmallRun, *words: str) -> list[str]:
    folders = [f"raw={made.raw}", f"clips={made.encoded}", f"real={made.raw}"]
    return [*words, *folders, f"networks={made.video.parent}", "num_clips=4", "num_steps=1"]


def test_networks_are_fitted_on_a_slice_of_clips_and_its_reconstructions(
    made: small_run.SmallRun,
) -> None:
    every, part = load_clips(made.raw), read_clips(made.raw, 1, 2, None)
    assert part.keys == every.keys[1:3]
    for name in ("pixels", "samples", "face", "lips", "visemes"):
        assert torch.equal(getattr(part, name), getattr(every, name)[1:3])
    twice = read_clips(made.raw, 1, 2, made.video)
    assert twice.keys == part.keys * 2 and twice.visemes is None
    assert torch.equal(twice.pixels[:2], part.pixels)
    assert not torch.equal(twice.pixels[2:], part.pixels)
    assert torch.equal(twice.samples, part.samples.repeat(2, 1))
    with pytest.raises(DataError, match="first_clip=4: .* has 4 clips"):
        read_clips(made.raw, CLIPS, None, None)


def test_evaluations_write_rows_samples_and_report(
    made: small_run.SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, samples = tmp_path / "scores.json", tmp_path / "samples"
    for name in REFERENCES:
        words = [f"reference={name}", f"scores={table}", f"samples={samples / name}"]
        assert commands.evaluate(words_of(made, *words, "num_samples=2")) == 0
    words = [str(made.run), f"scores={table}", f"samples={samples / 'run'}", "unguided=true"]
    words += [f"task_samples={samples / 'tasks'}", "train_seed=3", "format=json"]
    capsys.readouterr()
    assert commands.evaluate(words_of(made, *words)) == 0

    printed = json.loads(capsys.readouterr().out)
    rows = {row["checkpoint"]: row for row in json.loads(table.read_text())["rows"]}
    assert list(rows) == ["ground_truth", "reconstruction", "shuffled_sound", "run"]
    assert rows["run"]["seed"] == 3 and rows["run"]["scores"] == printed["scores"]
    assert set(rows["ground_truth"]["scores"]) == SCORES
    unguided = {"sync_c_unguided_demo", "mouth_corr_unguided"}
    assert set(rows["run"]["scores"]) == SCORES | unguided
    assert rows["ground_truth"]["scores"]["psnr_first_frame"] == 100
    truth, shuffled = (rows[name]["scores"]["mouth_corr"] for name in BOUNDS)
    assert shuffled < truth
    # The autoencoder, fitted for two steps, bounds what any sample can reach.
    assert set(rows["reconstruction"]["scores"]) == SCORES
    assert 3 < rows["reconstruction"]["scores"]["psnr_first_frame"] < 30
    assert len(list((samples / "ground_truth").glob("*.mp4"))) == 2
    assert len(list((samples / "run").glob("*.mp4"))) == CLIPS
    tasks = {path.stem for path in (samples / "tasks").glob("*.mp4")}
    assert tasks == set(TASKS) - {"i2v"}

    # The report takes all of it from the folder, and the facts from summary.json.
    (tmp_path / "seed_0").mkdir()
    (tmp_path / "seed_0" / "metrics.jsonl").write_text('{"step": 1, "attempt": 1, "time": 0}\n')
    (tmp_path / "summary.json").write_text('{"about": "A small run.", "Talkers": 4}')
    assert report.main([str(tmp_path), "title=Small", "compare=ground_truth,run"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert all(text in page for text in ("<title>Small", "A small run.", "Continuation"))
    assert (tmp_path / "samples.png").stat().st_size > 1000
    with pytest.raises(DataError, match="compare= takes folders in samples/"):
        report.main([str(tmp_path), "compare=none_such"])


def test_a_row_replaces_an_earlier_one_of_the_same_name_and_seed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "scores.json"
    for name, seed, score in (("a", 0, 1.0), ("b", 0, 2.0), ("a", 1, 3.0), ("a", 0, 4.0)):
        add_row(path, {"checkpoint": name, "seed": seed, "scores": {"x": score}, "cards": {}})
    rows = json.loads(path.read_text())["rows"]
    assert [(row["checkpoint"], row["seed"], row["scores"]["x"]) for row in rows] == [
        ("b", 0, 2.0), ("a", 1, 3.0), ("a", 0, 4.0),
    ]  # fmt: skip
    path.write_text("{")
    with pytest.raises(DataError, match="not a table of scores"):
        add_row(path, {"checkpoint": "a", "seed": 0, "scores": {}, "cards": {}})


def test_the_table_of_a_paper_needs_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scores.json"
    with pytest.raises(ConfigError, match="needs scores="):
        commands.evaluate(["table=paper"])
    with pytest.raises(ConfigError, match="scores=.*not there"):
        commands.evaluate(["table=paper", f"scores={path}"])
    add_row(path, {"checkpoint": "mine", "seed": 0, "scores": {"sync_c": 3.25}, "cards": {}})
    assert commands.evaluate(["table=paper", f"scores={path}", "format=json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert (rows[0]["checkpoint"], rows[0]["marks"]) == ("mine", {"sync_c": "unknown"})
    assert commands.evaluate(["table=paper", f"scores={path}"]) == 0
    text = capsys.readouterr().out
    assert "3.250 [unknown]" in text and "4.780 [unknown]" in text


def test_exactly_one_subject_is_scored(tmp_path: Path) -> None:
    for words in ([], [str(tmp_path), "reference=ground_truth"]):
        with pytest.raises(ConfigError, match="needs checkpoint= or reference="):
            commands.evaluate(words)
    with pytest.raises(ConfigError, match="checkpoint=.*none: not there"):
        commands.evaluate([str(tmp_path / "none")])
    with pytest.raises(ConfigError, match="vae=x: is for the network sync"):
        commands.fit(["frames", str(tmp_path), str(tmp_path / "out"), "vae=x"])
