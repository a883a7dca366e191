"""A user's folder of settings comes first, and echolab's own settings are part of the wheel."""

import json
import os
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

import encoded
import pytest

from echolab.cli.__main__ import main
from echolab.cli.train import command
from echolab.config.compose import compose, compose_both
from echolab.config.folders import CONF, with_absolute_folder
from echolab.config.sweep_members import launcher_of, members
from echolab.errors import ConfigError
from echolab.launch import exit_codes

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    "experiment/mine.yaml": "# @package _global_\n"
    "defaults:\n  - override /optim: mine\n  - override /model: small\n"
    "run_dir: runs/mine\nschedule: {epochs: [{kind: sft, steps: 2}], warmup: 1}\n",
    "optim/mine.yaml": "# Mine.\ndefaults: [adamw, _self_]\nlr: 3.0e-4\n",
    "model/small.yaml": "defaults: [demo, _self_]\ndim: 64\nffn_dim: 64\nnum_layers: 1\n",
    "phases/flat.yaml": "# In the place of the shipped one.\nschedule: flat\nmode: scale\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder whose path has every character that needs quoting."""
    made = tmp_path / "my conf, a=b #1 ü's"
    for name, text in FILES.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(text)
    return made


def test_a_folder_comes_before_the_shipped_one(folder: Path) -> None:
    words = with_absolute_folder(["data.clips=x", "--config-dir", str(folder)])
    assert words == [f"--config-dir={folder}", "data.clips=x"]
    config = compose([*words, "experiment=mine", "phases=flat"])
    assert config["optim"]["lr"] == 3e-4 and config["optim"]["betas"] == [0.9, 0.999]
    assert config["model"]["dim"] == 64 and config["model"]["text_dim"] == 32
    assert config["phases"]["mode"] == "scale" and config["run_dir"] == "runs/mine"
    assert compose(["data.clips=x", "phases=flat"])["phases"]["mode"] == "dropout"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-dir", "nowhere"], "--config-dir=nowhere: no such folder"),
        (["--config-dir"], "--config-dir=: no such folder"),
        (["--config-dir", str(CONF), f"--config-dir={CONF}"], "is given twice"),
    ],
)
def test_a_wrong_folder_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_absolute_folder(words)


def test_members_of_a_sweep_and_their_jobs_get_the_folder(folder: Path) -> None:
    words = with_absolute_folder(
        ["-m", "data.clips=x", f"--config-dir={folder}", "experiment=mine", "optim=mine,adamw"]
    )
    swept = members([word for word in words if word != "-m"], compose_both)
    assert [member.config["optim"]["lr"] for member in swept] == [3e-4, 2e-5]
    for member in swept:
        assert f"--config-dir={folder}" in member.words
        assert compose(member.words)["model"]["dim"] == 64
        assert str(launcher_of(member.overrides)["_target_"]).endswith("BasicLauncher")
    globbed = members([words[0], "data.clips=x", "optim=glob(*)"], compose_both)
    assert {member.config["optim"]["lr"] for member in globbed} == {3e-4, 2e-5}


def test_help_and_cfg_read_the_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help", f"--config-dir={folder}", "optim"]) == 0
    assert "mine   Mine" in capsys.readouterr().out
    done = subprocess.run(
        [*command(["--config-dir", str(folder), "experiment=mine"]), "--cfg", "job",
         "--package", "run_dir"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "runs/mine"


@pytest.mark.slow
def test_ranks_get_the_folder(folder: Path, tmp_path: Path) -> None:
    clips, _ = encoded.write(tmp_path)
    words = ["debug=cpu", f"data.clips={clips}", f"run_dir={tmp_path / 'run'}", "optim=mine"]
    words += ["model=small", "schedule.epochs=[{kind:sft,steps:1}]"]
    done = subprocess.run(
        command(["--config-dir", folder.name, *words]), cwd=folder.parent, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == exit_codes.DONE, done.stderr
    assert json.loads((tmp_path / "run/config.json").read_text())["optim"]["lr"] == 3e-4


@pytest.mark.slow
def test_the_wheel_contains_the_settings(tmp_path: Path) -> None:
    """An installation without the repository has the same help and composes the same settings."""
    source = tmp_path / "source"
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "echolab", "data_prep", "conf"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    for name in [*names.strip("\0").split("\0"), "pyproject.toml", "README.md", "LICENSE"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (source / name).symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).is_file():
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob(f"echolab-{version('echolab')}-*.whl")
    venv.create(tmp_path / "venv")
    target = next((tmp_path / "venv/lib").iterdir()) / "site-packages"
    install = [*pip, "install", "-q", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    # The packages that echolab needs are those of this environment, after its own.
    others = "\n".join(p for p in sys.path if p.endswith("site-packages"))
    (target / "others.pth").write_text(others + "\n")

    def installed(*words: str) -> str:
        python = str(tmp_path / "venv/bin/python")
        done = subprocess.run(
            [python, "-m", "echolab.cli", "train", *words], cwd=tmp_path, capture_output=True,
            text=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "optim.lr FLOAT" in installed("--help")
    words = ["debug=cpu", "experiment=sft", "data.clips=x", "--cfg", "job", "--resolve"]
    here = subprocess.run(command(words), capture_output=True, text=True, check=True).stdout
    assert installed(*words) == here
    code = "import echolab.config.folders as f; print(f.CONF)"
    place = subprocess.run(
        [str(tmp_path / "venv/bin/python"), "-c", code], cwd=tmp_path, capture_output=True,
        text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert Path(place) == target / "echolab/conf"
