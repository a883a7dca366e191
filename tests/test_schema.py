"""The state of a checkpoint is validated when it is read, even if all hashes agree."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import saved
import torch
from forked import ForkServer
from safetensors.torch import load_file, save_file

from echolab.cli.__main__ import main as echolab
from echolab.errors import CheckpointError
from echolab.training.checkpoints.checkpoint import folder_of, latest_valid, open_checkpoint
from echolab.training.checkpoints.manifest import serialize
from echolab.training.checkpoints.schema import STATE, state_faults
from echolab.training.checkpoints.writer import write_file
from echolab.training.config import Intervals

State = dict[str, Any]


def rewrite(path: Path, change: Callable[[State], object]) -> None:
    """Change a checkpoint's state so that every hash agrees with it again."""
    state = json.loads((path / "state.json").read_text())
    change(state)
    (path / "state.json").write_text(json.dumps(state, indent=1))
    seal(path)


def seal(path: Path, **changes: Any) -> None:
    """Write a manifest that agrees with the files of a checkpoint."""
    content = json.loads((path / "manifest.json").read_text())
    content.pop("sha256")
    files = {name: write_file(path / name, [(path / name).read_bytes()])
             for name in content["files"]}  # fmt: skip
    (path / "manifest.json").write_bytes(serialize({**content, "files": files, **changes}))


def remove(*keys: str) -> Callable[[State], object]:
    def change(state: State) -> object:
        for key in keys[:-1]:
            state = state[key]
        return state.pop(keys[-1])

    return change


def put(value: Any, *keys: Any) -> Callable[[State], None]:
    def change(state: Any) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


