"""The identity of a run: its settings and the content of its data, not how paths are spelled or
where they are. Other data needs an explicit setting, and past steps stay as they were
trained.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import encoded
import pytest
from safetensors.torch import save

from echolab.cli.__main__ import main
from echolab.cli.train_rank import train
from echolab.config.compose import compose
from echolab.data.ledger import audit_run
from echolab.data.shard_reader import open_dataset
from echolab.data.shard_writer import ShardWriter
from echolab.errors import EcholabError
from echolab.tracking.metrics import read_metrics, series
from echolab.training.checkpoints.checkpoint import latest_valid
from echolab.training.fit import FitResult
from echolab.training.guards import events

SETTINGS = (
    *encoded.SETTINGS, "batch_size=2", "log_every=1", "verify_export=false",
    "data.log_samples=true",
    "optim.ema_decay=0.5", "tasks=i2v",
)  # fmt: skip


def run_of(root: Path, *words: str) -> FitResult:
    """Train in the folder `root`, by the command's words; later words win."""
    return train(compose([*SETTINGS, f"run_dir={root}", *words]))


def plan(*epochs: tuple[str, int, float], **more: Any) -> list[str]:
    """Return the overrides of a schedule."""
    scales = [Decimal(str(lr)) / Decimal("1e-3") for _, _, lr in epochs]  # of encoded.SETTINGS
    fields = ",".join(
        f"{{kind:{kind},steps:{steps},lr_scale:{scale:f}}}"
        for (kind, steps, _), scale in zip(epochs, scales, strict=True)
    )
    return [f"schedule.epochs=[{fields}]", *(f"schedule.{k}={v}" for k, v in more.items())]


def state_of(run: Path) -> dict[str, Any]:
    checkpoint, _ = latest_valid(run / "checkpoints")
    assert checkpoint
    return checkpoint.state


