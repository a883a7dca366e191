"""A sweep: every member has its own folder, none stops another, and the same command resumes."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import encoded
import pytest

from echolab.cli import sweep
from echolab.cli.__main__ import main
from echolab.config.compose import compose, compose_both
from echolab.config.sweep_members import Member, launcher_of, members, name_of, without_signature
from echolab.errors import ConfigError
from echolab.launch import exit_codes
from echolab.launch.run_dir import FORMAT
from echolab.tracking.metrics import read_metrics
from echolab.training.guards import events

CLIPS = "data.clips=x"
EPOCHS = "schedule.epochs=[{kind:sft,steps:STEPS}]"
SHORT, LONG = (EPOCHS.replace("STEPS", steps) for steps in ("1", "2"))


def made(*words: str) -> list[Member]:
    return members([CLIPS, *words], compose_both)


def names(*words: str) -> list[str]:
    return [member.name for member in made(*words)]


@pytest.mark.parametrize(
    ("swept", "count"),
    [
        ("seed=0,1", 2),
        ("seed=range(0,3)", 3),
        ("seed=choice(4,5)", 2),
        (f"{SHORT},{LONG.partition('=')[2]}", 2),
        ("data.clips=a,b", 2),
        ("data.clips=[a,b],[a],c", 3),
        ("pretrained=a/b,a-b", 2),
        ("pretrained=a/b,a_b,null,'a,b'", 4),
        ("experiment=sft,dpo", 2),
        ("trainer=ddp,zero2", 2),
        ("trainer.precision=32-true,bf16-mixed", 2),
        ("data.num_workers=0,2", 2),
        ("data.cache_dir=/a/b,/a-b", 2),
        ("logger=none,wandb", 2),
        ("logger.project=a/b,a-b", 2),
        ("timeouts.save=700,800", 2),
        ("model=glob(wan*)", 2),
        ("+model.eps=1e-6,1e-5", 2),
        ("++seed=1,2", 2),
        ("phases=phda,flat", 2),
        ("run_dir=runs/a,runs/b", 2),
        ("pretrained=${oc.env:HOME,x}/a,${oc.env:HOME,x}/b", 2),
        ("pretrained=" + ",".join("/data" + "/long" * 50 + end for end in "ab"), 2),
    ],
)
def test_swept_values_are_always_in_the_name(swept: str, count: int) -> None:
    result = made("flow_shift=4", "optim.eps=1e-9", "data.pairs=p", swept)
    key = swept.partition("=")[0].lstrip("+")
    assert len({member.name for member in result}) == len(result) == count
    assert len({member.folder for member in result}) == count
    for member in result:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*-[0-9a-f]{10}", member.name)
        assert member.name.startswith(f"{key}-") and len(member.name) < 120
        assert "shift" not in member.name and "optim" not in member.name
        config = compose(member.words)
        assert Path(config.pop("run_dir")) == member.folder
        assert config == {k: v for k, v in member.config.items() if k != "run_dir"}


def test_a_member_keeps_its_name() -> None:
    once = names("seed=0,1", "trainer=cpu,ddp")
    assert names("trainer=cpu,ddp", "seed=0,1") != once  # another order of members
    assert set(names("trainer=cpu,ddp", "seed=0,1")) == set(once)
    assert set(once) < set(names("seed=0,1,7", "trainer=zero2,cpu,ddp"))
    # Not of the run: where it is kept, and how it is watched.
    again = names("seed=0,1", "trainer=cpu,ddp", "log_every=3", "logger=none", "run_dir=elsewhere")
    assert again == once
    assert not set(names("seed=0,1", "trainer=cpu,ddp", "flow_shift=4")) & set(once)


def test_names_show_the_ends_of_long_values() -> None:
    long = "/data/" + "common/" * 40
    result = names("optim.eps=1e-8,1e-7", f"pretrained={long}first.pth,{long}second.pth")
    assert ["first.pth" in name for name in result] == [True, False] * 2
    assert all("optim.eps-1e-0" in name for name in result)
    many = [f"model.{key}=64,128" for key in ("dim", "ffn_dim", "text_dim", "image_dim")]
    shown = [name.rpartition("-")[0] for name in names(*many)]  # without the hash
    assert all(name.count("-64") + name.count("-128") == 4 for name in shown)


def test_two_spellings_of_a_path_give_one_member(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "enc").mkdir()
    (tmp_path / "link").symlink_to("enc")
    spelled = ["enc", "enc/", "./enc", str(tmp_path / "enc"), "link", "[enc]"]
    result = [members([f"data.clips={path}", "seed=0,1"], compose_both) for path in spelled]
    assert len({member.name for one in result[:-1] for member in one}) == 2
    with pytest.raises(ConfigError, match=r"data.clips.*: two members have these settings"):
        members(["data.clips=enc,enc/"], compose_both)


SECRETS = (
    "https://user:PASSWORD@host/d/a?X-Amz-Signature=SECRET&X-Amz-Credential=WHO",
    "https://user:PASSWORD@host/d/b?X-Amz-Signature=SECRET&X-Amz-Credential=WHO",
)


def test_a_name_contains_no_secret() -> None:
    result = names(f"data.val_clips={SECRETS[0]},{SECRETS[1]}")
    assert result[0].startswith("data.val_clips-host-d-a-")
    assert not [name for name in result if re.search("PASSWORD|SECRET|WHO|user", name)]
    renewed = [address.replace("SECRET", "OTHER") for address in SECRETS]
    assert names(f"data.val_clips={renewed[0]},{renewed[1]}") == result
    assert without_signature("s3://a/b?part=1") == "s3://a/b?part=1"
    assert "hunter" not in name_of(made()[0].config, {"+logger.api_key": "hunter2"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sede=1,2"], "sede"),
        (["seed=1,2", "optim.epps=1"], "epps"),
        (["model=demo,nothing"], "model=nothing: must be one of"),
        (["experiment=nothing", "seed=1,2"], "experiment=nothing: must be one of"),
        (["seed=1,1"], "seed=1,1"),
        (["optim.eps=1e-8,0.00000001"], "optim.eps=1e-8"),
        (["seed=interval(0,1)"], "seed=interval(0,1)"),
        (["seed=(1,2"], "seed=(1,2"),
        (["seed"], "seed"),
        (["launcher=slurm,local"], "launcher"),
        (["hydra.launcher.partition=a,b", "launcher=slurm"], "hydra.launcher.partition"),
        (["seed=1,2", "--config-dir=x"], "--config-dir"),
        (["data.clips=???", "seed=1,2"], "data.clips"),
    ],
)
def test_a_sweep_is_refused_before_the_first_member_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["train", "-m", CLIPS, *words]) == exit_codes.FATAL
    said = capsys.readouterr()
    assert said.err.startswith("echolab: error: ") and said.err.count("\n") == 1
    assert message in said.err and not said.out and not list(tmp_path.iterdir())


# -- how members end, with a command that stands for `echolab train` ------------------------------

PROGRAM = """
import json, os, signal, sys, time
code = dict(word.split("=", 1) for word in sys.argv[1:])["seed"]
open(code, "a").close()
if code == "60":
    stopped = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, frame: stopped.append(n))
    open("ready", "a").close()
    while not stopped:
        time.sleep(0.05)
    sys.exit(75)
