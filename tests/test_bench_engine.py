"""What the benchmarks of the engine count and compare.  Never how long anything takes."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from echolab.bench import engine, ranks, training_step
from echolab.bench.engine import SMALLEST, Subject, Turns, bare_of, batches_of, net_of
from echolab.bench.models import draw_inputs
from echolab.bench.ranks import Clock, Found, measured, resident_peak, strategy_rows
from echolab.bench.rows import Cost
from echolab.bench.saves import Saver
from echolab.cli import bench
from echolab.training.checkpoints.checkpoint import open_checkpoint
from echolab.training.fit import fit


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    """The smallest network, with its clips."""
    made = Subject(SMALLEST, tmp_path, "cpu", "fp32", "none", "auto", 0)
    engine.write_clips(made, draw_inputs(SMALLEST, (5, 32, 32), 0, "cpu"))
    return made


def test_the_bare_loop_does_what_the_engine_does(subject: Subject) -> None:
    """Else neither would say anything of the other."""
    net, steps = net_of(subject), 6
    bare = bare_of(subject, net)
    start = [parameter.detach().clone() for parameter in net.parameters()]
    training = engine.training_of(subject, net, "run", steps, subject.machine())
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


def test_turns_measure_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Bare:
        device = torch.device("cpu")

        def step(self, item: object) -> None:
            now[0] += 10

        def average(self) -> None:
            now[0] += 1

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: 2 * now[0])
    turns = Turns(Bare(), iter(range(9)))  # type: ignore[arg-type]
    for step in range(1, 6):
        now[0] += step  # what the engine takes
        turns(step, 5)
    assert [cost.seconds for cost in turns.engine] == [2, 3, 4, 5]  # before the first is start-up
    assert [cost.seconds for cost in turns.plain] == [11] * 5
    assert turns.engine[0].processor_seconds == 4
    counted = engine.medians([Cost(99, 99)] * engine.WARM + turns.engine[:3])
    assert counted.seconds == 3 and counted.processor_seconds == 6


def test_a_save_goes_on_beside_the_steps(subject: Subject) -> None:
    net = net_of(subject)
    item = next(batches_of(engine.training_of(subject, net, "run", 1, subject.machine())))
    saver = Saver(subject, net, item)
    saver.save()
    kept = [host.clone() for host in saver.hosts]
    found = saver.save()
    assert found.plain > 0 and found.begin > 0 and found.copy > 0 and found.finish > 0
    weights = sum(parameter.numel() for parameter in net.parameters())
    assert sum(host.numel() for host in kept) == 4 * weights  # masters, two moments, the average
    assert not all(torch.equal(a, b) for a, b in zip(kept, saver.hosts, strict=True))
    saver.writer.close()
    saved = saver.folder / "step-000002"
    assert json.loads((saved / "manifest.json").read_text())["step"] == 2
    averages = [set(load_file(file)) for file in saved.glob("ema-*.safetensors")]
    assert set().union(*averages) == dict(net.named_parameters()).keys()


def test_strategies_take_turns(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"ddp": 2.0, "zero1": 3.0, "zero2": 4.0, "zero3": 8.0}
    order: list[str] = []

    def fake(subject: Subject, strategy: str, ranks: int, steps: int) -> Found:
        order.append(strategy)
        slow = 100.0 if len(order) <= 4 else 1.0  # whatever disturbed the first round
        return Found(slow * seconds[strategy], 2**20 * ranks)

    monkeypatch.setattr(ranks, "measured", fake)
    rows = {row.name: row for row in strategy_rows(subject, 3)}
    assert order == [*seconds, *reversed(seconds), *seconds]
    assert [rows[f"engine/{n}/time"].ratio for n in ("zero1", "zero2", "zero3")] == [1.5, 2.0, 4.0]
    assert rows["engine/zero3/memory"].value == 2 and rows["engine/zero3/memory"].ratio == 1
    assert rows["engine/zero1/time"].baseline == "ddp, 2 ranks"


def test_a_clock_leaves_out_start_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = iter([50.0, 90.0, 99.0, 101.0, 104.0, 105.0, 205.0])
    peaks = iter(range(7))
    monkeypatch.setattr(time, "perf_counter", lambda: next(marks))
    monkeypatch.setattr(ranks, "resident_peak", lambda: float(next(peaks)))
    clock = Clock("cpu")
    for step in range(7):
        clock(step, 7)
    assert clock.found() == Found(2.0, 5.0)  # of 2, 3, 1; 40 and 9 are start-up, 100 the save


def test_the_peak_of_this_process_grows_with_what_it_holds() -> None:
    before = resident_peak()
    held = torch.ones(2**28 + int(before) // 4)  # more than it ever held, by 1 GiB
    assert resident_peak() > before + 2**29 and held[-1] == 1


def rows_of(argv: list[str], shown: Callable[[], Any]) -> dict[str, dict[str, Any]]:
    bench.main(["step", *argv, "format=json"])
    return {row["name"]: row for row in json.loads(shown().out)}


WORDS = ["engine=true", "frames=5", "height=32", "width=32", "pairs=1", "precision=fp32"]


def test_the_rows_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_step, "SMALL", SMALLEST)
    monkeypatch.setattr(training_step, "strategy_rows", lambda subject, pairs: iter([]))
    rows = rows_of([*WORDS, f"scratch={tmp_path}"], capsys.readouterr)
    timed = ["ema/time", "module/time", "module/short_step", "module/added"]
    timed += [f"save/{part}" for part in ("begin", "copy", "stall", "finish", "whole")]
    for name in timed:
        row = rows[f"engine/{name}"]
        assert row["baseline"] and row["ratio"] == row["value"] / row["baseline_value"]
    assert not [name for name in rows if not name.startswith("engine/")]
    size = 16 * sum(p.numel() for p in net_of(_of(tmp_path)).parameters()) / 2**20
    assert rows["engine/save/size"]["value"] == pytest.approx(size)
    assert list(tmp_path.iterdir()) == []


def _of(folder: Path) -> Subject:
    return Subject(SMALLEST, folder, "cpu", "fp32", "none", "auto", 0)


@pytest.mark.slow
def test_a_strategy_is_measured_in_ranks_of_its_own(subject: Subject) -> None:
    found = measured(subject, "zero2", 2, engine.WARM + 3)
    assert found.seconds > 0 and found.peak > 2**27
    assert not (subject.folder / "run-zero2").exists()


def test_a_launch_that_fails_is_told(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "run_ranks", lambda command, count: 3)
    with pytest.raises(ranks.EcholabError, match="zero1 on 2 ranks ended with 3; see above"):
        measured(subject, "zero1", 2, 5)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