def files(folder: Path) -> dict[str, bytes]:
    """Return the files that define a run, and its results."""
    kept = ("config.json", "configs.jsonl", "events.jsonl", "state.json", "manifest.json")
    paths = [path for path in sorted(folder.rglob("*")) if path.name in kept]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `clips` and `pairs`, `other` clips, and a run `first` of two steps to start from."""
    root = tmp_path_factory.mktemp("data")
    encoded.write(root, 5)
    encoded.write(root / "other", 7)
    run_of(root / "first", f"data.clips={root / 'clips'}", *plan(("sft", 2, 1e-3)))
    run_of(root / "second", f"data.clips={root / 'clips'}", *plan(("sft", 2, 2e-3)))
    return root


@pytest.fixture(scope="module")
def begun(data: Path) -> Path:
    """Start a run of sft and dpo steps from `first`, with `second` as its reference."""
    words = [f"data.clips={data / 'clips'}", f"data.pairs={data / 'pairs'}"]
    words += [f"init_from={data / 'first'}", f"ref_model={data / 'second'}"]
    assert run_of(data / "begun", *words, *plan(("sft", 2, 1e-3), ("dpo", 2, 1e-3))).done
    return data / "begun"


MORE = plan(("sft", 2, 1e-3), ("dpo", 2, 1e-3), ("sft", 1, 1e-3))

# By name: how the paths of clips, pairs, init_from and ref_model are given to a later attempt.
SPELLINGS: dict[str, Callable[[Path, Path], dict[str, Path | str]]] = {
    "absolute": lambda root, moved: {name: root / path for name, path in NAMED.items()},
    "relative": lambda root, moved: {
        name: os.path.relpath(root / path) for name, path in NAMED.items()
    },
    "slash": lambda root, moved: {name: f"{root / path}/" for name, path in NAMED.items()},
    "dots": lambda root, moved: {name: f"{root}/clips/../{p}" for name, p in NAMED.items()},
    "list": lambda root, moved: {
        name: f"[{root / path}]" if name.startswith("data") else f"{root / path}"
        for name, path in NAMED.items()
    },
    "another disk": lambda root, moved: {name: moved / path for name, path in NAMED.items()},
    "checkpoint": lambda root, moved: {
        name: root / path / ("" if name.startswith("data") else "checkpoints/step-000002")
        for name, path in NAMED.items()
    },
}
NAMED = {"data.clips": "clips", "data.pairs": "pairs", "init_from": "first", "ref_model": "second"}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_run_resumes_with_any_spelling_of_its_paths(
    begun: Path, data: Path, tmp_path: Path, spelling: str
) -> None:
    run, moved = shutil.copytree(begun, tmp_path / "renamed"), tmp_path / "disk"
    if spelling == "another disk":
        for name in NAMED.values():
            shutil.copytree(data / name, moved / name)
    words = [f"{name}={value}" for name, value in SPELLINGS[spelling](data, moved).items()]
    result = run_of(run, *words, *MORE)
    assert (result.step, result.done) == (5, True)
    assert json.loads((run / "config.json").read_text())["run_dir"] == str(run)
    assert not events.read(run)
    assert audit_run(run).exact
    assert main(["replay", str(run), "step=5"]) == 0


def test_settings_that_do_not_affect_training_may_change(
    begun: Path, data: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(begun, tmp_path / "run")
    words = [f"{name}={data / path}" for name, path in NAMED.items()]
    held = [f"data.val_clips={data / 'other/clips'}", "data.val_num_clips=2"]
    other = ["data.log_samples=false", "data.max_bad_fraction=0.5", "save_every=1", "val_every=1"]
    assert run_of(run, *words, *MORE, *held, *other, "data.val_tasks=[i2v]").step == 5
    steps, losses = series(read_metrics(run / "metrics.jsonl"), "val/loss")
    assert steps[-1] == 5 and losses[-1] > 0


@pytest.mark.parametrize(
    ("written", "expected"), [({}, 1), ({"format": 1}, 1), ({"format": 99}, 99)]
)
def test_a_run_folder_of_another_format_is_refused_and_unchanged(
    begun: Path, data: Path, tmp_path: Path, written: dict[str, int], expected: int
) -> None:
    """Format 1 did not record its number."""
    run = shutil.copytree(begun, tmp_path / "run")
    identity = json.loads((run / "run.json").read_text())
    del identity["format"]
    (run / "run.json").write_text(json.dumps({**identity, **written}))
    before = files(run)
    words = [f"{name}={data / path}" for name, path in NAMED.items()]
    with pytest.raises(EcholabError, match=f"run folder of format {expected}, .* reads format 2; "):
        run_of(run, *words, *MORE)
    assert files(run) == before


def same_keys(data: Path, out: Path) -> Path:
    """Encode the clips again: the same keys and shards, other values."""
    with ShardWriter(out, kind="encoded") as writer:
        for i, key in enumerate(open_dataset(data / "clips").keys):
            writer.write(key, {"safetensors": save(encoded.tensors(i + 900)), "json": b"{}"})
    return out


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        ("data.clips", "other/clips", "data.clips: .*other/clips is not what the run was trained"),
        ("data.clips", "again", "data.clips: .*again is not what .* give data.changed=accept"),
        ("data.pairs", "other/pairs", "data.pairs: .*other/pairs is not what the run was trained"),
        ("init_from", "second", "init_from= was step 2, sha256 .*, now step 2"),
        ("ref_model", "first", "ref_model= was step 2, sha256"),
        ("ref_model", "null", "ref_model= was step 2, sha256 .* now not given"),
        ("lora.init_from", "first", "lora"),
        ("optim.eps", "0.5", "optim.eps=1e-08, now optim.eps=0.5"),
        ("flow_shift", "2", "flow_shift=5.0, now flow_shift=2"),
        ("objective.beta", "7", "objective.beta=300.0, now objective.beta=7"),
    ],
)  # fmt: skip
def test_changed_data_is_refused_and_nothing_is_written(
    begun: Path, data: Path, tmp_path: Path, word: str, value: str, message: str
) -> None:
    run = shutil.copytree(begun, tmp_path / "run")
    paths = {name: str(data / path) for name, path in NAMED.items()}
    if value == "again":
        paths[word] = str(same_keys(data, tmp_path / "again"))
    else:
        is_path = word in (*NAMED, "lora.init_from") and value != "null"
        paths[word] = str(data / value) if is_path else value
    before = files(run)
    with pytest.raises(EcholabError, match=message) as error:
        run_of(run, *(f"{name}={path}" for name, path in paths.items()), *MORE)
    assert "\n" not in str(error.value)
    assert files(run) == before


def test_data_that_was_encoded_again_can_be_accepted(data: Path, tmp_path: Path) -> None:
    clips, run = shutil.copytree(data / "clips", tmp_path / "clips"), tmp_path / "run"
    words = [f"data.clips={clips}", *plan(("sft", 9, 1e-3))]
    run_of(run, *words[:1], *plan(("sft", 4, 1e-3)))
    (tar,) = clips.glob("*.tar")
    original = tar.read_bytes()
    index = json.loads((clips / "dataset.json").read_text())
    offset, size, _ = index["samples"][3]["members"]["safetensors"]
    tar.write_bytes(original[: offset + 999] + b"damage" + original[offset + 1005 :])
    with pytest.raises(EcholabError, match="does not match its checksum"):
        run_of(run, *words)
    saved = state_of(run)["step"]
    # A budget bears with it; so does the run that had none.
    went_on = shutil.copytree(run, tmp_path / "budget")
    assert run_of(went_on, *words, "data.max_bad_fraction=0.5").done
    # Encoded again it has another fingerprint: that takes a word, and the order stays.
    shutil.rmtree(clips)
    same_keys(data, clips)
    with pytest.raises(EcholabError, match="give data.changed=accept"):
        run_of(run, *words)
    assert run_of(run, *words, "data.changed=accept").done
    recorded = events.read(run)
    assert [(event.kind, event.step) for event in recorded] == [("data", saved)]
    old, new = (open_dataset(path).fingerprint for path in (data / "clips", clips))
    assert [piece["first"] for piece in state_of(run)["data"]] == [0, saved]
    assert [piece["clips"][0][0] for piece in state_of(run)["data"]] == [old, new]
    assert state_of(run)["clips"] == [new]
    assert audit_run(run).exact  # each once an epoch, over the change
    assert run_of(run, *words[:1], *plan(("sft", 11, 1e-3))).step == 11  # no word any more
    assert [piece["first"] for piece in state_of(run)["data"]] == [0, saved] and audit_run(
        run
    ).exact
    assert main(["replay", str(run), "step=11"]) == 0


def test_other_samples_can_be_accepted_and_the_audit_reports_them(
    begun: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(begun, tmp_path / "run")
    paths = {name: str(data / path) for name, path in NAMED.items()}
    paths["data.clips"] = f"[{data / 'clips'},{data / 'other/clips'}]"
    words = [f"{name}={value}" for name, value in paths.items()]
    accept = ["data.changed=accept", "data.clip_weights=[1,2]", *MORE]
    assert run_of(run, *words, *accept).done
    assert [event.kind for event in events.read(run)] == ["data"]
    capsys.readouterr()
    assert main(["data", "audit", str(run)]) == 1
    assert "from step 4 on the run trained on other sft data" in capsys.readouterr().out
    assert main(["replay", str(run), "step=5"]) == 0  # the step on the new data


def test_a_preference_epoch_may_be_added_with_pairs(data: Path, tmp_path: Path) -> None:
    run = shutil.copytree(data / "first", tmp_path / "run")
    words = [f"data.clips={data / 'clips'}", f"data.pairs={data / 'pairs'}"]
    assert run_of(run, *words, *plan(("sft", 2, 1e-3), ("dpo", 1, 1e-3))).step == 3


def test_a_run_keeps_the_checkpoints_that_it_began_with(
    begun: Path, data: Path, tmp_path: Path
) -> None:
    """The run it started from and its reference are trained further, which changes nothing."""
    run, paths = shutil.copytree(begun, tmp_path / "run"), dict[str, Path]()
    for name in ("init_from", "ref_model"):
        paths[name] = shutil.copytree(data / NAMED[name], tmp_path / name)
        rate = 1e-3 if name == "init_from" else 2e-3
        longer = plan(("sft", 2, rate), ("sft", 1, 1e-3))
        run_of(paths[name], f"data.clips={data / 'clips'}", *longer)
    words = [f"data.{name}={data / name}" for name in ("clips", "pairs")]
    words += [f"{name}={value}" for name, value in paths.items()]
    assert run_of(run, *words, *MORE).step == 5
    origins = state_of(run)["origins"]
    assert origins == state_of(begun)["origins"] and origins["init_from"]["step"] == 2


def rates(run: Path) -> dict[int, float]:
    """Return the learning rate of each step, counted from 1, as it was logged."""
    rows = read_metrics(run / "metrics.jsonl")
    return {row["step"]: row["train/lr"] for row in rows if "train/lr" in row}


@pytest.fixture(scope="module")
def stopped(data: Path) -> Path:
    """Train a run and stop it at step 4 of 6, within its second epoch."""
    run = data / "stopped"

    def stop(step: int, steps: int) -> None:
        if step == 3:  # the run ends after the next one
            os.kill(os.getpid(), signal.SIGUSR1)

    config = compose([*SETTINGS, f"run_dir={run}", f"data.clips={data / 'clips'}", *TWO])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("echolab.cli.train_rank.progress", lambda *_: _Advance(stop))
        assert train(config).step == 4
    return run


class _Advance:
    """Replaces the progress display, and gets every step."""

    def __init__(self, stop: Callable[[int, int], None]) -> None:
        self.stop = stop

    def __enter__(self) -> Callable[..., None]:
        return lambda step, words: self.stop(step, 0)

    def __exit__(self, *error: object) -> None:
        pass


TWO = plan(("sft", 2, 1e-3), ("sft", 4, 2e-3), warmup=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (plan(("sft", 2, 5e-3), ("sft", 4, 2e-3), warmup=2), r"schedule.epochs\[0\]: .*0.005"),
        (plan(("sft", 3, 1e-3), ("sft", 4, 2e-3), warmup=2), r"schedule.epochs\[0\]"),
        (plan(("sft", 2, 1e-3), ("sft", 1, 2e-3), warmup=2), r"schedule.epochs\[1\]"),
        (plan(("sft", 2, 1e-3), ("sft", 2, 3e-3), warmup=2), r"schedule.epochs\[1\]"),
        (plan(("sft", 2, 1e-3), ("sft", 4, 2e-3), warmup=1), "give schedule.warmup=2"),
        (plan(("sft", 2, 1e-3), ("sft", 4, 2e-3), warmup=4), "give schedule.warmup=2"),
    ],
)
def test_changes_of_past_steps_are_refused_and_nothing_is_written(
    stopped: Path, data: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    before = files(run)
    with pytest.raises(EcholabError, match=message):
        run_of(run, f"data.clips={data / 'clips'}", *words)
    assert files(run) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (TWO, [0.5e-3, 1e-3, 2e-3, 2e-3, 2e-3, 2e-3]),
        (plan(("sft", 2, 1e-3), ("sft", 4, 7e-3), warmup=2),
         [0.5e-3, 1e-3, 2e-3, 2e-3, 7e-3, 7e-3]),
        (plan(("sft", 2, 1e-3), ("sft", 3, 2e-3), ("sft", 2, 3e-3), warmup=2),
         [0.5e-3, 1e-3, 2e-3, 2e-3, 2e-3, 3e-3, 3e-3]),
        (plan(("sft", 2, 1e-3), ("sft", 6, 2e-3), warmup=2, decay="cosine"),
         [0.5e-3, 1e-3, 2e-3, 2e-3, 1e-3, 0.6173e-3, 0.2929e-3, 0.0761e-3]),
    ],
)  # fmt: skip
def test_a_change_within_the_current_epoch_is_recorded_from_its_step(
    stopped: Path, data: Path, tmp_path: Path, words: list[str], expected: list[float]
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    assert run_of(run, f"data.clips={data / 'clips'}", *words).done
    assert list(rates(run).values()) == pytest.approx(expected, rel=1e-3)
    pieces = state_of(run)["schedule"]["rates"]
    assert [piece["first"] for piece in pieces] == ([0] if words is TWO else [0, 4])
    kept = [json.loads(line) for line in (run / "configs.jsonl").read_text().splitlines()]
    assert [(line["attempt"], line["step"]) for line in kept] == [(1, 0), (2, 4)]
    assert kept[0]["config"]["schedule"] == json.loads(
        (stopped / "config.json").read_text()
    )["schedule"]  # fmt: skip
    for step in range(1, len(expected) + 1):  # the past and the change, across it too
        assert main(["replay", str(run), f"step={step}"]) == 0
    for path in (run / "checkpoints").iterdir():
        if path.name != f"step-{len(expected):06d}":
            shutil.rmtree(path)
    assert main(["replay", str(run), "step=5"]) == 0


def test_a_rollback_before_a_change_trains_with_the_new_settings(
    stopped: Path, data: Path, tmp_path: Path
) -> None:
    run, clips = shutil.copytree(stopped, tmp_path / "run"), f"data.clips={data / 'clips'}"
    assert run_of(run, clips, *plan(("sft", 2, 1e-3), ("sft", 4, 7e-3), warmup=2)).done
    assert main(["rollback", str(run), "to=2"]) == 0
    assert run_of(run, clips, *plan(("sft", 2, 1e-3), ("sft", 4, 9e-3), warmup=2)).done
    assert [piece["first"] for piece in state_of(run)["schedule"]["rates"]] == [0, 2]
    assert rates(run)[4] == 9e-3
    for step in (2, 3, 6):
        assert main(["replay", str(run), f"step={step}"]) == 0


@pytest.mark.parametrize("decay", ["constant", "cosine"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 5e-3}, r"schedule.epochs\[0\]"),
        ({"warmup": 3}, "schedule.warmup=3: it was 0"),
        ({"decay": True}, "schedule.decay"),
        ({"steps": 3}, r"schedule.epochs\[0\]"),
        ({"words": ["optim.weight_decay=0.5"]}, "optim.weight_decay"),
        ({"words": ["trainer.precision=bf16-mixed", "save_every=1"]}, ""),
    ],
)
def test_a_finished_run_is_not_rewritten(
    data: Path, tmp_path: Path, decay: str, change: dict[str, Any], message: str
) -> None:
    run, clips = tmp_path / "run", f"data.clips={data / 'clips'}"
    assert run_of(run, clips, *plan(("sft", 4, 1e-3), warmup=0, decay=decay)).done
    before = files(run)
    other = {"constant": "cosine", "cosine": "constant"}[decay] if "decay" in change else decay
    words = plan(
        ("sft", change.get("steps", 4), change.get("lr", 1e-3)),
        warmup=change.get("warmup", 0), decay=other,
    )  # fmt: skip
    if message:
        with pytest.raises(EcholabError, match=message):
            run_of(run, clips, *words, *change.get("words", []))
    else:
        assert run_of(run, clips, *words, *change["words"]).done
    assert files(run) == before


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_a_finished_run_may_be_made_longer(data: Path, tmp_path: Path, decay: str) -> None:
    run, clips = tmp_path / "run", f"data.clips={data / 'clips'}"
    assert run_of(run, clips, *plan(("sft", 2, 1e-3), warmup=0, decay=decay)).done
    was = rates(run)
    more = plan(("sft", 2, 1e-3), ("sft", 2, 2e-3), warmup=0, decay=decay)
    assert run_of(run, clips, *more).done
    assert run_of(run, clips, *more, "schedule.cycles=2").step == 8
    pieces = state_of(run)["schedule"]["rates"]
    assert [piece["first"] for piece in pieces] == [0, 2, 4]
    assert {step: rates(run)[step] for step in was} == was
    for step in (2, 3, 8):
        assert main(["replay", str(run), f"step={step}"]) == 0


def test_replay_uses_the_rounding_of_the_original_attempt(
    data: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, clips = shutil.copytree(stopped, tmp_path / "run"), f"data.clips={data / 'clips'}"
    assert run_of(run, clips, *TWO, "micro_batch_size=1", "trainer.precision=bf16-mixed").done
    capsys.readouterr()
    for step, how in ((4, "bit for bit"), (6, "losses to 0.001")):
        assert main(["replay", str(run), f"step={step}"]) == 0
        assert how in capsys.readouterr().out
