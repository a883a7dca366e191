"""Replicated state is compared between ranks, and a difference is reported by tensor and rank."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rank_guards
import runs
import tiny
import torch
from forked import ForkServer
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from echolab.models.frozen import Frozen
from echolab.training.callbacks.reference_model import ReferenceModel
from echolab.training.callbacks.replicas import (
    CHUNK,
    MIX_1,
    Unchanged,
    _hash_factors,
    check_replicas,
    describe_outliers,
    difference,
    digest,
    digests,
    frozen,
    outlier_rank,
    replicated,
)

BITS = 1 << 64
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)


def splitmix64(i: int) -> int:
    """Compute splitmix64 as its authors wrote it, in unsigned arithmetic; made odd."""
    z = i * 0x9E3779B97F4A7C15 % BITS
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % BITS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % BITS
    return (z ^ (z >> 31)) | 1


def by_hand(values: list[int], chunk: int = CHUNK) -> int:
    """Compute the digest of int64 values in Python's integers, as a signed number."""
    total = 0
    for first in range(0, len(values), chunk):
        part = enumerate(values[first : first + chunk], 1)
        total = (total * MIX_1 + sum(v * splitmix64(i) for i, v in part)) % BITS
    return total - BITS * (total >> 63)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_digests_follow_the_formula(values: list[int]) -> None:
    assert digests({"x": torch.tensor(values)}) == {"x": by_hand(values)}


def test_large_tensors_are_hashed_in_chunks() -> None:
    values = torch.arange(CHUNK + 3)
    factors = _hash_factors(CHUNK, values.device)
    first = int((values[:CHUNK] * factors).sum()) * MIX_1
    rest = sum((CHUNK + i) * splitmix64(i + 1) for i in range(3))
    expected = (first + rest) % BITS
    assert digests({"x": values})["x"] % BITS == expected
    values[CHUNK] += 1
    assert digests({"x": values})["x"] % BITS != expected


@given(data=st.data(), dtype=st.sampled_from(DTYPES), size=st.integers(1, 40))
def test_any_flipped_bit_and_any_swap_is_detected(
    data: st.DataObject, dtype: torch.dtype, size: int
) -> None:
    generator = torch.Generator().manual_seed(size)
    tensor = (torch.randn(size, generator=generator) * 100).to(dtype)
    before = digests({"x": tensor})
    at = data.draw(st.integers(0, size - 1))
    changed = tensor.clone()
    bit = 0 if dtype is torch.bool else data.draw(st.integers(0, 8 * tensor.element_size() - 1))
    rank_guards.flip(changed[: at + 1], bit)
    assert digests({"x": changed}) != before and digests({"x": tensor.clone()}) == before
    other = data.draw(st.integers(0, size - 1))
    swapped = tensor.clone()
    swapped[at], swapped[other] = tensor[other], tensor[at]
    same = bool(tensor[at] == tensor[other])
    assert (digests({"x": swapped}) == before) == same


def test_digests_ignore_memory_layout_and_include_nan() -> None:
    complete = torch.randn(6, 5)
    assert digests({"x": complete.t()}) == digests({"x": complete.t().contiguous()})
    assert digests({"x": complete[1:, 2]}) == digests({"x": complete[1:, 2].clone()})
    check_replicas({"x": torch.tensor([float("nan"), 0.0]), "none": torch.zeros(0)})
    assert digests({"x": torch.tensor(0.0)}) != digests({"x": torch.tensor(-0.0)}) != {}
    zeros = [digest({"x": torch.zeros(2, dtype=dtype)}) for dtype in DTYPES]
    assert len(set(zeros)) == len(DTYPES)  # names, types and shapes count too
    assert digest({"x": torch.zeros(2)}) != digest({"y": torch.zeros(2)}) != digest({})
    assert digest({"x": torch.zeros(2)}) != digest({"x": torch.zeros(1, 2)})
    assert digests({"z": torch.tensor([1 + 2j])}) != digests({"z": torch.tensor([2 + 1j])})


@pytest.mark.parametrize(
    ("values", "words", "one"),
    [
        (["a", "a", "a"], "", None),
        (["a", "b", "a"], "rank 1 against the others", 1),
        (["c", "b", "a", "a"], "ranks 0, 1 against the others", None),
        (["a", "b"], "rank 0 against rank 1", None),
        (["a", "b", "a", "b"], "ranks 0, 2 against ranks 1, 3", None),
        (["a", "b", "c"], "rank 0 against rank 1 against rank 2", None),
        (
            ["a"] * 20 + ["b"] * 10,
            "ranks 20, 21, 22, 23, 24, 25, 26, 27, ... against the others",
            None,
        ),
    ],
)
def test_the_majority_of_ranks_is_right(values: list[str], words: str, one: int | None) -> None:
    assert describe_outliers(values) == words and outlier_rank(values) == one


