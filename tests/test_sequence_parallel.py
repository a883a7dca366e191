"""A clip over several ranks equals the clip on one: outputs, and gradients averaged over the
ranks.
"""

import json
import sys
from pathlib import Path

import pytest
import rank_sequence
import runs
import tiny
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from echolab.errors import ConfigError
from echolab.launch.processes import run_ranks
from echolab.training.engine.sequence_parallel import SequenceSplit

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_several_ranks_compute_the_result_of_one(tmp_path: Path, world: int) -> None:
    """There are six tokens a frame: four ranks do not divide them, two do; neither divides three
    frames.
    """
    code = run_ranks([sys.executable, str(HERE / "rank_sequence.py"), str(tmp_path)], world)
    assert code == 0
    expected = rank_sequence.result(split=False)
    for rank in range(world):
        result = load_file(tmp_path / f"{rank}.safetensors")
        assert result.keys() == expected.keys()
        for name, tensor in expected.items():
            error = (result[name] - tensor).norm() / tensor.norm()
            assert error < 1e-5, (rank, name)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_run_with_clips_over_two_ranks_equals_the_run_of_one(
    tmp_path: Path, strategy: str
) -> None:
    """The run has validation and preference epochs, and recomputes activations."""
    runs.write_clips(tmp_path / "clips", 7)
    runs.write_pairs(tmp_path / "pairs", 5)
    runs.write_clips(tmp_path / "held", 4, 50)
    plan = 'plan=[["sft", 2], ["dpo", 1]]'
    result = []
    for name, world, words in (
        ("single", 1, []),
        (strategy, 2, ["together=2", "checkpointing=selective"]),
    ):
        command = [sys.executable, str(HERE / "rank_training.py"), str(tmp_path), name, str(world)]
        assert run_ranks([*command, str(tmp_path / name), plan, *words], world) == 0
        rows = json.loads((tmp_path / name / "rows.json").read_text())
        result.append([{k: v for k, v in r.items() if not k.startswith("perf/")} for r in rows])
    for row, expected in zip(*result, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_heads_that_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 8)
    with pytest.raises(ConfigError, match=r"sequence_parallel=8: .* 12 heads; use one of 2, 3"):
        SequenceSplit(tiny.net(num_heads=12, dim=48))


def test_one_rank_computes_the_network_itself(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        net, report = tiny.net(trained=True), tiny.conditions()
        expected = net(tiny.latents(), rank_sequence.TIMESTEPS, report)
        SequenceSplit(net)
        result = net(tiny.latents(), rank_sequence.TIMESTEPS, report)
        torch.testing.assert_close(result, expected)
    finally:
        dist.destroy_process_group()
