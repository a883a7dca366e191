"""Two ranks over gloo: every strategy trains the same run, and loads every other's checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from forked import ForkServer

from echolab.training.checkpoints.checkpoint import PARTS, latest_valid

pytestmark = pytest.mark.slow

PLAN = [["sft", 3], ["ndpo", 2], ["dpo", 2]]
RANKS = {"single": 1, "ddp": 2, "zero1": 2, "zero2": 2, "zero3": 2}


class Run:
    """Starts runs over the datasets in `data`."""

    def __init__(self, server: ForkServer, data: Path) -> None:
        self.server, self.data = server, data

    def __call__(self, strategy: str, out: Path, plan: list[Any] = PLAN, **options: str) -> None:
        """Train one run."""
        words = [f"plan={json.dumps(plan)}", *(f"{k}={v}" for k, v in options.items())]
        world = RANKS[strategy]
        arguments = [str(self.data), strategy, str(world), str(out), *words]
        self.server.run("rank_training:main", world=world, arguments={"words": arguments})


def rows(out: Path) -> list[dict[str, float]]:
    result = json.loads((out / "rows.json").read_text())
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in result]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    result, _ = latest_valid(out / "checkpoints")
    assert result and result.step == 7
    return {f"{part}/{k}": t for part in PARTS for k, t in result.tensors(part).items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Run:
    """Write the datasets, before ranks could do so at once, and train the run of one process."""
    folder = tmp_path_factory.mktemp("ranks")
    runs.write_clips(folder / "clips", 7)
    runs.write_pairs(folder / "pairs", 5)
    runs.write_clips(folder / "held", 4, 50)
    run = Run(fork_server, folder)
    run("single", folder / "single")
    return run


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("ddp", {}),
        ("zero1", {}),
        ("zero2", {"micro": "1"}),
        ("zero3", {}),
        ("zero3", {"small": "no", "micro": "1"}),
    ],
)
def test_every_strategy_trains_the_same_run(
    run: Run, tmp_path: Path, strategy: str, options: dict[str, str]
) -> None:
    run(strategy, tmp_path, **options)
    for row, expected in zip(rows(tmp_path), rows(run.data / "single"), strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)
    expected_tensors = tensors(run.data / "single")
    for name, tensor in tensors(tmp_path).items():
        torch.testing.assert_close(tensor, expected_tensors[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("first", "second"),
    [("single", "zero3"), ("zero3", "zero2"), ("zero2", "ddp"), ("zero1", "single")],
)
def test_every_strategy_loads_every_other_strategys_checkpoint(
    run: Run, tmp_path: Path, first: str, second: str
) -> None:
    plan = [["sft", 2], ["dpo", 1]]
    run(first, tmp_path / "run", plan[:1])
    saved = runs.tensors_of(tmp_path / "run/checkpoints/step-000002")
    run(second, tmp_path / "run", plan, again=str(tmp_path / "again"))
    assert runs.tensors_of(tmp_path / "again/step-000002") == saved
    run("single", tmp_path / "unbroken", plan)
    for row, expected in zip(rows(tmp_path / "run"), rows(tmp_path / "unbroken")[-2:], strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_bf16_weights_have_fp32_masters(run: Run, tmp_path: Path) -> None:
    for strategy in ("zero2", "zero3"):
        out = tmp_path / strategy
        run(strategy, out, precision="bf16-mixed")
        assert rows(out)[-1]["val/loss"] == pytest.approx(
            rows(run.data / "single")[-1]["val/loss"], 0.05
        )
        rounded = [t for t in tensors(out).values() if torch.equal(t, t.bfloat16().float())]
        assert len(rounded) < 0.2 * len(tensors(out))
