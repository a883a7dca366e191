"""Combinations of settings: every allowed one trains as one plain process does."""

import random
from itertools import combinations, product
from pathlib import Path
from typing import Any

import combined_runs
import lora_settings
import pytest
import runs
import torch
from forked import ForkServer
from safetensors.torch import load_file
from torch import Tensor

from echolab.errors import ConfigError
from echolab.training.engine import strategies
from echolab.training.engine.machine import Machine
from echolab.training.engine.strategies import refusal, strategy_of

AXES: dict[str, list[Any]] = {
    "strategy": ["single", "ddp", "zero1", "zero2", "zero3"],
    "precision": ["32-true", "bf16-mixed"],
    "activation_checkpointing": ["none", "selective", "full"],
    "compile": [False, True],
    "sequence_parallel": [1, 2],
    "offload": ["none", "optimizer"],
    "accumulation": [1, 3],
    "zero3_shard_small": [False, True],
    "adapters": ["none", "all"],
    "epochs": ["sft", "dpo-average", "dpo-base"],  # what the preference epochs compare with
}
Case = dict[str, Any]


def machine_of(case: Case) -> Machine:
    kept = {key: value for key, value in case.items() if key in Machine._fields}
    return Machine(**kept, devices=1 if case["strategy"] == "single" else 2)


def everything() -> list[Case]:
    """Return every combination of settings that can be requested."""
    return [dict(zip(AXES, values, strict=True)) for values in product(*AXES.values())]


def baseless(case: Case) -> bool:
    """Return whether the reference would be the base of a network without adapters."""
    return case["epochs"] == "dpo-base" and case["adapters"] == "none"


def pointless(case: Case) -> bool:
    """Return whether a ZeRO 3 setting is given to another strategy, which ignores it."""
    return case["zero3_shard_small"] and case["strategy"] != "zero3"


def plain(case: Case) -> Case:
    """Return the same training by one plain process."""
    kept = ("adapters", "epochs")
    return {key: case[key] if key in kept else values[0] for key, values in AXES.items()}


def pairs_of(case: Case) -> set[tuple[Any, ...]]:
    return set(combinations(case.items(), 2))


def covering(cases: list[Case]) -> list[Case]:
    """Choose few cases that contain every pair of settings that occurs in any case."""
    chooser = random.Random(0)
    left = set().union(*map(pairs_of, cases))
    chosen = []
    while left:
        best = max(chooser.sample(cases, len(cases)), key=lambda case: len(pairs_of(case) & left))
        chosen.append(best)
        left -= pairs_of(best)
    return chosen


ALLOWED = [
    case
    for case in everything()
    if refusal(machine_of(case)) is None and not baseless(case) and not pointless(case)
]
# Hooks of ZeRO 3 gather weights within a block that is run again, when and where depends on the
# adapters and the reference: three settings at once, in addition to every pair.
GATHERING = {
    "strategy": "zero3", "activation_checkpointing": "selective", "adapters": "all",
    "epochs": "dpo-average", "sequence_parallel": 1, "offload": "none", "accumulation": 1,
}  # fmt: skip
COVERING = covering(ALLOWED)
COVERING += [c for c in ALLOWED if c | GATHERING == c and c["precision"] == "32-true"]


