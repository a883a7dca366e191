"""The ledger lists what was trained on, without discarded steps; the audit reports every fault."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import encoded
import pytest
import runs

from echolab.cli.__main__ import main
from echolab.data.batch_sampler import ShuffleConfig
from echolab.data.ledger import (
    LEDGER,
    SKIPPED,
    Attempt,
    LedgerWriter,
    Row,
    SkippedBatch,
    audit_run,
    next_attempt,
    read_ledger,
    read_skipped,
    write_skipped,
)
from echolab.data.train_dataset import build_mixture
from echolab.errors import DataError
from echolab.heartbeat import Heartbeat
from echolab.training.config import Intervals
from echolab.training.datamodule import ShardDataModule, TrainData

EVERY = Intervals(log_every=1, save_every=2)
Steps = list[list[str]]  # for each step, the keys


def datasets(folder: Path, span: int | None = None) -> list[dict[str, Any]]:
    clips = runs.write_clips(folder / "clips", 4)
    return [
        {
            "folder": str(clips.folder),
            "fingerprint": clips.fingerprint,
            "samples": len(clips),
            "span": span or len(clips),
        }
    ]


def write(
    folder: Path, number: int, steps: Steps, *, first: int = 0, world: int = 1,
    epochs: int = 4, span: int | None = None,
) -> None:  # fmt: skip
    """Write an attempt whose keys are split among the ranks; `epochs` clips belong to one epoch."""
    attempt = Attempt(number, world, first, datasets(folder, span), [])
    for rank in range(world):
        writer = LedgerWriter(folder / LEDGER, attempt, rank)
        for step, keys in enumerate(steps, first):
            size = len(keys) // world
            own = keys[rank * size : (rank + 1) * size]
            epoch = [step * len(keys) // epochs] * size
            writer.write(Row(step, "sft", [0] * size, epoch, own, ["00"] * size))


K = [f"clip-{i:03d}" for i in range(4)]
GOOD: Steps = [[K[2], K[0]], [K[1], K[3]], [K[3], K[0]], [K[1], K[2]]]


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_without_fault_is_exact(tmp_path: Path, world: int) -> None:
    write(tmp_path, 1, GOOD, world=world)
    audit = audit_run(tmp_path)
    assert audit.exact and (audit.steps, audit.samples, audit.lines()) == (4, 8, [])
    assert main(["data", "audit", str(tmp_path)]) == 0


def test_discarded_steps_do_not_count(tmp_path: Path) -> None:
    write(tmp_path, 1, [*GOOD[:3], [K[0], K[0]]], world=2)
    write(tmp_path, 2, [], first=3)  # killed before its first step
    write(tmp_path, 3, GOOD[2:], first=2)
    audit = audit_run(tmp_path)
    assert audit.exact and (audit.steps, audit.attempts) == (4, 3)


def test_a_step_that_only_some_ranks_wrote_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, 1, GOOD, world=2)
    path = tmp_path / LEDGER / "attempt-0001-rank-00001.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], lines[-1][:20]]))  # killed while it wrote
    assert audit_run(tmp_path).exact and list(read_ledger(tmp_path).steps) == [0, 1, 2]
    path.write_text("\n".join([*lines[:2], *lines[3:]]))  # a line in the middle is gone
    assert "step 1: attempt 1 lacks ranks [1]" in audit_run(tmp_path).lines()[0]
    path.unlink()
    assert "rank 1 lists no step beyond -1, rank 0 continues to 3" in audit_run(tmp_path).lines()[0]


def audit_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what the command reports of a run that has faults."""
    assert main(["data", "audit", str(folder)]) == 1
    text = capsys.readouterr().out
    assert main(["data", "audit", str(folder), "format=json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["exact"] and report["run"] == str(folder)
    return text


def test_a_missing_key_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 1, [[K[2], K[0]], [K[1], K[2]], *GOOD[2:]])
    text = audit_of(tmp_path, capsys)
    assert f"epoch 0: {K[3]} is missing" in text
    assert f"epoch 0: {K[2]} is doubled (steps 0, 1)" in text


def test_samples_that_drop_omits_are_not_missing(tmp_path: Path) -> None:
    steps = [[K[2], K[0], K[1]], [K[3], K[1], K[0]], [K[3], K[2], K[0]]]
    write(tmp_path / "drop", 1, steps, epochs=3, span=3)
    assert audit_run(tmp_path / "drop").exact
    write(tmp_path / "carry", 1, steps, epochs=3)
    assert [(f.epoch, f.key) for f in audit_run(tmp_path / "carry").missing] == [
        (0, K[3]),
        (1, K[2]),
    ]


def test_bad_samples_in_quarantine_are_excused(tmp_path: Path) -> None:
    write(tmp_path, 1, [[K[2], K[0]], [K[1], K[2]], *GOOD[2:]])
    entry = {"dataset": datasets(tmp_path)[0]["fingerprint"], "key": K[3]}
    (tmp_path / "quarantine.jsonl").write_text(json.dumps(entry) + "\n")
    audit = audit_run(tmp_path)
    assert audit.exact and audit.quarantined == 1  # another stood for it in the first epoch
    write(tmp_path / "two", 1, [[K[2], K[0]], [K[2], K[2]], *GOOD[2:]])
    (tmp_path / "two/quarantine.jsonl").write_text(json.dumps(entry) + "\n")
    assert [(f.key, f.steps) for f in audit_run(tmp_path / "two").doubled] == [(K[2], [0, 1, 1])]
    assert [f.key for f in audit_run(tmp_path / "two").missing] == [K[1]]


def test_only_batches_that_an_event_skips_may_be_missing(tmp_path: Path) -> None:
    write(tmp_path, 1, [GOOD[0], *GOOD[2:]], epochs=4)  # the second batch, K[1] and K[3], is gone
    path = tmp_path / LEDGER / "attempt-0001-rank-00000.jsonl"
    head, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, epoch in zip(rows, (0, 1, 1), strict=True):
        row["epochs"] = [epoch, epoch]
    path.write_text("".join(json.dumps(row) + "\n" for row in [head, *rows]))
    missing = [(0, K[1]), (0, K[3])]
    assert [(f.epoch, f.key) for f in audit_run(tmp_path).missing] == missing
    write_skipped(tmp_path / LEDGER, [SkippedBatch("sft", 1, [0], [0], [K[1]])])
    skips = [("sft", 1, 1)]
    assert [(f.epoch, f.key) for f in audit_run(tmp_path, skips).missing] == missing[1:]
    write_skipped(tmp_path / LEDGER, [SkippedBatch("sft", 2, [0, 1], [0, 0], [K[3], K[0]])])
    with (tmp_path / LEDGER / SKIPPED).open("a") as file:
        file.write('{"kind": "sft", "bat')  # killed while it wrote
    assert [batch.batch for batch in read_skipped(tmp_path / LEDGER)] == [1, 2]
    audit = audit_run(tmp_path, [("sft", 1, 2)])
    assert audit.exact and audit.skipped == 2  # K[0] is of another dataset
    unasked = audit_run(tmp_path, skips)
    assert "sft batch 2 was skipped, and no event of the run asked for it" in unasked.lines()[0]
    assert [f.key for f in unasked.missing] == [K[3]]
    assert not audit_run(tmp_path, [("preference", 1, 2)]).exact


def test_a_batch_trained_despite_a_skip_event_is_reported(tmp_path: Path) -> None:
    write(tmp_path, 1, GOOD)
    write_skipped(tmp_path / LEDGER, [SkippedBatch("sft", 1, [0, 0], [0, 0], [K[1], K[3]])])
    lines = audit_run(tmp_path, [("sft", 1, 1)]).lines()
    assert (
        len(lines) == 2 and f"epoch 0: {K[1]} was trained on, though skipped (steps 1)" in lines[0]
    )


def test_unknown_keys_and_gaps_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", 1, [["nobody", K[0]]])
    assert "nobody is not in the dataset (steps 0)" in audit_of(tmp_path / "a", capsys)
    write(tmp_path / "b", 1, GOOD[:1], first=1)
    assert "begins at step 1" in audit_of(tmp_path / "b", capsys)
    write(tmp_path / "c", 1, GOOD[:1])
    write(tmp_path / "c", 2, GOOD[2:], first=2)
    assert "step 1 is in no attempt" in audit_of(tmp_path / "c", capsys)
    write(tmp_path / "d", 1, GOOD)
    (tmp_path / "d/clips/dataset.json").unlink()
    assert "dataset.json: not there" in audit_of(tmp_path / "d", capsys)


def test_a_missing_ledger_is_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "audit", str(tmp_path)]) == 1
    assert "a run with data.log_samples=true writes one" in capsys.readouterr().err
    assert main(["data", "adit"]) == 1
    assert (
        "no such action; did you mean audit?; use verify, index, audit" in capsys.readouterr().err
    )