def test_several_tensors_may_differ() -> None:
    parts = [{"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}, {"a": "1", "b": "2"}]
    said = difference(parts, ["x", "x", "y"])
    assert said.startswith("b and 2 more is not the same on all ranks: rank 1 against the others;")


class Mixed(nn.Module):
    """Parameters full and partitioned, as ZeRO 3 leaves them, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("plain", "kept", "cut", "gathered"):
            self.register_parameter(name, nn.Parameter(torch.ones(3), requires_grad=name != "kept"))
        self.register_buffer("table", torch.ones(2))
        for number, name in enumerate(("kept", "cut", "gathered")):
            parameter: Any = getattr(self, name)
            parameter.ds_id, parameter.ds_shape = number, torch.Size([3])
            parameter.ds_tensor = torch.ones(2)
            parameter.ds_persist = name == "kept"
        self.cut.data = torch.empty(0)


def test_replicated_tensors_are_listed_for_every_strategy() -> None:
    net = Mixed()
    assert list(replicated(net)) == ["plain", "kept", "table"]
    assert {name: len(piece) for name, piece in frozen(net).items()} == {"kept": 2}
    assert list(frozen(Frozen(tiny.net()).net)) == [n for n, _ in tiny.net().named_parameters()]


def test_a_reference_is_read_again_after_a_rollback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reads: list[Path] = []

    class Saved:
        def __init__(self, path: Path) -> None:
            reads.append(path)

        def tensors(self, part: str) -> dict[str, Tensor]:
            assert part == "ema"
            return dict(tiny.net().named_parameters())

    monkeypatch.setattr("echolab.training.callbacks.reference_model.open_on_all_ranks", Saved)
    reference = Frozen(tiny.net())
    watched: list[bool] = []
    config = SimpleNamespace(
        reference=reference,
        ref_model=None,
        objectives={"dpo": runs.Preference(runs.PHASES, reference, 100.0)},
        mixes_reference=False,
        ref_model_sync_steps=0,
        ref_model_mixup_alpha=0.6,
    )
    callback = ReferenceModel(
        config,  # type: ignore[arg-type]
        SimpleNamespace(),  # type: ignore[arg-type]
        SimpleNamespace(),  # type: ignore[arg-type]
        SimpleNamespace(folder=tmp_path),  # type: ignore[arg-type]
        SimpleNamespace(watch_reference=lambda: watched.append(True)),  # type: ignore[arg-type]
    )
    module = SimpleNamespace(device=torch.device("cpu"))
    plan = runs.schedule(("sft", 2), ("dpo", 4))
    state: Any = SimpleNamespace(step=2, schedule=plan, module=module)
    start = callback.state_dict()
    callback.before_step(state)
    state.step = 3
    callback.before_step(state)
    assert len(watched) == 1  # read once an epoch
    still = Unchanged("the reference", dict(reference.net.named_parameters()))
    still.check(dict(reference.net.named_parameters()))
    callback.load_state_dict(start)
    callback.before_step(state)
    assert len(watched) == 2
    assert reads == [tmp_path / "step-000002"] * 2


# -- real ranks -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_three_ranks_identify_each_fault(fork_server: ForkServer, tmp_path: Path) -> None:
    fork_server.run("rank_guards:compare", world=3, arguments={"to": str(tmp_path)})
    of_ranks = [json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in range(3)]
    assert of_ranks[0] == of_ranks[1] == of_ranks[2]  # no rank continues alone
    report = of_ranks[0]
    assert report["alike"] == report["still"] == ""
    for name in ("weight", "bias", "steps"):
        assert report[name].startswith(
            f"{name} is not the same on all ranks: rank 1 against the oth"
        )
        assert "echolab rollback" in report[name] and "\n" not in report[name]
    having = {"weight": 1, "bias": 1, "steps": 1, "state": 2, "less": 0, "each": None, "changed": 2}
    assert all(report[name].endswith(f"; of rank {rank}") for name, rank in having.items())
    assert report["state"].startswith(
        "state is not the same on all ranks: rank 2 against the others"
    )
    assert report["less"].startswith("bias is not the same on all ranks: rank 0 against the others")
    assert "rank 0 against rank 1 against rank 2" in report["each"]
    assert report["changed"].startswith("the reference is frozen, and b has changed on rank 2;")
    assert report["events"] == [[3, "rollback", {"to": 1, "skip": ["sft", 5, 2]}]]
    assert report["skips"] == [["sft", 5, 2]]
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 1
    # Slow from window 1 on, reported once after three windows; then another section.
    assert report["slow"] == [[], [], [], ["1 node-1 forward"], [], [], [], ["2 node-2 data_wait"]]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_a_flipped_bit_ends_training_and_names_the_rank(
    fork_server: ForkServer, tmp_path: Path, strategy: str
) -> None:
    runs.write_clips(tmp_path / "clips", 7)
    runs.write_pairs(tmp_path / "pairs", 5)
    arguments = {"root": str(tmp_path), "strategy": strategy, "to": str(tmp_path)}
    ranks = fork_server.run("rank_guards:train", world=2, arguments=arguments)
    name = ranks.output(1).split("flipped ")[1].split()[0]
    for rank in range(2):
        said = (tmp_path / f"{strategy}-{rank}").read_text()
        assert said.startswith(f"{name} is not the same on all ranks: rank 0 against rank 1; ")
