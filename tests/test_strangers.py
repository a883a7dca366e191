"""Files of strangers: none is executed, none writes or is read elsewhere, none fills the memory."""

import os
import subprocess
import sys
from pathlib import Path

import encoded
import pytest

from echolab.data.shards import ShardWriter

# Modules that the interpreter, the libraries and the packages import, and some that they look for.
SHADOWS = (
    "secrets", "json", "csv", "random", "tarfile", "wave", "cmd", "torch", "numpy", "yaml", "av",
    "safetensors", "hydra_plugins", "flash_attn", "apex", "sitecustomize", "usercustomize",
)  # fmt: skip


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A working folder whose modules leave a trace when they are imported."""
    folder = tmp_path / "trap"
    folder.mkdir()
    for name in SHADOWS:
        code = f"open({str(tmp_path / 'executed')!r}, 'a').write({name!r} + ' ')\n"
        (folder / f"{name}.py").write_text(code)
    return folder


def run(words: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    whole = {**os.environ, "WANDB_MODE": "offline", **env}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=whole, capture_output=True, text=True, timeout=900
    )


def check_nothing_ran(done: subprocess.CompletedProcess[str], tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    assert not trace.exists(), trace.read_text()
    assert done.returncode == 0, done.stderr


ECHOLAB = str(Path(sys.executable).parent / "echolab")


@pytest.mark.slow
def test_a_run_executes_no_module_of_the_working_folder(trap: Path, tmp_path: Path) -> None:
    """Neither its ranks, nor their loader workers, nor wandb's service."""
    clips, _ = encoded.write(tmp_path / "data")
    words = [*encoded.SETTINGS, encoded.plan(("sft", 1)), f"data.clips={clips}", "data.workers=1"]
    done = run([ECHOLAB, "train", *words, "logger=wandb", f"run={tmp_path / 'run'}"], trap)
    check_nothing_ran(done, tmp_path)


@pytest.mark.slow
def test_nor_do_workers_that_are_spawned(trap: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data", kind="raw", samples_per_shard=1) as writer:
        for i in range(2):
            writer.write(f"clip-{i}", {"json": b"{}"})
    done = run([ECHOLAB, "data", "verify", str(tmp_path / "data"), "workers=2"], trap)
    assert "whole" in done.stdout or "has no" in done.stdout
    assert not (tmp_path / "executed").exists(), (tmp_path / "executed").read_text()


@pytest.mark.parametrize("words", [["-m", "data_prep", "draw", "--help"],
                                   ["-m", "echolab.cli", "train", "--help"],
                                   ["-m", "echolab.cli", "estimate", "model=demo"]])  # fmt: skip
def test_nor_does_a_command_itself(trap: Path, tmp_path: Path, words: list[str]) -> None:
    """What runpy imports before any module of ours is the user's own."""
    check_nothing_ran(run(words, trap), tmp_path)


@pytest.mark.parametrize(
    ("path", "stays"),
    [("", False), ("{other}:", False), (":{other}", False), ("{here}", True), (".", True)],
)
def test_only_a_named_working_folder_is_searched(tmp_path: Path, path: str, stays: bool) -> None:
    """An empty part of PYTHONPATH names nothing; children inherit what is left."""
    root = str(Path(__file__).resolve().parent.parent)
    program = (
        "import os, sys; from echolab.safe_path import leave_working_folder\n"
        "leave_working_folder()\n"
        "print(os.getcwd() in map(os.path.abspath, sys.path[:-1]), sys.flags.safe_path)\n"
        "if len(sys.argv) < 2: os.execv(sys.executable, [sys.executable, '-c', sys.argv.append('x')"
        " or open(os.environ['ME']).read(), 'x'])\n"
    )
    (tmp_path / "program").write_text(program)
    named = path.format(other=root, here=tmp_path)
    done = run(["-c", program], tmp_path, PYTHONPATH=named, ME=str(tmp_path / "program"))
    first, second = done.stdout.splitlines()
    assert (first, second) == (f"{stays} False", f"{stays} True"), done.stderr