def test_two_processes_cannot_write_one_attempt(tmp_path: Path) -> None:
    write(tmp_path, 1, [])
    assert next_attempt(tmp_path / LEDGER) == 2
    with pytest.raises(DataError, match="stop the other process that trains"):
        write(tmp_path, 1, [])


PLAN = (("sft", 3), ("dpo", 2), ("sft", 4))


def test_training_keeps_a_ledger_over_its_attempts(tmp_path: Path) -> None:
    def interrupt(step: int, steps: int) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)

    def effective(root: Path) -> dict[int, list[Row]]:
        return read_ledger(root / "run").steps

    plan = runs.schedule(*PLAN)
    runs.train(tmp_path / "unbroken", plan, intervals=EVERY, log_samples=True)
    first, _ = runs.train(
        tmp_path / "cut", plan, intervals=EVERY, log_samples=True, on_step=interrupt
    )
    assert 4 <= first.step < 9
    runs.train(
        tmp_path / "cut", plan, intervals=EVERY, log_samples=True, micro_batch_size=1, num_workers=1
    )
    assert effective(tmp_path / "cut") == effective(tmp_path / "unbroken")
    audit = audit_run(tmp_path / "cut/run")
    assert audit.exact and (audit.steps, audit.attempts, audit.samples) == (9, 2, 36)
    noise = [row.noise for rows in effective(tmp_path / "cut").values() for row in rows]
    assert len({one for row in noise for one in row}) == 36  # every clip of every epoch has its own


