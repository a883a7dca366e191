"""The benchmarks: operations, bytes and rows that they count, never durations."""

import json
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from echolab.bench import commands
from echolab.bench import measure as bench_measure
from echolab.bench import step as bench_step
from echolab.bench.measure import (
    Row,
    Shapes,
    as_json,
    as_table,
    forward_flops,
    measure,
    peak_of,
    step_flops,
)
from echolab.bench.models import (
    diffusers_net,
    draw_inputs,
    ours_net,
    relative,
    run_diffusers,
    run_ours,
    shapes_of,
    with_audio,
)
from echolab.errors import ConfigError

SIZES = {
    "dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "in_channels": 36,
    "out_channels": 16, "text_dim": 10, "image_dim": 12, "audio_dim": None, "freq_dim": 16,
}  # fmt: skip
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
TINY = ["frames=5", "height=32", "width=48", "pairs=1"]


def counted(net: torch.nn.Module, *given: object) -> int:
    """Count operations with torch, and with this one kernel that it leaves out."""

    def attention(q, k, v, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
        return sdpa_flop_count(q, k, v)

    with FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: attention}) as counter:
        net(*given)
    return counter.get_total_flops()


def test_flops_formula_equals_the_count_of_torch() -> None:
    inputs = draw_inputs(SIZES, (9, 32, 48), 0, "cpu")
    given = (inputs.latents, inputs.timesteps, inputs.conditions)
    shapes = shapes_of(inputs)
    assert shapes == Shapes(tokens=3 * 2 * 3, text=512, image=257, audio=0)
    assert forward_flops(SIZES, shapes) == counted(ours_net(SIZES, 0, "cpu"), *given)
    text = {**SIZES, "image_dim": None, "in_channels": 16}
    alone = shapes._replace(image=0)
    assert forward_flops(text, alone) == counted(ours_net(text, 0, "cpu"), *given)
    audio = with_audio(SIZES)
    # 17 audio tokens per frame, each attended by six tokens, as torch counts audio attention.
    shapes_with_audio = shapes._replace(audio=18)
    assert forward_flops(audio, shapes_with_audio) == counted(ours_net(audio, 0, "cpu"), *given)
    assert step_flops(SIZES, shapes) == 3 * forward_flops(SIZES, shapes)


def test_operations_of_the_released_size() -> None:
    """The operations of Wan 1.3B at 480x832x81 equal a count by hand.

    Per layer 12 S D^2 + 4 S D ffn + 4 S^2 D, and those of the text.
    """
    released = {**SIZES, "dim": 1536, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096}
    tokens = 21 * 30 * 52
    assert tokens == 32_760
    flops = forward_flops(released, Shapes(tokens, 512, 0, 0))
    by_hand = 30 * (0.9275e12 + 1.8035e12 + 6.5940e12 + 0.0048e12 + 0.1031e12)
    assert flops == pytest.approx(by_hand, rel=1e-3)


def test_peak_memory_is_the_most_held_at_once() -> None:
    kept = []

    def run() -> None:
        one = torch.ones(1 << 18)  # 1 MiB
        other = torch.ones(1 << 19)
        del one
        kept.append(torch.ones(1 << 17))
        del other
        kept.append(torch.ones(1 << 18))

    assert peak_of(run, "cpu") == 3 << 20
    kept.clear()
    assert peak_of(lambda: torch.ones(1 << 18), "cpu") == 1 << 20


def test_compared_runs_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = [0.0, 3.0, 10.0, 14.0, 20.0, 28.0, 30.0, 31.0, 40.0, 42.0, 50.0, 60.0]
    clock, processor, order = iter(wall), iter(range(12)), []
    monkeypatch.setattr(bench_measure, "peak_of", lambda run, device: 2**20)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(time, "process_time", lambda: next(processor))
    pair = measure(lambda: order.append("a"), lambda: order.append("b"), 3, "cpu")
    assert "".join(order) == "ab" + "abbaab"
    assert (pair.ours.seconds, pair.baseline.seconds) == (2.0, 8.0)  # of 3, 1, 2 and 4, 8, 10
    ratios = {row.name: row.ratio for row in pair.rows("fp32", "diffusers", "cpu")}
    assert ratios == {"fp32/time": 0.25, "fp32/processor_time": 1.0, "fp32/peak_memory": 1.0}
    assert len(pair.rows("fp32", "diffusers", "cuda")) == 2