REQUIRED = [
    ("step",), ("optimizer_updates",), ("ema",), ("ema", "updates"), ("schedule",),
    ("schedule", "epochs"), ("curriculum",), ("curriculum", "step"),
    ("curriculum", "probabilities"), ("objectives",), ("spikes",), ("spikes", "sft", "loss"),
    ("architecture",),
]  # fmt: skip
WRONG: list[tuple[Callable[[State], object], str]] = [
    (put("six", "optimizer_updates"), "optimizer_updates is 'six', must be an integer"),
    (put(True, "optimizer_updates"), "optimizer_updates is True"),
    (put(-1, "ema", "updates"), "ema.updates is -1"),
    (put(math.nan, "ema", "decay"), "ema.decay is nan"),
    (put(1.5, "step"), "step is 1.5"),
    (put(3, "step"), "step is 3, the manifest says 6"),
    (put([["sft", 6]], "schedule", "epochs"), r"schedule.epochs\[0\] is \['sft', 6\]"),
    (put("rl", "schedule", "epochs", 0, 0), "one of sft, ndpo, dpo"),
    (put(-1e-3, "schedule", "epochs", 0, 2), r"schedule.epochs\[0\]\[2\] is -0.001"),
    (put(5, "schedule", "epochs", 0, 1), "schedule.epochs are 5 steps, 6 are done"),
    (put([["sft", 0, 0]], "schedule", "skipped"), r"schedule.skipped\[0\]\[2\] is 0"),
    (put("x", "curriculum", "probabilities", "i2v"), "curriculum.probabilities.i2v is 'x'"),
    (put(0.5, "curriculum", "probabilities", "dance"), "has the key 'dance'"),
    (put({"i2v": 0.5}, "curriculum", "probabilities"), "add up to 0.5"),
    (put(7, "curriculum", "step"), "curriculum.step is 7"),
    (put({"dpo": {"margin_sum": math.inf}}, "objectives"), "objectives.dpo.margin_sum is inf"),
    (put("1", "spikes", "sft", "loss", 0), r"spikes.sft.loss\[0\] is '1'"),
    (put([], "spikes"), r"spikes is \[\], must be a mapping"),
    (put(None, "architecture"), "architecture is None"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    runs.train(folder, runs.schedule(("sft", 6)), intervals=Intervals(log_every=1, save_every=4))
    return folder / "run/checkpoints/step-000006"


@pytest.fixture(scope="module")
def state(trained: Path) -> State:
    result: State = json.loads((trained / "state.json").read_text())
    return result


def copy(state: State) -> State:
    copied: State = json.loads(json.dumps(state))
    return copied


def test_checkpoints_of_training_pass(state: State) -> None:
    assert state_faults(state, 6) == []
    assert state_faults({**state, "something": "new"}, 6) == []


@pytest.mark.parametrize("keys", REQUIRED, ids=".".join)
def test_every_missing_entry_is_detected(state: State, keys: tuple[str, ...]) -> None:
    changed = copy(state)
    remove(*keys)(changed)
    assert state_faults(changed, 6) == [f"{'.'.join(keys)} is missing"]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=[words for _, words in WRONG])
def test_wrong_types_and_ranges_are_named(
    state: State, change: Callable[[State], object], words: str
) -> None:
    changed = copy(state)
    change(changed)
    result = state_faults(changed, 6)
    assert len(result) == 1
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(result[0])


@pytest.mark.parametrize("other", [None, [], "text", 3])
def test_every_entry_has_a_checked_type(state: State, other: Any) -> None:
    """The checks themselves never fail, whichever value an entry has."""
    assert list(STATE(other, ""))
    for key in state:
        state_faults({**state, key: other}, 6)


# -- on disk ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saver = saved.Saver(tmp_path / "checkpoints", more=())
    for step in (1, 2):
        saver.save(step)
    return tmp_path / "checkpoints"


def change_tensors(
    path: Path, part: str, change: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    file = path / f"{part}-00001-of-00001.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    seal(path)


def fill(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["wide.weight"].view(-1)[17] = value

    return change


def halve(tensors: dict[str, torch.Tensor]) -> None:
    tensors["gain"] = tensors["gain"].half()


def flatten(tensors: dict[str, torch.Tensor]) -> None:
    tensors["wide.weight"] = tensors["wide.weight"].reshape(-1)


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["wide.weights"] = tensors.pop("wide.weight")


TENSORS: list[tuple[str, Callable[[dict[str, torch.Tensor]], None], str]] = [
    ("ema", fill(math.nan), "ema: wide.weight holds values that are not finite"),
    ("master", fill(math.inf), "master: wide.weight holds values that are not finite"),
    ("exp_avg", fill(-math.inf), "exp_avg: wide.weight holds values that are not finite"),
    ("exp_avg_sq", fill(-1.0), "exp_avg_sq: wide.weight holds negative squares"),
    ("ema", halve, "gain is .* of torch.float16"),
    ("master", flatten, r"wide.weight is \(2107,\)"),
    ("exp_avg", rename, "exp_avg and the manifest's parameters differ in wide.weight"),
]


@pytest.mark.parametrize(("part", "change", "words"), TENSORS, ids=[t[2] for t in TENSORS])
def test_tensors_agree_with_the_manifest_and_are_finite(
    folder: Path,
    part: str,
    change: Callable[[dict[str, torch.Tensor]], None],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change_tensors(folder_of(folder, 2), part, change)
    checkpoint, rejected = latest_valid(folder)
    assert checkpoint and checkpoint.step == 1 and len(rejected) == 1
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder_of(folder, 2))
    assert echolab(["checkpoint", "verify", str(folder_of(folder, 2))]) == 1
    assert part in capsys.readouterr().out


def test_large_values_are_finite(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["wide.weight"][:] = 3e38  # their sum is not

    change_tensors(folder_of(folder, 2), "exp_avg", change)
    assert open_checkpoint(folder_of(folder, 2)).step == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": "2"}, "step is '2'"),
        ({"tied": []}, "tied is"),
        ({"tied": {"again.weight": "nothing"}}, "shares the values of nothing"),
        ({"parameters": {"gain": "1"}}, "parameters.gain is '1'"),
    ],
)
def test_the_manifest_is_type_checked_too(folder: Path, changes: State, words: str) -> None:
    seal(folder_of(folder, 2), **changes)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder_of(folder, 2))
    result, _ = latest_valid(folder)
    assert result and result.step == 1


def test_a_manifest_without_files_is_invalid(folder: Path) -> None:
    path = folder_of(folder, 2) / "manifest.json"
    content = json.loads(path.read_text())
    for key in ("files", "parameters", "step", "tied"):
        left = {k: v for k, v in content.items() if k not in ("sha256", key)}
        path.write_bytes(serialize(left))
        with pytest.raises(CheckpointError, match=f"{key} is missing"):
            open_checkpoint(path.parent)


def test_a_missing_part_that_the_state_names_is_detected(folder: Path) -> None:
    rewrite(folder_of(folder, 2), put([0.5], "ema", "more"))
    with pytest.raises(CheckpointError, match="its state names .*ema-0.5"):
        open_checkpoint(folder_of(folder, 2))


def test_a_run_resumes_from_the_previous_valid_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Training raises no KeyError, and never uses an invalid checkpoint."""
    plan, every = runs.schedule(("sft", 6)), Intervals(log_every=1, save_every=2)
    runs.train(tmp_path, plan, intervals=every)
    checkpoints = tmp_path / "run/checkpoints"
    complete = runs.tensors_of(folder_of(checkpoints, 6))
    rewrite(folder_of(checkpoints, 6), remove("optimizer_updates"))
    result, rows = runs.train(tmp_path, plan, intervals=every)
    assert result.done and [row["step"] for row in rows] == [5, 6]
    said = capfd.readouterr().err
    assert "echolab: skipped: " in said and "optimizer_updates is missing" in said
    assert runs.tensors_of(folder_of(checkpoints, 6)) == complete


def test_all_ranks_decide_the_same(fork_server: ForkServer, tmp_path: Path) -> None:
    saver = saved.Saver(tmp_path / "checkpoints", more=())
    for step in (1, 2):
        saver.save(step)
    rewrite(folder_of(tmp_path / "checkpoints", 2), put("two", "ema", "updates"))
    arguments = {"folder": str(tmp_path / "checkpoints"), "out": str(tmp_path)}
    ranks = fork_server.run("test_schema:see_newest", world=2, arguments=arguments)
    assert [(tmp_path / f"saw-{rank}").read_text() for rank in range(2)] == ["1", "1"]
    assert "ema.updates is 'two'" in ranks.output(0)


def see_newest(folder: str, out: str) -> None:
    """Write the step that a rank resumes from."""
    import os

    import torch.distributed as dist

    from echolab.training.checkpoints.checkpoint import newest

    dist.init_process_group("gloo")
    checkpoint = newest(Path(folder))
    (Path(out) / f"saw-{os.environ['RANK']}").write_text(str(checkpoint and checkpoint.step))