def test_padding_trains_on_no_clip_and_changes_no_mean(tmp_path: Path) -> None:
    plan = runs.schedule(("sft", 2), lr=0.0)

    def losses(root: Path, **changes: Any) -> list[float]:
        clips = [runs.write_clips(tmp_path / "five", 5)]
        _, rows = runs.train(
            root, plan, intervals=Intervals(log_every=1), clips=clips, log_samples=True, **changes
        )
        return [row["train/loss"] for row in rows]

    pad = ShuffleConfig(last_batch="pad")
    padded = losses(tmp_path / "a", batch_size=4, shuffle=pad)
    cut = losses(tmp_path / "b", batch_size=4, shuffle=pad, micro_batch_size=1)
    assert cut == pytest.approx(padded, rel=1e-4)
    (alone,) = read_ledger(tmp_path / "a/run").steps[1]
    assert len(alone.keys) == 1 and audit_run(tmp_path / "b/run").exact
    # The second step's loss is that of its one clip: the mean over both steps is the epoch's.
    (only,) = losses(tmp_path / "c", batch_size=5, schedule=runs.schedule(("sft", 1), lr=0.0))
    assert (4 * padded[0] + padded[1]) / 5 == pytest.approx(only, rel=1e-3)


def test_ranks_that_share_their_clips_write_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = build_mixture([runs.write_clips(tmp_path, 4)], kind="encoded", batch_size=2, seed=0)
    train_data = TrainData(clips, None, 2, 1, 0, 0, sequence_parallel=2)
    module = ShardDataModule(
        train_data, runs.schedule(("sft", 1)).place, 1, runs.curriculum(), Heartbeat(None)
    )
    writers = []
    for rank in range(4):
        monkeypatch.setattr("echolab.training.distributed.rank", lambda rank=rank: rank)
        writers.append(module.writer)
    assert writers == [0, None, 1, None]


def test_the_audit_of_mixed_datasets_holds_after_a_change_of_workers(tmp_path: Path) -> None:
    a, b = encoded.write(tmp_path / "a", 5)[0], encoded.write(tmp_path / "b", 3)[0]
    words = [
        "train", *encoded.SETTINGS, f"data.clips=[{a},{b}]", "data.clip_weights=[3,1]",
        "data.log_samples=true", "batch_size=4", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert main([*words, encoded.plan(("sft", 2))]) == 0
    assert main([*words, "data.num_workers=1", "micro_batch_size=2", encoded.plan(("sft", 4))]) == 0
    audit = audit_run(tmp_path / "run")
    assert audit.exact and (audit.steps, audit.attempts, audit.samples) == (4, 2, 16)
    sources = [s for rows in read_ledger(tmp_path / "run").steps.values() for s in rows[0].sources]
    assert sources.count(0) == pytest.approx(12, abs=1)


def test_the_wait_for_data_is_logged(tmp_path: Path) -> None:
    order = ShuffleConfig(last_batch="drop")
    _, rows = runs.train(tmp_path, runs.schedule(("sft", 3)), intervals=EVERY, shuffle=order)
    assert all(0 < row["perf/data_wait_seconds"] < 60 for row in rows)
    assert [(row["data/epochs"], row["data/dropped"]) for row in rows] == [(1, 3), (2, 6), (3, 9)]


def test_the_order_settings_of_a_run_cannot_change(tmp_path: Path) -> None:
    from echolab.errors import EcholabError

    runs.train(tmp_path, runs.schedule(("sft", 2)), intervals=EVERY)
    with pytest.raises(EcholabError, match="order was"):
        runs.train(
            tmp_path,
            runs.schedule(("sft", 3)),
            intervals=EVERY,
            shuffle=ShuffleConfig(shuffle_buffer=7),
        )
