"""Evaluation during training: no trace in the weights, the same scores on any number of ranks."""

import json
from pathlib import Path
from typing import Any

import forked
import pytest
import rank_evaluation
import runs
import small_run

from echolab.evaluation.config import planned_clips
from echolab.evaluation.records import FOLDER, RESULTS, last_time
from echolab.training.checkpoints.checkpoint import folder_of

SCORES = {f"eval/{name}" for entry in rank_evaluation.SCORES for name in entry["names"]}  # type: ignore[attr-defined]
MEASURED = {"eval/seconds", "eval/time_share"}  # differ from run to run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make clips, an autoencoder and networks for the scores."""
    root = tmp_path_factory.mktemp("evaluated")
    small_run.make(root)
    rank_evaluation.save_networks(root / "networks")
    return root


def trained(
    server: forked.ForkServer, root: Path, run: str, strategy: str, world: int, **more: Any
) -> tuple[list[dict[str, float]], dict[str, bytes]]:
    """Return the rows with scores, and the tensors of the last checkpoint."""
    arguments = {"root": str(root), "run": run, "strategy": strategy, "devices": world, **more}
    server.run("rank_evaluation:main", world=world, arguments=arguments)
    record = json.loads((root / f"{run}.json").read_text())
    rows = [row for row in record["rows"] if "eval/seconds" in row]
    return rows, runs.tensors_of(folder_of(root / run / "checkpoints", record["step"]))


def scores_of(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: row[name] for name in row if name not in MEASURED} for row in rows]


@pytest.mark.parametrize(("strategy", "world"), [("single", 1), ("ddp", 2), ("zero3", 2)])
def test_training_is_bit_equal_and_scores_do_not_depend_on_ranks(
    fork_server: forked.ForkServer, root: Path, strategy: str, world: int
) -> None:
    name = f"{strategy}-{world}"
    rows, with_evaluation = trained(fork_server, root, name, strategy, world, every=2)
    none, without = trained(fork_server, root, f"{name}-plain", strategy, world, every=0)
    assert with_evaluation == without and len(without) > 1 and none == []
    assert [row["step"] for row in rows] == [2, 4]
    assert all(set(row) >= SCORES | {"eval/clips"} | MEASURED for row in rows)
    assert all(0 < row["eval/time_share"] < 1 and row["eval/clips"] == 3 for row in rows)
    # Files: results with cards, and one video with audio.
    folder = root / name / FOLDER / "step-00000004"
    record = json.loads((folder / RESULTS).read_text())
    assert (
        {f"eval/{score}" for score in record["scores"]}
        == SCORES
        == {f"eval/{score}" for score in record["cards"]}
    )
    assert record["cards"]["fid_demo"]["clips"] == 3 and len(list(folder.glob("*.mp4"))) == 1
    assert last_time(root / name) == (3, record["seconds"])


@pytest.mark.parametrize("world", [2, 3])
def test_scores_of_one_network_are_the_same_bits_on_any_number_of_ranks(
    fork_server: forked.ForkServer, root: Path, world: int
) -> None:
    """Evaluate one saved network: training itself rounds differently on other numbers of ranks."""
    for ranks in (1, world):
        out = root / f"scores-{ranks}.json"
        arguments = {"root": str(root), "out": str(out)}
        fork_server.run("rank_evaluation:evaluate", world=ranks, arguments=arguments)
    alone, shared = (
        json.loads((root / f"scores-{ranks}.json").read_text()) for ranks in (1, world)
    )
    assert alone == shared and set(alone) == {name.removeprefix("eval/") for name in SCORES}


def test_an_interrupted_evaluation_ends_the_run_with_all_steps_saved(
    fork_server: forked.ForkServer, root: Path
) -> None:
    arguments = {"root": str(root), "run": "stopped", "strategy": "ddp", "devices": 2,
                 "every": 2, "victim": 1}  # fmt: skip
    fork_server.run("rank_evaluation:main", world=2, arguments=arguments)
    record = json.loads((root / "stopped.json").read_text())
    assert (record["reason"], record["step"]) == ("signal", 2)
    assert not [row for row in record["rows"] if "eval/seconds" in row]
    assert (folder_of(root / "stopped" / "checkpoints", 2) / "manifest.json").is_file()
    # The same command trains the remaining steps, and evaluates at its end.
    rows, _ = trained(fork_server, root, "stopped", "ddp", 2, every=2)
    assert [row["step"] for row in rows] == [4]


def test_clips_are_halved_until_the_last_time_fits() -> None:
    assert planned_clips(64, 100.0, 0, 0.0) == 64  # nothing measured
    assert planned_clips(64, 100.0, 64, 90.0) == 64
    assert planned_clips(64, 100.0, 64, 110.0) == 32
    assert planned_clips(64, 100.0, 64, 900.0) == 4
    assert planned_clips(64, 100.0, 32, 55.0) == 32  # never grows again
    assert planned_clips(64, 1e-9, 64, 900.0) == 2  # a Frechet distance needs two
