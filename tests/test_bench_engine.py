"""The benchmarks of the engine: what they count and compare, never durations."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from echolab.bench import commands, engine
from echolab.bench import step as bench_step
from echolab.bench.engine import (
    SMALLEST,
    AlternatingTimer,
    Bare,
    Subject,
    batches_of,
    build_net,
    build_training,
)
from echolab.bench.measure import Cost
from echolab.bench.models import draw_inputs
from echolab.training.checkpoints.checkpoint import open_checkpoint
from echolab.training.fit import fit


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    """Return the smallest network, with its clips."""
    smallest = Subject(SMALLEST, tmp_path, "cpu", "fp32", "none", "auto", 0)
    engine.write_clips(smallest, draw_inputs(SMALLEST, (5, 32, 32), 0, "cpu"))
    return smallest


def test_bare_loop_and_engine_train_the_same_weights(subject: Subject) -> None:
    """Weights and average are equal; otherwise the durations would not be comparable."""
    net, steps = build_net(subject), 6
    bare = Bare(subject, net)
    start = [parameter.detach().clone() for parameter in net.parameters()]
    training = build_training(subject, net, "run", steps)
    for item in batches_of(training):
        bare.step(item)
        bare.average()
    result = fit(training)
    assert result.done and result.checkpoint
    average = open_checkpoint(result.checkpoint).tensors("ema")
    for (name, ours), other in zip(net.named_parameters(), bare.net.parameters(), strict=True):
        torch.testing.assert_close(other, ours, rtol=0, atol=1e-9)
        assert average[name].shape == ours.shape
    with bare.ema.applied(bare.masters):
        for name, parameter in bare.net.named_parameters():
            torch.testing.assert_close(parameter, average[name], rtol=0, atol=1e-9)
    moved = [not torch.equal(a, b) for a, b in zip(start, net.parameters(), strict=True)]
    assert any(moved)


def test_engine_and_bare_steps_are_measured_separately(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class BareLoop:
        device = torch.device("cpu")

        def step(self, item: object) -> None:
            now[0] += 10

        def average(self) -> None:
            now[0] += 1

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: 2 * now[0])
    turns = AlternatingTimer(BareLoop(), iter(range(9)))  # type: ignore[arg-type]
    for step in range(1, 6):
        now[0] += step  # seconds of an engine step
        turns(step, 5)
    assert [cost.seconds for cost in turns.engine] == [2, 3, 4, 5]  # the first is start-up
    assert [cost.seconds for cost in turns.plain] == [11] * 5
    assert turns.engine[0].processor_seconds == 4
    counted = engine.medians([Cost(99, 99)] * engine.WARMUP + turns.engine[:3])
    assert counted.seconds == 3 and counted.processor_seconds == 6


def rows_of(argv: list[str], shown: Callable[[], Any]) -> dict[str, dict[str, Any]]:
    commands.main(["step", *argv, "format=json"])
    return {row["name"]: row for row in json.loads(shown().out)}


WORDS = ["engine=true", "frames=5", "height=32", "width=32", "pairs=1", "precision=fp32"]


def test_bench_engine_writes_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_step, "SMALL", SMALLEST)
    rows = rows_of([*WORDS, f"scratch={tmp_path}"], capsys.readouterr)
    timed = ["ema/time", "module/time", "module/short_step", "module/added"]
    for name in timed:
        row = rows[f"engine/{name}"]
        assert row["baseline"] and row["ratio"] == row["value"] / row["baseline_value"]
    assert not [name for name in rows if not name.startswith("engine/")]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
