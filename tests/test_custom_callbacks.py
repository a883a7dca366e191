"""A user's own callback is built from its setting alone, and only if it is registered."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import encoded
import pytest

from echolab.cli.__main__ import main
from echolab.config.parts import callbacks_from, check_targets
from echolab.errors import ConfigError
from echolab.launch import exit_codes
from echolab.tracking.metrics import read_metrics

MODULE = '''
"""Callbacks of a laboratory."""

import json
from pathlib import Path

from echolab.training.callbacks.callback import Callback

OUT = None


class Recorder(Callback):
    """Writes each hook to a file, counts steps over all attempts, and logs a metric."""

    def __init__(self, out, stop_after=0):
        self.out, self.stop_after, self.steps = Path(out), stop_after, 0

    def write(self, state, hook):
        with self.out.open("a") as file:
            checkpoint = state.checkpoint.name if state.checkpoint else None
            row = [hook, state.step, self.steps, checkpoint, sorted(state.metrics)]
            file.write(json.dumps(row) + "\\n")

    def on_start(self, state):
        self.write(state, "start")

    def before_step(self, state):
        self.write(state, "before")

    def after_step(self, state):
        self.steps += 1
        self.write(state, "after")
        state.stop_requested = self.steps == self.stop_after

    def metrics(self, state):
        return {"lab/steps": float(self.steps)}

    def on_end(self, state):
        self.write(state, "end")

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, saved):
        self.steps = saved["steps"]


class Failing(Callback):
    def after_step(self, state):
        raise RuntimeError("the laboratory burns")


class NoCallback:
    pass


def function():
    raise AssertionError("was called")
'''


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a distribution with callbacks, and a module that nobody registered."""
    site = tmp_path / "site"
    (site / "lab/training").mkdir(parents=True)
    (site / "lab/__init__.py").write_text("")
    (site / "lab/training/__init__.py").write_text(MODULE)
    mark = f"from pathlib import Path\nPath({str(tmp_path / 'imported')!r}).touch()\n"
    (site / "lab/secret.py").write_text(mark + MODULE)
    info = site / "lab_callbacks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-callbacks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[echolab.callbacks]\nrecorder = lab.training:Recorder\nlab = lab.training\n"
    )
    monkeypatch.syspath_prepend(str(site))
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return site


def words_of(data: Path, run: Path, target: str, **arguments: Any) -> list[str]:
    """Return the command of a run with one callback of the user's own."""
    clips, _ = encoded.write(data)
    given = ", ".join(f"{name}: {value!r}" for name, value in arguments.items())
    custom = f"callbacks.custom=[{{target: {target!r}, args: {{{given}}}}}]"
    return ["train", *encoded.SETTINGS, f"data.clips={clips}", f"run_dir={run}", custom]


def test_a_registered_callback_follows_each_step(lab: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "hooks.jsonl"
    words = words_of(tmp_path, run, "recorder", out=str(out), stop_after=2)
    plan = [encoded.plan(("sft", 3)), "save_every=1"]
    # The callback requests an end after step 2; the vote ends the run after step 3.
    assert main([*words, *plan]) == exit_codes.DONE
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row[:3] for row in rows] == [
        ["start", 0, 0], ["before", 0, 0], ["after", 1, 1], ["before", 1, 1], ["after", 2, 2],
        ["before", 2, 2], ["after", 3, 3], ["end", 3, 3],
    ]  # fmt: skip
    assert all("train/loss" in row[4] for row in rows if row[0] == "after")  # it was logged before
    assert rows[-1][3] == "step-000003"
    logged = [row for row in read_metrics(run / "metrics.jsonl") if "lab/steps" in row]
    assert [(row["step"], row["lab/steps"]) for row in logged] == [(1, 0), (2, 1), (3, 2)]
    # Saved before the callback acts on its step, and restored by the next attempt.
    saved = json.loads((run / "checkpoints/step-000003/state.json").read_text())
    assert saved["callbacks"] == {"lab.training:Recorder": {"steps": 2}}
    assert main([*words, encoded.plan(("sft", 4))]) == exit_codes.DONE
    rows = [json.loads(line) for line in out.read_text().splitlines()][len(rows) :]
    assert rows[0][:3] == ["start", 3, 2] and rows[-1][:3] == ["end", 4, 3]


def test_a_callback_ends_a_run_on_all_ranks(lab: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "hooks.jsonl"
    words = words_of(tmp_path, run, "lab.training:Recorder", out=str(out), stop_after=1)
    assert main([*words, encoded.plan(("sft", 5))]) != exit_codes.DONE
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[-1][:2] == ["end", 2]
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-000002"]


def test_an_error_of_a_callback_loses_no_step(lab: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = words_of(tmp_path, run, "lab.training:Failing")
    assert main([*words, encoded.plan(("sft", 3)), "save_every=1"]) != exit_codes.DONE
    metrics = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in metrics if "train/loss" in row] == [1]


REFUSED = {
    "os:system": "is neither below echolab.training.callbacks nor registered",
    "lab.secret:Recorder": "is neither below echolab.training.callbacks nor registered",
    "lab:Recorder": "is neither below echolab.training.callbacks nor registered",
    "lab.trainings:Recorder": "is neither below echolab.training.callbacks nor registered",
    "echolab.training.callbacksx:Callback": "is neither below",
    "echolab.training.fit:fit": "is neither below",
    "builtins:eval": "is neither below",
    "lab": "must be an import path package.module:Class",  # a namespace, no class
    "unknown": "must be an import path package.module:Class",
    "lab.training:Recorder.write": "must be an import path",
    "lab.training:Recorder()": "must be an import path",
    "../lab:Recorder": "must be an import path",
}


@pytest.mark.parametrize("target", REFUSED)
def test_other_targets_are_refused_before_any_import(
    lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    run = tmp_path / "run"
    assert main(words_of(tmp_path, run, target)) == exit_codes.FATAL
    message = capsys.readouterr().err
    assert message.startswith(f"echolab: error: callbacks.custom[0].target={target}: ")
    assert REFUSED[target] in message and message.count("\n") == 1
    assert not run.exists() and not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ("lab.training:Missing", {}, "cannot be imported"),
        ("lab.training.missing:Recorder", {}, "cannot be imported"),
        ("lab.training:NoCallback", {}, "is no subclass of"),
        ("lab.training:function", {}, "is no subclass of"),
        ("lab.training:OUT", {}, "is no subclass of"),
        ("recorder", {}, "does not take them"),
        ("recorder", {"out": "x", "colour": 1}, "does not take them"),
    ],
)
def test_registered_modules_hold_callbacks_only(
    lab: Path, target: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        callbacks_from({"custom": [{"target": target, "args": arguments}]})


def test_a_name_of_two_distributions_is_refused(lab: Path) -> None:
    info = lab / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[echolab.callbacks]\nrecorder = lab.secret:Recorder\n")
    with pytest.raises(ConfigError, match="several distributions register this name"):
        check_targets({"custom": [{"target": "recorder"}]})
    check_targets({"custom": [{"target": "lab.training:Recorder"}]})  # the full path is one object


def test_arguments_reach_the_callback(lab: Path) -> None:
    (callback,) = callbacks_from(
        {"custom": [{"target": "recorder", "args": {"out": "x", "stop_after": 3}}]}
    )
    state: Any = SimpleNamespace()
    assert callback.metrics(state) == {"lab/steps": 0.0}
    assert vars(callback) == {"out": Path("x"), "stop_after": 3, "steps": 0}
