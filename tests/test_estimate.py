"""The memory estimate: state to the byte, laws over ranks and stages, and the command."""

import json
import sys
from pathlib import Path
from typing import Any

import lora_settings
import pytest
import runs
import tiny
from runs import PHASES, Supervised
from test_activation_memory import peak
from torch.profiler import ProfilerActivity, profile

from echolab.cli.__main__ import main
from echolab.encoders.loading import parameters_of as encoder_parameters
from echolab.errors import ConfigError
from echolab.launch.processes import run_ranks
from echolab.training.config import Intervals
from echolab.training.engine.activation_memory import Clip, simulate
from echolab.training.engine.estimate import (
    BUCKET,
    GIB,
    STAGES,
    Needed,
    Parameter,
    bytes_needed,
    check_memory,
    parameters_of,
    state_bytes,
)
from echolab.training.engine.machine import Machine

HERE = Path(__file__).parent
RANKS = {"single": 1, "ddp": 2, "zero1": 2, "zero2": 2, "zero3": 2}
STAGE = {"single": 0, "ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}
NET = parameters_of(tiny.net())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "precision", "lora"),
    [
        ("single", "bf16-mixed", "lora"),
        ("ddp", "32-true", "no"),
        ("zero2", "bf16-mixed", "lora"),
        ("zero3", "32-true", "lora"),
    ],
)
def test_the_estimate_of_a_rank_is_exact_to_the_byte(
    tmp_path: Path, strategy: str, precision: str, lora: str
) -> None:
    runs.write_clips(tmp_path / "clips", 7)
    runs.write_pairs(tmp_path / "pairs", 5)
    ranks = RANKS[strategy]
    words = [str(tmp_path), strategy, str(ranks), precision, lora]
    assert run_ranks([sys.executable, str(HERE / "rank_memory.py"), *words], ranks) == 0
    result = json.loads((tmp_path / f"{strategy}-{precision}-{lora}.json").read_text())
    net = lora_settings.settings("base")["net"] if lora == "lora" else tiny.net()
    state = state_bytes(parameters_of(net), stage=STAGE[strategy], world=ranks, precision=precision)
    for kind in ("weights", "optimizer", "ema"):
        assert result[kind] == getattr(state, kind), kind
    if strategy not in ("zero1", "zero2"):  # whose gradients are gone after the step
        assert result["gradients"] == state.gradients


def test_the_total_is_the_peak_of_a_real_run(tmp_path: Path) -> None:
    sizes = {"dim": 96, "ffn_dim": 384, "num_layers": 4}
    clips = runs.write_clips(tmp_path / "clips", 16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        net = tiny.net(**sizes)
        runs.train(
            tmp_path, runs.schedule(("sft", 3)), net=net, clips=[clips], batch_size=16,
            intervals=Intervals(0, 0, 0), reference=None, objectives={"sft": Supervised(PHASES)},
        )  # fmt: skip
    architecture = {
        **sizes, "num_heads": 2, "freq_dim": 16, "in_channels": 2 * tiny.CHANNELS + 4,
        "out_channels": tiny.CHANNELS, "text_dim": 10, "image_dim": 12, "audio_dim": 6,
    }  # fmt: skip
    clip = Clip(16, tiny.LATENT_FRAMES, tiny.HEIGHT, tiny.WIDTH, 5, 3)
    step = simulate(architecture, clip)
    state = state_bytes(parameters_of(net), stage=0, world=1, precision="32-true")
    activations = max(step.forward, step.together - state.gradients)
    assert activations > 0.3 * sum(state)  # else this would say nothing of them
    assert sum(state) + activations == pytest.approx(peak(profiled), rel=0.1)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_more_ranks_never_hold_more_and_together_hold_all(stage: int, precision: str) -> None:
    states = [
        state_bytes(NET, stage=stage, world=world, precision=precision) for world in range(1, 70)
    ]
    count, groups = sum(p.numel for p in NET), 2
    for before, after in zip(states, states[1:], strict=False):
        for kind in ("optimizer", "ema", "gradients"):
            # The padding of one more rank may cost a few numbers.
            assert getattr(after, kind) <= getattr(before, kind) + 16 * 4 * len(NET), kind
    assert states[-1].optimizer < states[0].optimizer / 40 or stage == 0
    for world, state in enumerate(states, 1):
        if stage:
            padding = world * state.ema // 4 - count
            assert 0 <= padding < (2 * world * groups if stage < 3 else world * len(NET))
            assert world * (state.optimizer - 4 * groups) == 3 * world * state.ema
        else:
            assert state == states[0] and state.weights == 4 * count


def test_the_worked_examples_hold() -> None:
    net = [Parameter(10, 2, True), Parameter(3, 1, True), Parameter(7, 2, False)]

    def of(stage: int, world: int, precision: str) -> tuple[int, ...]:
        return tuple(state_bytes(net, stage=stage, world=world, precision=precision))[:4]

    # 20 numbers, 13 trained in two tensors; two groups, of 10 and 3.
    assert of(0, 1, "bf16-mixed") == (80, 52, 104 + 8, 52)
    # Groups filled up to 12 and 4: 16 and 7 frozen of 2 bytes; 8 numbers of each of 3 kinds.
    assert of(2, 2, "bf16-mixed") == (46, 16, 96 + 8, 32)
    assert of(1, 2, "bf16-mixed") == (46, 26, 96 + 8, 32)
    # Pieces of 5, 2 and 4; small tensors are kept complete in addition.
    assert of(3, 2, "bf16-mixed") == (22 + 40, 14, 84 + 8, 28)
    buffers = [state_bytes(net, stage=s, world=2, precision="bf16-mixed").buffers for s in STAGES]
    assert buffers == [0, 4 * BUCKET, 4 * BUCKET, 2 * BUCKET]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"stage": 4}, "stage=4"), ({"world": 0}, "world=0"), ({"precision": "16"}, "precision=16")],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        state_bytes(NET, **{"stage": 0, "world": 1, "precision": "32-true", **wrong})


