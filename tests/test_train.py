"""Training: it learns, and a run stopped anywhere resumes as if it had not been stopped."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch

from echolab.errors import ConfigError, EcholabError
from echolab.training.config import Intervals
from echolab.training.datamodule import ValData

PLAN = (("sft", 2), ("ndpo", 2), ("sft", 1), ("dpo", 3))
EVERY = Intervals(log_every=1, save_every=1)
HERE = Path(__file__).parent


def losses(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[Any]]:
    """Train a run without interruption; return its last tensors, and every loss."""
    result, rows = runs.train(
        tmp_path_factory.mktemp("unbroken"), runs.schedule(*PLAN), intervals=EVERY
    )
    assert result.done and result.checkpoint
    return runs.tensors_of(result.checkpoint), losses(rows)


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 7])
def test_a_resumed_run_equals_an_unbroken_run(
    tmp_path: Path, unbroken: tuple[dict[str, bytes], list[Any]], stop: int
) -> None:
    def interrupt(step: int, steps: int) -> None:
        if step == stop - 1 or stop == step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    plan = runs.schedule(*PLAN)
    first, early = runs.train(tmp_path, plan, intervals=EVERY, on_step=interrupt)
    assert first.stopped_by == signal.SIGUSR1 and not first.done
    second, late = runs.train(tmp_path, plan, intervals=EVERY)
    assert second.done and second.checkpoint
    assert losses(early + late) == unbroken[1]
    assert runs.tensors_of(second.checkpoint) == unbroken[0]


def test_a_killed_run_resumes_from_its_last_checkpoint(
    tmp_path: Path, unbroken: tuple[dict[str, bytes], list[Any]]
) -> None:
    program = (
        "import os, sys, signal; sys.path.insert(0, sys.argv[2]); import runs\n"
        "from pathlib import Path; from echolab.training.config import Intervals\n"
        "kill = lambda step, steps: step == 5 and os.kill(os.getpid(), signal.SIGKILL)\n"
        f"runs.train(Path(sys.argv[1]), runs.schedule(*{PLAN}), on_step=kill, "
        "intervals=Intervals(save_every=2))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(HERE)]
    assert subprocess.run(command, timeout=900).returncode == -signal.SIGKILL
    result, rows = runs.train(tmp_path, runs.schedule(*PLAN), intervals=EVERY)
    assert losses(rows) == unbroken[1][5:]
    assert result.checkpoint and runs.tensors_of(result.checkpoint) == unbroken[0]


def test_accumulation_and_workers_change_results_by_rounding_only(
    tmp_path: Path, unbroken: tuple[dict[str, bytes], list[Any]]
) -> None:
    _, rows = runs.train(
        tmp_path, runs.schedule(*PLAN), intervals=EVERY, micro_batch_size=2, num_workers=1
    )
    for (_, loss), (_, expected) in zip(losses(rows), unbroken[1], strict=True):
        assert loss == pytest.approx(expected, rel=1e-3)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    clips = runs.write_clips(tmp_path / "clips", 1)
    _, rows = runs.train(
        tmp_path,
        runs.schedule(("sft", 60), lr=1e-2),
        clips=[clips],
        intervals=Intervals(log_every=10),
    )
    assert rows[-1]["train/loss"] < 0.8 * rows[0]["train/loss"]


def test_every_logged_row_has_its_metrics(tmp_path: Path) -> None:
    held = ValData(runs.write_clips(tmp_path / "held", 4, 50), 4, 2)
    _, rows = runs.train(
        tmp_path,
        runs.schedule(("sft", 4), ("dpo", 2)),
        intervals=Intervals(log_every=2, save_every=0, val_every=3),
        val_data=held,
        phases=runs.PHASES,
    )
    steps = [row["step"] for row in rows]
    assert steps == [2, 3, 4, 6, 6]
    assert {"train/loss", "train/lr", "train/gradient_norm", "perf/steps_per_second"} <= set(
        rows[0]
    )
    assert sum(v for k, v in rows[0].items() if "probability" in k) == pytest.approx(1)
    assert {"val/loss", "val/error/i2v", "val/error/sigma_0.5"} <= set(rows[1])
    assert {"val/effect/audio", "val/effect_output/text"} <= set(rows[1])
    assert {"train/margin", "train/accuracy", "train/gradient_factor", "train/beta"} <= set(rows[3])


def test_validation_changes_no_training_result(
    tmp_path: Path, unbroken: tuple[dict[str, bytes], list[Any]]
) -> None:
    held = ValData(runs.write_clips(tmp_path / "held", 4, 50), 4, 2)
    result, _ = runs.train(
        tmp_path,
        runs.schedule(*PLAN),
        intervals=Intervals(1, 0, 1),
        val_data=held,
        phases=runs.PHASES,
    )
    assert result.checkpoint and runs.tensors_of(result.checkpoint) == unbroken[0]


def test_the_reference_is_the_average_at_the_epochs_first_step(tmp_path: Path) -> None:
    from echolab.models.frozen import Frozen
    from echolab.training.checkpoints.checkpoint import open_checkpoint

    frozen = Frozen(tiny.net())
    plan = runs.schedule(("sft", 2), ("dpo", 2))
    objectives: dict[str, Any] = {
        "sft": runs.Supervised(runs.PHASES),
        "dpo": runs.Preference(runs.PHASES, frozen, 100.0),
    }
    _, rows = runs.train(
        tmp_path, plan, intervals=EVERY, reference=frozen, objectives=objectives,
        optim=runs.Optim(ema_decay=0.0),
    )  # fmt: skip
    average = open_checkpoint(tmp_path / "run/checkpoints/step-000002").tensors("ema")
    assert all(torch.equal(average[k], v) for k, v in frozen.net.state_dict().items())
    # With a decay of 0 the average is the policy, which starts the epoch as its own reference.
    assert rows[2]["train/margin"] == pytest.approx(0, abs=1e-6)


def test_a_run_may_start_from_another_runs_checkpoint(tmp_path: Path) -> None:
    first, _ = runs.train(tmp_path / "a", runs.schedule(("sft", 2)))
    net = tiny.net()
    runs.train(
        tmp_path / "b", runs.schedule(("sft", 1), lr=0.0), net=net, init_from=first.checkpoint
    )
    assert first.checkpoint
    from echolab.training.checkpoints.checkpoint import open_checkpoint

    average = open_checkpoint(first.checkpoint).tensors("ema")
    assert all(torch.equal(average[k], v) for k, v in net.state_dict().items())


def test_a_run_restores_the_state_of_the_process(tmp_path: Path) -> None:
    def state() -> list[Any]:
        kept = [signal.getsignal(number) for number in (2, 10, 12, 15)]
        return [kept, threading.active_count(), torch.is_grad_enabled(), torch.get_num_threads()]

    before = state()
    for name in ("a", "b"):
        runs.train(tmp_path / name, runs.schedule(("sft", 1)))
        assert state() == before


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(EcholabError, match="not finite"):
        runs.train(tmp_path, runs.schedule(("sft", 40), lr=1e30))


def test_a_missing_objective_or_strategy_is_named(tmp_path: Path) -> None:
    from echolab.training.fit import Machine

    with pytest.raises(ConfigError, match="no objective for dpo"):
        runs.train(tmp_path, runs.schedule(("dpo", 1)), objectives={})
    with pytest.raises(ConfigError, match="trainer.strategy=zero4"):
        runs.train(tmp_path, runs.schedule(("sft", 1)), machine=Machine("zero4"))