def test_both_compared_networks_have_the_same_weights() -> None:
    inputs = draw_inputs(SIZES, (5, 32, 48), 3, "cpu")
    ours = ours_net(SIZES, 3, "cpu")
    theirs = diffusers_net(ours, SIZES)
    assert relative(run_ours(ours, inputs), run_diffusers(theirs, inputs)) < 1e-5


def test_rows_are_written_as_json_and_as_a_table() -> None:
    rows = [Row("a", 1.0, "s", "b", 4.0), Row("c", 2.0, "s")]
    first, second = json.loads(as_json(rows))
    assert first == {
        "name": "a", "value": 1.0, "unit": "s", "baseline": "b", "baseline_value": 4.0,
        "ratio": 0.25,
    }  # fmt: skip
    assert second["ratio"] is second["baseline"] is None
    assert as_table(rows).splitlines()[1].split() == ["a", "1", "s", "b", "4", "0.25"]


def test_bench_step_writes_its_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_step, "SMALL", SIZES)
    monkeypatch.setattr(bench_step, "compiler_missing", lambda device: "no compiler")
    commands.main(["step", *TINY, "format=json", "precision=fp32"])
    shown = capsys.readouterr()
    rows = {row["name"]: row for row in json.loads(shown.out)}
    assert rows["fp32/output_difference"]["value"] < 1e-5
    names = ["time", "peak_memory", "tokens", "arithmetic", "checkpointing=full/time"]
    names += ["checkpointing=selective/time", "attention=sdpa/time", "audio/time"]
    assert {f"fp32/{name}" for name in names} <= rows.keys()
    for row in rows.values():
        assert row.keys() == {"name", "value", "unit", "baseline", "baseline_value", "ratio"}
        if row["ratio"] is not None:
            assert row["ratio"] == pytest.approx(row["value"] / row["baseline_value"])
    assert "forward FLOPs of a clip =" in shown.err
    assert "fp32/compile: skipped, no compiler" in shown.err
    assert "attention=flash3: skipped" in shown.err


def test_bench_generate_writes_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["frames=17", "height=32", "width=32", "num_steps=1,2", "windows=9,17", "format=json"]
    commands.main(["generate", *words, "solvers=euler,unipc"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    names = [
        f"{solver}/steps={steps}/window={window}/time"
        for solver in ("euler", "unipc")
        for steps in (1, 2)
        for window in (9, 17)
    ]
    assert set(rows) == {*names, "window=9/peak_memory", "window=17/peak_memory"}
    for name in names:
        assert rows[name]["baseline_value"] == 17 / 25 and rows[name]["value"] > 0


def test_bench_metrics_compares_equal_vectors(capsys: pytest.CaptureFixture[str]) -> None:
    commands.main(["metrics", "frames=21", "pairs=1", "format=json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["sync/output_difference"]["value"] < 1e-5
    clips, seconds = rows["sync/clips"], rows["sync/time"]
    assert clips["value"] == pytest.approx(1 / seconds["value"])
    assert clips["ratio"] == pytest.approx(1 / seconds["ratio"])
    assert rows["sync/peak_memory"]["value"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["step", "frames=6"], "frames=6: must be 4n"),
        (["step", "height=50"], "height=50: must be a multiple of 16"),
        (["step", "pairs=0"], "pairs=0 is not a whole number, at least 1"),
        (
            ["step", "precision=fp8"],
            "precision=fp8 is not a list .* one of fp32, bf16",
        ),
        (["step", "model=none_such"], "model=none_such: unknown; one of"),
        (
            ["generate", "solvers=heun"],
            "solvers=heun is not a list .* one of euler",
        ),
        (["generate", "windows=24"], "window=24: must be 4n"),
        (["generate", "model=none_such"], "model=none_such: unknown; one of"),
        (["sprint"], "echolab bench sprint: no such action"),
    ],
)
def test_bad_arguments_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        commands.main(words)


def test_help_imports_no_torch() -> None:
    """Help does not import torch, which takes seconds."""
    script = "import sys; from echolab.bench import commands; commands.main(['--help']); "
    script += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "step" in done.stdout, done.stderr