if code == "9":
    os.kill(os.getpid(), 9)
sys.exit(int(code))
"""


def swept(*words: str) -> int:
    return sweep.run(made(*words), lambda own: [sys.executable, "-c", PROGRAM, *own], print)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ("0,78", exit_codes.DONE),
        ("1,0,78", exit_codes.FATAL),
        ("77,1,0", exit_codes.RETRYABLE),
        ("9,0", exit_codes.RETRYABLE),
        ("0,75,1,77", exit_codes.STOPPED_SAVED),
        ("3,0", exit_codes.RETRYABLE),
    ],
)
def test_no_member_stops_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    codes: str, expected: int,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert swept(f"seed={codes}") == expected
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == set(codes.split(","))
    said = capfd.readouterr()
    table = said.out.partition(f"a sweep of {codes.count(',') + 1}:\n")[2].splitlines()
    well = [line.split("-")[1] in ("0", "78") for line in table]
    assert len(table) == codes.count(",") + 1 and well == sorted(well, reverse=True)
    assert ("are not done" in said.err) == (expected != 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_running_member_and_the_sweep(
    tmp_path: Path, number: signal.Signals
) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_sweep
sys.exit(test_sweep.swept("seed=0,60,1"))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 120
    while not (tmp_path / "ready").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == exit_codes.STOPPED_SAVED
    assert not (tmp_path / "1").exists() and "not started" in out.splitlines()[-1]


# -- in Slurm -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("trainer=ddp", {"gpus_per_node": 8, "cpus_per_task": 2, "tasks_per_node": 8}),
        ("trainer=ddp data.num_workers=4 trainer.num_nodes=2", {"cpus_per_task": 6, "nodes": 2}),
        ("trainer=gpu data.num_workers=4", {"gpus_per_node": 1, "cpus_per_task": 6}),
        ("trainer=cpu", {"gpus_per_node": None, "cpus_per_task": 2}),
        # One task a node starts all ranks of it.
        (
            "trainer=ddp hydra.launcher.tasks_per_node=1 data.num_workers=1",
            {"gpus_per_node": 8, "cpus_per_task": 24, "tasks_per_node": 1},
        ),
        # What the user gives stays.
        ("trainer=ddp hydra.launcher.gpus_per_node=4", {"gpus_per_node": 4}),
        ("trainer=ddp hydra.launcher.gpus_per_node=0", {"gpus_per_node": None}),
        ("trainer=ddp hydra.launcher.gres=gpu:a100:8", {"gpus_per_node": None}),
        ("trainer=ddp hydra.launcher.gpus_per_task=1", {"gpus_per_node": None}),
        ("trainer=ddp +hydra.launcher.additional_parameters.gpus=8", {"gpus_per_node": None}),
        ("trainer=ddp hydra.launcher.cpus_per_task=9", {"cpus_per_task": 9, "gpus_per_node": 8}),
        ("trainer=ddp hydra.launcher.cpus_per_gpu=9", {"cpus_per_task": None}),
    ],
)
def test_a_job_requests_the_gpus_and_cpus_of_its_ranks(
    words: str, expected: dict[str, Any]
) -> None:
    overrides = [CLIPS, "launcher=slurm", *words.split()]
    asked = sweep.slurm_parameters(compose(overrides), launcher_of(overrides))
    assert {key: asked[key] for key in expected} == expected
    assert asked["additional_parameters"]["requeue"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hydra/launcher=submitit_slurm"], "give launcher=local or launcher=slurm"),
        (["hydra/launcher=submitit_local"], "give launcher=local or launcher=slurm"),
        (
            ["launcher=slurm", "pretrained=https://a:PASSWORD1@host/w"],
            "Slurm would keep its secret",
        ),
    ],
)
def test_other_launchers_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        swept("seed=1,2", *words)
    assert "PASSWORD1" not in str(error.value)


def test_missing_slurm_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="launcher=slurm: .*srun.*; start the sweep on a host"):
        swept("seed=1,2", "launcher=slurm")


# -- real members ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    clips, _ = encoded.write(tmp_path_factory.mktemp("encoded"))
    return [*encoded.SETTINGS, f"data.clips={clips}"]


def attempts(member: Member) -> int:
    path = member.folder / "attempts.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_a_sweep_continues_past_diverged_and_pruned_members(
    data: list[str], tmp_path: Path
) -> None:
    """In a second sweep done, diverged and pruned members stay, and a rolled back one resumes."""
    words = [*data, f"run_dir='{tmp_path}/a sweep, #1 (x=y)'",
    "schedule.epochs=[{kind:sft,steps:3}]",
             "optim.lr=1e30,1e-3,1e-4"]  # fmt: skip
    result = members(words, compose_both)
    diverging, plain, pruned = result
    pruned.folder.mkdir(parents=True)
    (pruned.folder / "PRUNE").touch()
    (pruned.folder / "run.json").write_text(
        json.dumps({"format": FORMAT, "id": "pruned", "made": 0.0})
    )
    (pruned.folder / "config.json").write_text(
        json.dumps({**pruned.config, "run_dir": str(pruned.folder)})
    )

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "echolab.cli", "train", "-m", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=900)

    first = run()
    assert first.returncode == exit_codes.FATAL
    assert first.stdout.splitlines()[-1].split()[:2] == [diverging.name, "diverged:"]
    assert f"{pruned.name}  pruned:" in re.sub(" +", "  ", first.stdout)
    assert read_metrics(plain.folder / "metrics.jsonl")[-1]["step"] == 3
    configs = [json.loads((member.folder / "config.json").read_text()) for member in result]
    assert [config["run_dir"] for config in configs] == [str(member.folder) for member in result]
    made_now = [attempts(member) for member in result]
    again = run()
    assert again.returncode == exit_codes.FATAL and again.stdout.count("not started again") == 3
    assert [attempts(member) for member in result] == made_now
    assert sweep.settled(diverging) and sweep.settled(plain)
    events.append(diverging.folder, 3, "rollback", by="command", to=0, skip=None)
    shutil.rmtree(plain.folder / "checkpoints")
    assert not sweep.settled(diverging) and not sweep.settled(plain)
