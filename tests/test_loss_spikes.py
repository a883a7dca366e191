"""Loss spikes in a running training: recorded, recomputed, or rolled back with batches skipped."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
from faulty_runs import EVERY, STEPS, Once, train
from forked import ForkServer

from echolab.data.ledger import audit_run
from echolab.errors import DivergedError
from echolab.training.checkpoints.checkpoint import latest_valid, saved_steps
from echolab.training.guards import events
from echolab.types import Batch


def final(root: Path) -> dict[str, bytes]:
    checkpoint, rejected = latest_valid(root / "run/checkpoints")
    assert checkpoint and checkpoint.step == STEPS and not rejected
    return runs.tensors_of(checkpoint.path)


def audited(run: Path) -> bool:
    """Return whether every sample was trained on once an epoch, except for those skipped on
    purpose.
    """
    return audit_run(run, events.skips(run)).exact


@pytest.mark.parametrize("factor", [float("nan"), 1e4])
def test_a_transient_fault_vanishes_when_steps_are_recomputed(
    tmp_path: Path, factor: float
) -> None:
    train(tmp_path / "sound", lambda batch: 1.0)
    rows = train(tmp_path / "faulty", Once(factor), policy="recompute")
    assert final(tmp_path / "faulty") == final(tmp_path / "sound")
    recorded = events.read(tmp_path / "faulty/run")
    assert [(e.kind, e.step, e.details["to"]) for e in recorded] == [("recompute", 7, 6)]
    # Step 7 was right the first time and again: the same figures twice.
    seventh = [row["train/loss"] for row in rows if row["step"] == 7]
    assert len(seventh) == 2 and seventh[0] == seventh[1]
    assert audited(tmp_path / "faulty/run")


def test_a_spike_that_repeats_is_blamed_on_the_data(tmp_path: Path) -> None:
    calls: list[int] = []

    def twice(batch: Batch) -> float:
        calls.append(1)
        return (
            1e4 if len(calls) in (8, 10) else 1.0
        )  # call 8 is step 7; after the rollback to step 6, call 10 is step 7

    train(tmp_path, twice, policy="recompute")
    kinds = [(e.kind, e.step) for e in events.read(tmp_path / "run")]
    assert kinds == [("recompute", 7), ("reproducible", 7)]


def eighth_batch() -> Callable[[Batch], float]:
    """Multiply by NaN the loss of the clips of the eighth batch, whenever they come together."""
    seen: list[list[str]] = []

    def factor(batch: Batch) -> float:
        seen.append(batch.keys)
        return float("nan") if len(seen) > 7 and seen[7] == batch.keys else 1.0

    return factor


def test_a_rollback_skips_batches_for_good(tmp_path: Path) -> None:
    guards = {"policy": "rollback", "rollback_steps": 1, "skip_batches": 2}
    for name in ("a", "b"):
        train(tmp_path / name, eighth_batch(), **guards)
        recorded = events.read(tmp_path / name / "run")
        assert [(e.kind, e.step, e.details["to"]) for e in recorded] == [("rollback", 7, 6)]
        assert recorded[0].details["skip"] == ["sft", 6, 2]
    assert final(tmp_path / "a") == final(tmp_path / "b")
    state = json.loads((tmp_path / "a/run/checkpoints/step-000012/state.json").read_text())
    assert state["schedule"]["skipped"] == [["sft", 6, 2]]
    assert audited(tmp_path / "a/run")
    assert not audit_run(tmp_path / "a/run").exact  # without the events' word
    # A resume needs no setting for this: the events are read again.
    result, _ = runs.train(
        tmp_path / "a", runs.schedule(("sft", STEPS + 2)), intervals=EVERY, log_samples=True
    )
    assert result.step == STEPS + 2


def test_a_loss_that_is_not_finite_ends_a_run_that_only_records(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="step 7 .*not finite.*loss_spike.policy=recompute"):
        train(tmp_path, Once(float("nan")))
    assert saved_steps(tmp_path / "run/checkpoints") == [6, 3]


def test_a_recorded_spike_changes_nothing(tmp_path: Path) -> None:
    train(tmp_path / "plain", Once(1e4), threshold=1e9)
    train(tmp_path / "noted", Once(1e4))
    assert final(tmp_path / "plain") == final(tmp_path / "noted")
    assert [e.kind for e in events.read(tmp_path / "noted/run")][:1] == ["spike"]
    assert events.read(tmp_path / "plain/run") == []


def test_the_checkpoint_to_roll_back_to_is_not_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from echolab.training.checkpoints import retention

    def slowly(path: Path) -> None:
        time.sleep(0.4)
        discard(path)

    discard = retention.discard
    monkeypatch.setattr(retention, "discard", slowly)
    train(tmp_path, eighth_batch(), policy="rollback", rollback_steps=4, skip_batches=2, save=1)
    recorded = events.read(tmp_path / "run")
    assert [(e.kind, e.details["to"]) for e in recorded] == [
        ("rollback", 6)
    ]  # the oldest there was
    assert saved_steps(tmp_path / "run/checkpoints")[:2] == [12, 11]


@pytest.mark.slow
def test_a_gradient_that_differs_on_one_rank_ends_both(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    runs.write_clips(tmp_path / "clips", 7)
    runs.write_pairs(tmp_path / "pairs", 5)
    ranks = fork_server.start(
        "faulty_runs:with_a_wrong_gradient", world=2, arguments={"root": str(tmp_path)}
    )
    assert ranks.wait() == [3, 3], ranks.outputs()
    for rank in (0, 1):
        assert "norm of the gradient is not the same on all ranks" in ranks.output(rank)


@pytest.mark.slow
def test_a_fault_on_one_rank_of_two_rolls_both_back(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    for name, wrong in (("sound", -1), ("faulty", 1)):
        root = tmp_path / name
        runs.write_clips(root / "clips", 7)
        runs.write_pairs(root / "pairs", 5)
        arguments = {"root": str(root), "strategy": "zero3", "world": 2, "wrong": wrong}
        fork_server.run("faulty_runs:rank", world=2, arguments=arguments)
    assert final(tmp_path / "faulty") == final(tmp_path / "sound")
    kinds = [e.kind for e in events.read(tmp_path / "faulty/run") if e.kind != "straggler"]
    assert kinds == ["recompute"]
    assert audited(tmp_path / "faulty/run")