def estimated(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["estimate", *words, "format=json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result["bytes"]["total"] == sum(v for k, v in result["bytes"].items() if k != "total")
    return result


SMALL = ("height=32", "width=32", "frames=5")


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    [
        ("wan_t2v_1b3", 825, 1_418_996_800),
        ("wan_fun_inp_1b3", 983, 1_564_428_608),
        ("echomimicv3_preview", 1076, 1_707_215_168),
        ("echomimicv3_flash", 1203, 1_863_772_992),
    ],
)
def test_the_released_models_have_their_published_sizes(
    capsys: pytest.CaptureFixture[str], model: str, tensors: int, parameters: int
) -> None:
    result = estimated(capsys, f"model={model}", *SMALL)
    assert (result["tensors"], result["parameters"]) == (tensors, parameters)
    dead = 70_824_960 if model == "echomimicv3_flash" else 0
    assert result["bytes"]["weights"] == 4 * (parameters - dead)


def test_the_encoders_have_the_sizes_of_the_release() -> None:
    # The .pth of umT5-XXL's encoder is 11.36 GB in bf16.
    assert encoder_parameters("text") == 5_680_910_336
    assert encoder_parameters("audio") == 94_371_712  # wav2vec2-base without its head


def test_the_demo_network_is_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    plain = estimated(capsys, "model=demo")
    kept = estimated(capsys, "model=demo", "activation_checkpointing=full")
    pairs = estimated(capsys, "model=demo", "objective=dpo")
    lora = estimated(capsys, "model=demo", "lora=attention", "lora_rank=4", "objective=dpo")
    assert kept["bytes"]["activations"] < 0.7 * plain["bytes"]["activations"]
    assert pairs["bytes"]["reference"] == plain["bytes"]["weights"] == 4 * 6_029_744
    two = estimated(capsys, "model=demo", "micro_batch=2")
    assert pairs["bytes"]["activations"] == two["bytes"]["activations"]
    layers = 4 * (4 + 8)  # of 256 x 256, in each of four blocks
    assert lora["trained_parameters"] == layers * 4 * 2 * 256
    assert lora["bytes"]["reference"] == 0
    assert lora["bytes"]["ema"] == lora["bytes"]["gradients"] == 4 * lora["trained_parameters"]
    assert main(["estimate", "demo", "gpu_gib=0.5", "zero_stage=2", "world_size=8"]) == 0
    text = capsys.readouterr().out
    assert "6,029,744 parameters" in text and "largest micro-batch" in text
    for words, message in (
        (["model=nobody"], "model=nobody: unknown"),
        (["model=demo", "height=50"], "height=50: must be a multiple of 16"),
        (["model=demo", "frames=8"], "frames=8: must be 4n+1"),
        (["model=demo", "micro_batch=0"], "micro_batch=0"),
        (["model=demo", "zero_stage=5"], "zero_stage=5 is not one of 0, 1, 2, 3"),
        (["model=demo", "stage=2"], "did you mean zero_stage=...?"),
        (["model=demo", "memory=80"], "did you mean gpu_gib=...?"),
    ):
        assert main(["estimate", *words]) == 1
        assert message in capsys.readouterr().err


def test_settings_that_are_said_to_fit_do_fit(capsys: pytest.CaptureFixture[str]) -> None:
    limit = 0.16
    rows = estimated(capsys, "model=demo", f"gpu_gib={limit}", *SMALL)["fits"]
    row = next(r for r in rows if r["zero_stage"] == 0 and r["world_size"] == 1)
    assert 4 < row["micro_batch"] < 32
    for clips, fits in ((row["micro_batch"], True), (round(1.2 * row["micro_batch"]) + 1, False)):
        words = (f"micro_batch={clips}", "zero_stage=0", *SMALL)
        total = estimated(capsys, "model=demo", *words)["bytes"]["total"]
        assert (total <= limit * 2**30) is fits
    micro = [r["micro_batch"] for r in rows if r["zero_stage"] == 3]
    assert micro == sorted(micro)  # more ranks, more room


BILLION = [Parameter(10**9, 2, True)]


def test_a_node_holds_the_state_of_all_its_ranks_and_a_gpu_that_of_one() -> None:
    """AdamW in fp32 takes 20 bytes a parameter with the average; saves copy 16 of them for all
    ranks.
    """
    cpu = bytes_needed(BILLION, Machine("ddp", devices=4))
    assert cpu.gpu == 0 and cpu.host == pytest.approx(4 * 20e9 + 16e9, rel=1e-6)
    gpu = bytes_needed(BILLION, Machine("ddp", devices=4, accelerator="gpu"))
    assert gpu == pytest.approx((20e9, 16e9), rel=1e-6)
    two = bytes_needed(BILLION, Machine("ddp", devices=4, num_nodes=2, accelerator="gpu"))
    assert two == pytest.approx((20e9, 8e9), rel=1e-6)
    more = bytes_needed(BILLION, Machine("ddp", devices=4), averages=3, reference=True)
    assert more.host == pytest.approx(4 * (20e9 + 8e9 + 4e9) + 24e9, rel=1e-6)


def test_offload_moves_the_optimizer_to_the_node() -> None:
    zero = Machine("zero2", devices=4, accelerator="gpu", precision="bf16-mixed")
    on_gpu, offloaded = (
        bytes_needed(BILLION, machine) for machine in (zero, zero._replace(offload="optimizer"))
    )
    assert offloaded.host - on_gpu.host == pytest.approx(12e9, rel=1e-6)  # 3e9 of each rank
    assert on_gpu.gpu - offloaded.gpu > 0
    # Even so, the fp32 weights that the masters start from exist next to the rounded ones.
    assert offloaded.gpu >= 4e9 + 2e9 + 1e9


@pytest.mark.parametrize(
    ("needed", "message"),
    [
        (Needed(20 * GIB, 0), "need 20.0 GiB, a GPU has 20.0 GiB, .* use trainer.strategy=zero2"),
        (Needed(0, 99 * GIB), "need 99.0 GiB, this node has 100.0 GiB, .* fewer trainer.devices"),
    ],
)
def test_a_run_that_can_never_fit_is_refused(needed: Needed, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_memory(needed, gpu=20 * GIB, host=100 * GIB)


def test_a_run_that_may_fit_passes_and_so_does_unknown_memory() -> None:
    check_memory(Needed(19 * GIB, 95 * GIB), gpu=20 * GIB, host=100 * GIB)
    check_memory(Needed(99 * GIB, 999 * GIB), gpu=None, host=None)
