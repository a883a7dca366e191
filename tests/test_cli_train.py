"""`echolab train`: one command starts a run and resumes it; bad settings are one line."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import encoded
import pytest

from echolab.cli.__main__ import main
from echolab.cli.train_rank import train
from echolab.config.compose import compose
from echolab.config.folders import CONF
from echolab.errors import BusyError, ConfigError, EcholabError
from echolab.launch import exit_codes, processes, run_dir
from echolab.tracking.metrics import read_metrics

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    clips, pairs = encoded.write(tmp_path_factory.mktemp("encoded"))
    return [*encoded.SETTINGS, f"data.clips={clips}", f"data.pairs={pairs}"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("debug", [[], ["debug=cpu"]])
def test_every_experiment_composes(experiment: str, debug: list[str]) -> None:
    from echolab.config import build as objects

    # debug=cpu chooses the demo's transformer, which trains no SyncNet.
    network = ["model=syncnet_demo"] if debug and experiment.endswith("syncnet") else []
    words = [f"experiment={experiment}", "data.clips=x", "data.pairs=y", *debug, *network]
    config = compose(words)
    assert objects.schedule_from(config).steps > 0
    assert objects.curriculum_from(config["tasks"]).tasks
    assert objects.phases_from(config["phases"])
    on_cpu = bool(debug) or experiment == "real_smoke" or experiment.startswith("demo_")
    one_device = on_cpu or experiment == "syncnet"
    assert objects.machine_from(config["trainer"]).devices == (1 if one_device else 8)


def test_the_same_command_resumes_the_run(data: list[str], tmp_path: Path) -> None:
    words = ["train", *data, f"run_dir={tmp_path / 'run'}"]
    assert main([*words, encoded.plan(("sft", 2), ("ndpo", 2))]) == exit_codes.DONE
    first = json.loads((tmp_path / "run/run.json").read_text())
    assert main([*words, encoded.plan(("sft", 2), ("ndpo", 2), ("dpo", 1))]) == exit_codes.DONE
    assert json.loads((tmp_path / "run/run.json").read_text()) == first
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [(row["step"], row["attempt"]) for row in rows if "train/loss" in row] == [
        (1, 1), (2, 1), (3, 1), (4, 1), (5, 2),
    ]  # fmt: skip
    attempts = (tmp_path / "run/attempts.jsonl").read_text().splitlines()
    assert len(attempts) == 2 and "torch" in json.loads(attempts[0])["versions"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sede=1"], "sede=1: there is no such setting; did you mean seed?"),
        (["model=nothing"], "nothing"),
        (["data.clips=nowhere"], "nowhere/dataset.json: not there"),
        (["data.pairs=null", "schedule=dpo"], "data.pairs=null"),
        (["phases.mode=sing"], "phases.mode=sing: must be one of dropout, scale"),
        (["model.dim=wide"], "model.dim=wide: must be a whole number"),
        (["objective.beta=-1", "schedule=dpo"], "beta"),
        (["trainer.strategy=zero9", "schedule.epochs=[{kind:sft,steps:1}]"], "zero9"),
        (["init_from=nowhere"], "nowhere: no complete checkpoint"),
    ],
)
def test_bad_settings_are_one_line(
    data: list[str], tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(EcholabError, match=re.escape(message)) as error:
        train(compose([*data, f"run_dir={tmp_path / 'run'}", *words]))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["timeouts.save=0"], "timeouts.save=0: must be a number, above 0"),
        (["timeouts.save=soon"], "timeouts.save=soon: must be a number, above 0"),
        (["trainer.strategy=ddp", "trainer.num_nodes=2"], "start one task on each node by srun"),
    ],
)
def test_a_supervisor_that_cannot_start_says_so(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    words: list[str], message: str,
) -> None:  # fmt: skip
    assert main(["train", *data, f"run_dir={tmp_path / 'run'}", *words]) == exit_codes.FATAL
    said = capsys.readouterr().err
    assert said.startswith("echolab: error: ") and message in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cfg", "job", "sede=1"], "sede=1: there is no such setting; did you mean seed?"),
        (["--help", "model=nothing"], "model=nothing: must be one of demo"),
        (["--config-dir=x", "seed=1"], "--config-dir=x: no such folder"),
        (["-m", "-x", "seed=1,2"], "train: no option -x"),
        (["seed"], "seed: "),
    ],
)
def test_options_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["train", "data.clips=x", *words]) == exit_codes.FATAL
    said = capsys.readouterr()
    assert said.err.startswith(f"echolab: error: {message}") and said.err.count("\n") == 1
    assert not said.out


def test_an_error_of_a_rank_is_one_line_too(
    data: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["train", *data, f"run_dir={run}", f"init_from={tmp_path}"]
    assert main(words) == exit_codes.FATAL
    said = capfd.readouterr().err
    assert (
        said.startswith(f"echolab: error: {tmp_path}: no complete checkpoint")
        and said.count("\n") == 1
    )
    assert main(["why", str(run), "format=json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["cause"], report["exit_code"], report["requeue"]) == ("start", 1, False)


def test_the_supervisor_imports_no_torch() -> None:
    program = "import sys, echolab.cli.train, echolab.cli.why; print('torch' in sys.modules)"
    words = [sys.executable, "-c", program]
    assert subprocess.run(words, capture_output=True, check=True, text=True).stdout == "False\n"


def test_a_folder_belongs_to_one_run(data: list[str], tmp_path: Path) -> None:
    config: dict[str, Any] = {"seed": 1, "optim": {"eps": 1e-8}, "trainer": {"devices": 1}}
    with run_dir.claim(tmp_path / "run", config) as run:
        assert run.attempt == 1
        with (
            pytest.raises(BusyError, match="is using this run folder"),
            run_dir.claim(tmp_path / "run", config),
        ):
            pass
    with run_dir.claim(tmp_path / "run", {**config, "trainer": {"devices": 8}}) as again:
        assert again.id == run.id and again.attempt == 2
    with (
        pytest.raises(ConfigError, match=r"optim.eps=1e-08, now optim.eps=0.1"),
        run_dir.claim(tmp_path / "run", {**config, "optim": {"eps": 0.1}}),
    ):
        pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with (
        pytest.raises(ConfigError, match="holds files, and no run"),
        run_dir.claim(tmp_path / "mine", config),
    ):
        pass


def test_a_second_start_of_an_active_run_is_refused_without_a_trace(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command may succeed later, so the refusal blames no setting."""
    run = tmp_path / "run"
    with run_dir.held(run):
        before = sorted(run.rglob("*"))
        assert main(["train", *data, f"run_dir={run}"]) == exit_codes.RETRYABLE
        assert sorted(run.rglob("*")) == before
    said = capsys.readouterr().err
    assert said.startswith("echolab: error: ") and said.count("\n") == 1
    assert "is using this run folder; wait for its end" in said


