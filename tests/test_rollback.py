"""After a rollback a run equals one that never trained on the skipped batches, and a replay of
any step is equal bit for bit.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import encoded
import pytest

from echolab.cli import replay_steps
from echolab.cli.__main__ import main
from echolab.cli.train_rank import train
from echolab.config.compose import compose
from echolab.data.ledger import audit_run, read_ledger
from echolab.errors import ConfigError
from echolab.launch.lease import LEASE
from echolab.launch.run_dir import held
from echolab.tracking.metrics import MetricsLog, read_metrics
from echolab.training.checkpoints.checkpoint import (
    folder_of,
    latest_valid,
    open_checkpoint,
    saved_steps,
)
from echolab.training.checkpoints.diff import state_differences, tensor_differences
from echolab.training.guards import events

PLAN = encoded.plan(("sft", 4), ("dpo", 2), ("sft", 4))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    clips, pairs = encoded.write(tmp_path_factory.mktemp("encoded"), 7)
    return [
        *encoded.SETTINGS, f"data.clips={clips}", f"data.pairs={pairs}", "data.log_samples=true",
        "batch_size=2", "log_every=1", "verify_export=false", PLAN,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of ten steps, with checkpoints of 4, 6, 8 and 10."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert train(compose([*words, f"run_dir={run}"])).done
    return run


def copied(run: Path, to: Path) -> Path:
    """Copy a run to another folder and name that in its settings."""
    shutil.copytree(run, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "run_dir": str(to)}, indent=1))
    return to


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and LEASE not in path.parts
    }


def keys(run: Path) -> dict[int, list[list[str]]]:
    return {step: [row.keys for row in rows] for step, rows in read_ledger(run).steps.items()}


def same_end(a: Path, b: Path) -> bool:
    one, other = (latest_valid(run / "checkpoints")[0] for run in (a, b))
    assert one and other and one.step == other.step == 10
    return not [*tensor_differences(one, other), *state_differences(one.state, other.state)]


def test_a_rolled_back_run_never_trains_on_skipped_batches(
    trained: Path, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = copied(trained, tmp_path / "fresh")
    for name in ("checkpoints", "ledger"):
        shutil.rmtree(fresh / name)
    events.append(fresh, 0, "rollback", by="command", to=0, skip=["sft", 5, 2])
    for run in (a := copied(trained, tmp_path / "a"), b := copied(trained, tmp_path / "b")):
        assert main(["rollback", str(run), "to=6", "skip=5:7"]) == 0
        assert saved_steps(run / "checkpoints") == [6, 4]
        aside = run / "checkpoints/rolled-back-1"
        assert [path.name for path in sorted(aside.iterdir())] == ["step-000008", "step-000010"]
        assert open_checkpoint(folder_of(aside, 10)).step == 10  # kept complete
    said = capsys.readouterr().out
    assert f"{a}: resumes from step 6, without sft batches 5:7 (event 1)" in said
    for run in (a, b, fresh):
        train(compose([*words, f"run_dir={run}"]))
    assert same_end(a, b) and same_end(a, fresh) and not same_end(a, trained)
    # Steps 6 to 9 are supervised steps 4 to 7.
    assert keys(a) == keys(b) == keys(fresh)
    assert {s: k for s, k in keys(a).items() if s < 7} == {
        s: k for s, k in keys(trained).items() if s < 7
    }
    result = audit_run(a, events.skips(a))
    assert result.exact and (result.steps, result.attempts, result.skipped) == (10, 2, 4)
    assert main(["data", "audit", str(a)]) == 0
    assert "; 4 of skipped batches left out" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(a / "metrics.jsonl")] == list(range(1, 11))
    (a / events.EVENTS).unlink()  # nobody asked for it, then
    assert main(["data", "audit", str(a)]) == 1
    assert "sft batch 5 was skipped, and no event" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="give back its events.jsonl"):
        train(compose([*words, f"run_dir={a}"]))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["to=5"], "to=5: no checkpoint of that step; there are 4, 6, 8, 10"),
        (["to=6", "skip=3:9"], "skip of sft batches 3:9: those below 4 were trained on before"),
        (["to=6", "skip=1:3", "kind=preference"], "those below 2 were trained on before step 6"),
        (["to=6", "skip=8:9"], "skip=8:9: the run's sft batches after step 6 are 4 to 7"),
        (["to=6", "skip=9:9"], "skip=9:9: give first:stop"),
        (["to=6", "skip=-1:9"], "skip=-1:9: give first:stop"),
        (["to=8"], "step-000008/ema"),
    ],
)
def test_a_refused_rollback_changes_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    asked: list[str], message: str,
) -> None:  # fmt: skip
    run = copied(trained, tmp_path / "run")
    damaged = next((run / "checkpoints/step-000008").glob("ema*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    before = files(run)
    assert main(["rollback", str(run), *asked]) == 1
    assert message in capsys.readouterr().err
    assert files(run) == before


def test_a_run_in_use_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(trained, tmp_path / "run")
    with held(run):
        assert main(["rollback", str(run), "to=6"]) == 77
    assert "is using this run folder" in capsys.readouterr().err
    assert main(["rollback", str(tmp_path), "to=6"]) == 1
    assert "config.json: cannot be read" in capsys.readouterr().err
    for number in (1, 2):  # the second has nothing to move
        assert main(["rollback", str(run), "to=6", "format=json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["event"] == number and figures["skip"] is None
        assert figures["moved_to"] == (None if number == 2 else f"{run}/checkpoints/rolled-back-1")


def replayed(
    run: Path, step: int, capsys: pytest.CaptureFixture[str], **more: Any
) -> tuple[int, list[str]]:
    code = main(["replay", str(run), f"step={step}", *(f"{k}={v}" for k, v in more.items())])
    return code, capsys.readouterr().out.splitlines()


def test_any_step_is_replayed_bit_for_bit_and_the_run_does_not_change(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(trained)
    for step, start in ((1, 0), (5, 4), (10, 8)):  # step 5 prefers, by the reference of step 4
        out = tmp_path / f"out-{step}"
        code, lines = replayed(trained, step, capsys, out=out)
        last = lines[-1]
        assert (code, last.split(": ", 1)[1]) == (
            0, f"steps {start + 1} to {step} repeat (bit for bit), by ledger, metrics"
            + (", checkpoint" if step == 10 else ""),
        )  # fmt: skip
        assert min(read_ledger(out).steps) == start and max(read_ledger(out).steps) == step - 1
        assert replayed(trained, step, capsys, out=out)[0] == 1  # it is there
    assert files(trained) == before


def test_every_difference_is_reported(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(trained, tmp_path / "run")
    (ledger,) = (run / "ledger").glob("*.jsonl")
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert lines[9]["step"] == 8
    lines[9]["noise"][1] = "0" * 16
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["step"] == 10 and "train/loss" in row]
    row["train/loss"] *= 1 + 1e-15
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, result = replayed(run, 10, capsys)
    assert code == 1 and [line.split(" was")[0] for line in result] == [
        "step 9: noise differ from the ledger's",
        "step 10: train/loss",
    ]
    config = json.loads((run / "config.json").read_text())
    config["optim"]["weight_decay"] = 0.5
    (run / "config.json").write_text(json.dumps(config))
    assert main(["replay", str(run), "step=10", "format=json"]) == 1
    figures = json.loads(capsys.readouterr().out)
    assert figures["exact"] and figures["first_step"] == 8
    assert figures["compared"] == ["ledger", "metrics", "checkpoint"]
    assert any("step 10: master" in line for line in figures["differences"])
    for step, message in (
        (0, "step=0 is not a whole number, at least 1"),
        (11, "the run's schedule has 10 steps"),
    ):
        assert main(["replay", str(run), f"step={step}"]) == 1
        assert message in capsys.readouterr().err


def test_a_run_of_several_ranks_is_replayed_by_one_to_rounding(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(trained, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["trainer"] |= {"strategy": "ddp", "devices": 2}
    (run / "config.json").write_text(json.dumps(config))
    code, lines = replayed(run, 9, capsys)  # a clip at a time, as two ranks had them
    assert (code, lines[-1]) == (
        0,
        f"{run}: steps 9 to 9 repeat (losses to 0.001), by ledger, metrics",
    )
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["step"] == 9 and "train/loss" in row:
            row["train/loss"] *= 1.01
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, lines = replayed(run, 9, capsys)
    assert code == 1 and len(lines) == 1 and lines[0].startswith("step 9: train/loss was ")


def test_replay_compares_only_means_over_the_same_steps() -> None:
    def rows(*steps: tuple[int, int]) -> list[dict[str, Any]]:
        return [{"step": step, "attempt": n, "train/loss": 1.0} for step, n in steps]

    def spans(figures: list[dict[str, Any]], start: int, log: int) -> list[tuple[int, int]]:
        return [span for span, _ in replay_steps._by_span(figures, start, log)]

    # The second attempt went on from some step between 20 and 25, nobody says which.
    two = rows((10, 1), (20, 1), (25, 2), (30, 2))
    assert spans(two, 0, 10) == [(0, 10), (10, 20), (25, 30)]
    assert spans(rows((5, 1), (6, 2), (7, 2)), 4, 1) == [(4, 5), (5, 6), (6, 7)]
    assert spans(rows((25, 1), (30, 1)), 22, 10) == [(22, 25), (25, 30)]
    assert spans([{"step": 3, "attempt": 1, "val/loss": 1.0}], 0, 1) == []


def test_rows_from_before_a_rollback_do_not_count(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 1)
    for value, steps in ((0.0, (1, 2, 3, 4)), (1.0, (3, 4, 5))):
        for step in steps:
            log.log(step, {"train/loss": value})
            log.log(step, {"val/loss": value})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    figures = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert figures == [(1, 0.0), (2, 0.0), (3, 1.0), (4, 1.0), (5, 1.0)] and len(rows) == 10
