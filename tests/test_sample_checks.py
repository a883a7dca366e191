"""A sample that cannot be trained on is refused at reading and by `data verify deep=true`, with
equal errors.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import encoded
import pytest
import runs
import tiny
import torch
from safetensors.torch import save
from torch import Tensor

from echolab.config import build
from echolab.config.compose import compose
from echolab.data.bad_samples import read_quarantine
from echolab.data.collate import common_shapes, read_clip, read_pair
from echolab.data.shard_reader import ShardDataset, open_dataset
from echolab.data.shard_writer import ShardWriter
from echolab.data.verify import find_faults
from echolab.errors import ConfigError, DataError
from echolab.tasks.table import TASKS
from echolab.training.callbacks.validation import read_share
from echolab.training.config import Intervals, TrainConfig
from echolab.training.datamodule import ValData

Tensors = dict[str, Tensor]
BAD, COUNT = 4, 7
PLAN = runs.schedule(("sft", 4), ("dpo", 2))


def pair_tensors(seed: int) -> Tensors:
    tensors = runs.clip_tensors(100 + seed)
    pair = {name: tensors[name] for name in ("text", "image", "audio", "face", "weight")}
    pair |= {"known": tensors["known.i2v"], "known_latents": tensors["known_latents.i2v"]}
    return pair | {"chosen": tensors["latents"], "rejected": tiny.latents(1, 300 + seed)[0]}


MAKERS: dict[str, Callable[[int], Tensors]] = {
    "encoded": runs.clip_tensors,
    "preference": pair_tensors,
}


def write(
    folder: Path, kind: str, change: Callable[[Tensors], Tensors], about: bytes = b'{"task": "i2v"}'
) -> ShardDataset:
    """Write a dataset whose sample BAD is changed."""
    name = "clip" if kind == "encoded" else "pair"
    with ShardWriter(folder, kind=kind, samples_per_shard=3) as writer:
        for i in range(COUNT):
            tensors = MAKERS[kind](i)
            tensors = change(tensors) if i == BAD else tensors
            json_member = about if i == BAD else b'{"task": "i2v"}'
            writer.write(f"{name}-{i:03d}", {"safetensors": save(tensors), "json": json_member})
    return open_dataset(folder)


def shorter(name: str, dim: int) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        length = tensors[name].shape[dim] - 1
        return tensors | {name: tensors[name].narrow(dim, 0, length).contiguous()}

    return change


def longer(name: str, dim: int) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        last = tensors[name].narrow(dim, 0, 1)
        return tensors | {name: torch.cat([tensors[name], last], dim)}

    return change


def holding(name: str, value: float, dtype: torch.dtype = torch.float32) -> Any:
    def change(tensors: Tensors) -> Tensors:
        copy = tensors[name].to(dtype).clone()
        copy.view(-1)[-1] = value
        return tensors | {name: copy}

    return change


def times(name: str, factor: float) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: tensors[name] * factor}


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def changes() -> dict[tuple[str, str, str], Callable[[Tensors], Tensors]]:
    """Return every way in which one tensor can be wrong, by (kind, tensor, fault)."""
    faults: dict[tuple[str, str, str], Callable[[Tensors], Tensors]] = {}
    for kind, make in MAKERS.items():
        for name, tensor in make(0).items():
            for dim in range(tensor.ndim):
                faults[kind, name, f"shorter in {dim}"] = shorter(name, dim)
                faults[kind, name, f"longer in {dim}"] = longer(name, dim)
            faults[kind, name, "flat"] = lambda t, name=name: t | {name: t[name].flatten()[None]}
            faults[kind, name, "nan"] = holding(name, math.nan)
            faults[kind, name, "inf in fp16"] = holding(name, -math.inf, torch.float16)
            faults[kind, name, "nan in bf16"] = holding(name, math.nan, torch.bfloat16)
            faults[kind, name, "over fp32"] = holding(name, 1e300, torch.float64)
            faults[kind, name, "missing"] = without(name)
        faults[kind, "weight", "zero"] = times("weight", 0.0)
        faults[kind, "weight", "tiny"] = times("weight", 1e-9)
        faults[kind, "weight", "negative"] = times("weight", -1.0)
        known = "known.i2v" if kind == "encoded" else "known"
        faults[kind, known, "over 1"] = holding(known, 1.5)
        faults[kind, known, "below 0"] = holding(known, -0.5)
    return faults


CHANGES = changes()


def read_all(dataset: ShardDataset, i: int) -> None:
    """Read as training does: a clip in the form of every task, a pair as it is."""
    if dataset.kind == "preference":
        read_pair(dataset, i)
    else:
        for task in TASKS:
            read_clip(dataset, i, task)


@pytest.mark.parametrize(("kind", "name"), sorted({(kind, name) for kind, name, _ in CHANGES}))
def test_reading_and_deep_verification_refuse_the_same_samples(
    tmp_path: Path, kind: str, name: str
) -> None:
    of_tensor = {what: c for (k, n, what), c in CHANGES.items() if (k, n) == (kind, name)}
    for what, change in of_tensor.items():
        dataset = write(tmp_path / what, kind, change)
        key = dataset.keys[BAD]
        with pytest.raises(DataError, match=f"sample {key}: .*; encode it again") as error:
            read_all(dataset, BAD)
        line = str(error.value)
        assert "\n" not in line and ("tensor" in line), (what, line)
        assert find_faults(tmp_path / what) == [], what
        (fault,) = find_faults(tmp_path / what, deep=True)
        assert fault.sample == key and fault.byte and "cannot be trained on" in fault.what, what
        assert fault.what.partition("(")[2].rstrip(")") in line, (what, fault.what, line)
        for i in set(range(COUNT)) - {BAD}:
            read_all(dataset, i)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("about", [b"[1]", b"7", b'"x"', b"null"])
def test_a_json_member_is_an_object(tmp_path: Path, kind: str, about: bytes) -> None:
    dataset = write(tmp_path / "d", kind, lambda tensors: tensors, about)
    (fault,) = find_faults(tmp_path / "d", deep=True)
    assert fault.sample == dataset.keys[BAD] and "json: not an object" in fault.what
    if kind == "preference":
        with pytest.raises(DataError, match="pair-004: json: not an object"):
            read_all(dataset, BAD)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", MAKERS)
def test_no_good_sample_is_refused(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    dataset = write(tmp_path / "d", kind, lambda t: {name: v.to(dtype) for name, v in t.items()})
    assert find_faults(tmp_path / "d", deep=True) == []
    read_all(dataset, BAD)


def test_a_bad_first_sample_does_not_condemn_the_others(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, kind="encoded") as writer:
        for i in range(5):
            tensors = runs.clip_tensors(i)
            tensors = shorter("text", 0)(tensors) if i == 0 else tensors
            writer.write(f"clip-{i}", {"safetensors": save(tensors), "json": b"{}"})
    dataset = open_dataset(tmp_path)
    assert tuple(common_shapes(dataset)["text"]) == (5, 10)
    assert [fault.sample for fault in find_faults(tmp_path, deep=True)] == ["clip-0"]


@pytest.mark.parametrize(
    "wrong",
    [("text", "nan"), ("face", "shorter in 0"), ("audio", "longer in 0"), ("weight", "zero")],
)
def test_training_ends_at_a_bad_clip_or_skips_it(tmp_path: Path, wrong: tuple[str, str]) -> None:
    write(tmp_path / "clips", "encoded", CHANGES["encoded", *wrong])
    write(tmp_path / "pairs", "preference", CHANGES["preference", *wrong])
    with pytest.raises(DataError, match=r"sample clip-004: .*data\.max_bad_fraction=0.01"):
        runs.train(tmp_path, PLAN, clips=[open_dataset(tmp_path / "clips")])
    result, rows = runs.train(
        tmp_path, PLAN, max_bad_fraction=0.4, intervals=Intervals(log_every=1),
        run_dir=tmp_path / "again",
        clips=[open_dataset(tmp_path / "clips")], pairs=[open_dataset(tmp_path / "pairs")],
    )  # fmt: skip
    assert result.done and all(
        math.isfinite(row["train/loss"]) for row in rows if "train/loss" in row
    )
    bad = {entry["key"] for entry in read_quarantine(tmp_path / "again/quarantine.jsonl")}
    assert bad == {"clip-004", "pair-004"}


def test_a_bad_held_out_clip_is_reported_before_the_first_step(tmp_path: Path) -> None:
    held = ValData(write(tmp_path / "held", "encoded", CHANGES["encoded", "latents", "nan"]))
    with pytest.raises(DataError, match="clip-004: tensor latents: 1 of .* values not finite"):
        read_share(held)
    settings: Mapping[str, Any] = {
        "val_data": held, "phases": runs.PHASES,
        "intervals": Intervals(log_every=1, save_every=0, val_every=4),
    }  # fmt: skip
    plan = runs.schedule(("sft", 4))
    rows: list[Any] = []
    with pytest.raises(DataError, match="held: sample clip-004"):
        runs.train(tmp_path, plan, **settings, log_metrics=lambda step, values: rows.append(step))
    assert rows == []
    _, logged = runs.train(tmp_path, plan, **settings, max_bad_fraction=0.4)
    losses = [row["val/loss"] for row in logged if "val/loss" in row]
    assert losses and all(map(math.isfinite, losses))
    assert [e["key"] for e in read_quarantine(tmp_path / "run/quarantine.jsonl")] == ["clip-004"]


def check(tmp_path: Path, **changes: Any) -> None:
    clips = changes.pop("clips", None) or runs.write_clips(tmp_path / "clips", 3)
    TrainConfig(
        net=tiny.net(), architecture={**tiny.SIZES, **changes.pop("model", {})}, clips=[clips],
        run_dir=tmp_path / "run", schedule=runs.schedule(("sft", 1)), curriculum=runs.curriculum(),
        objectives={"sft": runs.Supervised(runs.PHASES)}, batch_size=1, phases=runs.PHASES,
        **changes,
    ).check()  # fmt: skip


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"text_dim": 9}, r"model.text_dim=9: the clips of .* have 10; use the model="),
        ({"image_dim": 9}, r"model.image_dim=9: the clips of .* have 12"),
        ({"audio_dim": 9}, r"model.audio_dim=9: the clips of .* have 6"),
        ({"audio_layers": 12}, r"model.audio_layers=12: the clips of .* have null"),
        ({"out_channels": 8}, r"model.out_channels=8: the clips of .* have 4"),
        ({"patch_size": [2, 2, 2]}, r"model.patch_size=\[2, 2, 2\]: does not divide the latents"),
    ],
)
def test_data_that_the_network_cannot_read_is_refused(
    tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    check(tmp_path)
    check(tmp_path, model={"image_dim": None, "audio_dim": None})
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, model=model)
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, model=model, pairs=[runs.write_pairs(tmp_path / "pairs", 2)])


def test_data_of_another_kind_or_without_a_task_is_refused(tmp_path: Path) -> None:
    def lacking(tensors: Tensors) -> Tensors:
        return {name: t for name, t in tensors.items() if not name.endswith(".lip_sync")}

    with ShardWriter(tmp_path / "few", kind="encoded") as writer:
        for i in range(3):
            members = {"safetensors": save(lacking(runs.clip_tensors(i))), "json": b"{}"}
            writer.write(f"clip-{i}", members)
    few = open_dataset(tmp_path / "few")
    with pytest.raises(ConfigError, match="tasks.tasks: task lip_sync, for which the clips of"):
        check(tmp_path, clips=few)
    with pytest.raises(ConfigError, match="data.val_tasks: task lip_sync"):
        check(tmp_path, val_data=ValData(few))
    check(tmp_path, val_data=ValData(few, tasks=("t2v", "i2v")))
    pairs = runs.write_pairs(tmp_path / "pairs", 2)
    with pytest.raises(DataError, match="pairs: kind preference, need encoded; give another"):
        check(tmp_path, val_data=ValData(pairs))
    with pytest.raises(DataError, match="pairs: kind preference, need encoded"):
        check(tmp_path, clips=pairs)
    with pytest.raises(DataError, match="few: kind encoded, need preference"):
        check(tmp_path, pairs=[few])
    assert json.loads((tmp_path / "few/dataset.json").read_text())["kind"] == "encoded"


def test_data_is_checked_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_weights(*_: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(build, "start_of", no_weights)
    clips, _ = encoded.write(tmp_path)
    words = [*encoded.SETTINGS, f"data.clips={clips}", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match="model.text_dim=8: the clips of"):
        build.train_config_from(compose([*words, "model.text_dim=8"]), "")
    with pytest.raises(DataError, match="nowhere/dataset.json: not there"):
        build.train_config_from(compose([*words, "data.val_clips=nowhere"]), "")
    with pytest.raises(AssertionError, match="weights are read"):
        build.train_config_from(compose(words), "")


def test_mixed_datasets_have_features_of_one_size(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "other", kind="encoded") as writer:
        for i in range(3):
            tensors = longer("image", 0)(runs.clip_tensors(i))
            writer.write(f"clip-{i}", {"safetensors": save(tensors), "json": b"{}"})
    clips = [runs.write_clips(tmp_path / "clips", 3), open_dataset(tmp_path / "other")]
    with pytest.raises(ConfigError, match=r"have clips of one size, but image of \[3, 12\] and"):
        runs.train(tmp_path, runs.schedule(("sft", 1)), clips=clips)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
def test_a_flow_shift_must_be_above_0(tmp_path: Path, shift: float) -> None:
    with pytest.raises(ConfigError, match="flow_shift=.*: must be above 0"):
        check(tmp_path, flow_shift=shift)