def test_the_table_refuses_exactly_the_impossible_combinations() -> None:
    """Of 480 machines: one rank cannot share a clip, and only ZeRO has master weights to
    offload.
    """
    for case in everything():
        why = refusal(machine_of(case))
        alone = case["strategy"] == "single" and case["sequence_parallel"] == 2
        absent_path = case["offload"] == "optimizer" and not case["strategy"].startswith("zero")
        wrong = case["strategy"] == "zero3" and case["compile"]
        assert (why is not None) == (alone or absent_path or wrong), (case, why)
    assert len(ALLOWED) == (24 + 48 + 96 + 96 + 2 * 48) * 5
    covered = set().union(*map(pairs_of, COVERING))
    assert covered == set().union(*map(pairs_of, ALLOWED))


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (Machine("zero4"), "trainer.strategy=zero4: unknown; one of single, ddp"),
        (Machine(devices=2), "trainer.strategy=single: not for 2 ranks; use ddp"),
        (Machine("ddp", devices=0), "trainer.strategy=ddp: not for 0 ranks"),
        (
            Machine("ddp", activation_checkpointing="some"),
            "trainer.activation_checkpointing=some: unknown; one of none",
        ),
        (Machine("zero1", offload="all"), "trainer.offload=all: unknown; one of none, optimizer"),
        (Machine("ddp", offload="optimizer"), "trainer.offload=optimizer: ddp keeps its weights"),
        (Machine("zero3", compile=True), "gradients come out wrong; use strategy zero2"),
        (Machine("ddp", devices=3, sequence_parallel=2), "must divide the number of ranks, 3"),
        (Machine("ddp", sequence_parallel=0), "must divide the number of ranks, 1"),
    ],
)
def test_a_refusal_names_key_value_and_remedy(machine: Machine, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        strategy_of(machine)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing compiler is reported before training."""
    monkeypatch.setattr(strategies, "compiler_missing", lambda device: f"none for {device}; do so")
    assert refusal(Machine(compile=True)) == "trainer.compile=true: none for cpu; do so"
    assert refusal(Machine()) is None


def test_a_gradient_limit_of_zero_is_refused(tmp_path: Path) -> None:
    for clip in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="optim.max_grad_norm=.*: must be over 0"):
            runs.train(tmp_path, runs.schedule(("sft", 1)), optim=runs.Optim(max_grad_norm=clip))


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_recomputation_repeats_the_same_dropout(tmp_path: Path, checkpointing: str) -> None:
    lora = lora_settings.LORA._replace(dropout=0.3)
    measured = []
    for kept in ("none", checkpointing):
        result, _ = runs.train(
            tmp_path / kept,
            runs.schedule(("sft", 2), ("dpo", 1)),
            machine=Machine(activation_checkpointing=kept),
            **lora_settings.settings("base", lora),
        )
        assert result.checkpoint
        measured.append(runs.tensors_of(result.checkpoint))
    assert measured[0] == measured[1]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Path:
    """Write the datasets, and train the runs of one plain process."""
    folder = tmp_path_factory.mktemp("composed")
    runs.write_clips(folder / "clips", 13)
    runs.write_pairs(folder / "pairs", 5)
    trainings = {tuple(plain(case).items()): plain(case) for case in ALLOWED}
    train(fork_server, folder, list(trainings.values()))
    return folder


def train(server: ForkServer, folder: Path, cases: list[Case]) -> None:
    world = machine_of(cases[0]).devices
    report = {"cases": cases, "world": world, "root": str(folder)}
    server.run("combined_runs:train", world=world, arguments=report)


def change(folder: Path, case: Case) -> dict[str, Tensor]:
    """Return the change of every weight, and the moments."""
    result = load_file(folder / f"{combined_runs.name_of(case)}.safetensors")
    start = load_file(folder / f"start-{case['adapters']}.safetensors")
    return {k: t - start[k] if k in start else t for k, t in result.items()}


@pytest.mark.slow
@pytest.mark.parametrize("alone", [True, False], ids=["one-rank", "two-ranks"])
def test_every_allowed_combination_trains_the_same(
    fork_server: ForkServer, reference: Path, alone: bool
) -> None:
    """Changes of weights, moments and average agree, as fp32 rounds sums and as bf16 rounds."""
    cases = [case for case in COVERING if (case["strategy"] == "single") == alone]
    train(fork_server, reference, cases)
    for case in cases:
        expected = change(reference, plain(case))
        result = change(reference, case)
        assert result.keys() == expected.keys()
        limit = 1e-5 if case["precision"] == "32-true" else 0.05
        for part in ("master", "exp_avg", "exp_avg_sq", "ema"):
            names = [name for name in expected if name.startswith(part + "/")]
            complete = torch.cat([expected[name].flatten() for name in names])
            error = torch.cat([(result[name] - expected[name]).flatten() for name in names])
            assert error.norm() <= limit * complete.norm(), (
                case, part, float(error.norm() / complete.norm())
            )  # fmt: skip