def test_one_of_many_simultaneous_starts_creates_the_run(tmp_path: Path) -> None:
    def start(_: int) -> str:
        try:
            with run_dir.claim(tmp_path / "run", {"seed": 1}) as run:
                return run.id
        except BusyError as error:
            assert "is using this run folder" in str(error)
            return ""

    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(start, range(32))) - {""}) == 1


@pytest.mark.slow
def test_ranks_end_together_with_a_reason(tmp_path: Path) -> None:
    program = "import os, sys, time; r = os.environ['RANK']; {}"
    fails = program.format("sys.exit(3) if r == '1' else time.sleep(60)")
    before, processes.GRACE_SECONDS = processes.GRACE_SECONDS, 0.5
    try:
        assert processes.run_ranks([sys.executable, "-c", fails], 2) == 3
    finally:
        processes.GRACE_SECONDS = before
    fine = program.format("assert os.environ['WORLD_SIZE'] == '2'")
    assert processes.run_ranks([sys.executable, "-c", fine], 2) == 0


@pytest.mark.parametrize("experiment", ["dpo", "ndpo"])
def test_a_preference_experiment_continues_the_curriculum_of_its_start(
    data: list[str], tmp_path: Path, experiment: str
) -> None:
    """The shipped settings of sft are run to their end, then those of `experiment` from there,
    without steps.
    """
    from echolab.config import build as objects

    sft = compose(["experiment=sft", "data.clips=x"])
    steps = objects.schedule_from(sft).steps
    finished = objects.curriculum_from(sft["tasks"])
    assert main(["train", *data, f"run_dir={tmp_path / 'sft'}", encoded.plan(("sft", 1))]) == 0
    path = next((tmp_path / "sft/checkpoints").glob("step-*"))
    seal_curriculum(path, finished.state_dict(steps))
    words = [*data, f"experiment={experiment}", "debug=cpu", "model=demo", "model.dim=64"]
    words += ["model.ffn_dim=64", "model.num_layers=1", f"run_dir={tmp_path / 'run'}"]
    config = compose([*words, f"init_from={tmp_path / 'sft'}"])
    assert config["tasks"] == sft["tasks"]
    training = objects.train_config_from(config, "")
    for step in range(training.schedule.steps):
        if training.schedule.locate(step).epoch.kind == "sft" and step % 50 == 0:
            counted = training.schedule.supervised_steps(step)
            probabilities = training.curriculum.probabilities(counted)
            assert probabilities["t2v"] < 0.3 and probabilities["lip_sync"] > 0.15
    again = objects.train_config_from({**config, "tasks": {**config["tasks"], "restart": True}}, "")
    assert again.curriculum.probabilities(0)["t2v"] == 1.0


def seal_curriculum(path: Path, state: dict[str, Any]) -> None:
    """Rewrite the curriculum of a checkpoint."""
    from echolab.training.checkpoints.manifest import serialize
    from echolab.training.checkpoints.writer import write_file

    content = json.loads((path / "state.json").read_text())
    text = json.dumps({**content, "curriculum": {**state, "step": 0, "before": state["step"]}})
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("sha256")
    manifest["files"]["state.json"] = write_file(path / "state.json", [text.encode()])
    (path / "manifest.json").write_bytes(serialize(manifest))
