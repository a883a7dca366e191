"""No command ends in a traceback because a terminal cannot show a name.

Characters that the encoding lacks are written as escapes.
"""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import small_run

from data_prep.__main__ import main as prepare
from echolab.cli.__main__ import main

PLAIN_C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ENVIRONMENTS = {
    "ascii": {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    "latin-1": {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"},
    "c": PLAIN_C,
    "utf-8": {"PYTHONUTF8": "1"},
}
NAMES = {"accents": "läuft-für-Zoë", "other script": "走る", "no text": os.fsdecode(b"l\xe4uft")}


def on_ascii(*commands: Callable[[], int]) -> tuple[list[int], bytes]:
    """Return exit codes of commands, and their output on an ASCII terminal."""
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii", write_through=True)
    with redirect_stdout(stream), redirect_stderr(stream):
        return [command() for command in commands], written.getvalue()


def run_folder(folder: Path) -> Path:
    """Write the files that a report reads."""
    folder.mkdir()
    row = {"step": 1, "attempt": 1, "time": 1.0, "train/loss": 2.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=list(ENVIRONMENTS))
def test_a_report_with_any_name_is_written_and_printed(
    tmp_path: Path, name: str, environment: dict[str, str]
) -> None:
    run = run_folder(tmp_path / name)
    for _ in range(2):  # the second from report.json
        done = subprocess.run(
            [sys.executable, "-P", "-m", "echolab.cli", "report", os.fsencode(run)],
            env={**os.environ, **environment}, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0 and b"report.html" in done.stdout, done.stderr
        assert b"Traceback" not in done.stderr
        assert (run / "report.html").read_bytes().startswith(b"<!doctype html>")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> small_run.SmallRun:
    return small_run.make(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
def test_a_video_with_any_name_is_written_and_printed(
    tmp_path: Path, made: small_run.SmallRun, name: str
) -> None:
    out = tmp_path / f"{name}.mp4"
    words = [f"checkpoint={made.run}", f"vae={made.video}", "num_steps=1", "seconds=0.2"]
    codes, said = on_ascii(lambda: main(["generate", *words, "task=t2v", f"out={out}"]))
    assert codes == [0] and out.stat().st_size and b".mp4: 5 frames" in said


@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
def test_errors_and_summaries_show_names(tmp_path: Path, name: str) -> None:
    there, none = tmp_path / name, tmp_path / f"none-{name}"
    codes, said = on_ascii(
        lambda: prepare(["draw", str(there), "num_clips=1", "frames=5", "size=32"]),
        lambda: main(["data", "verify", str(there)]),
        lambda: main(["data", "verify", str(none)]),
        lambda: main(["why", str(none)]),
        lambda: main(["train", f"run_dir='{none}'", "data.clips=x", "batch_size=0"]),
        lambda: main(["export", str(none), f"out={none}.safetensors"]),
        lambda: main(["report", str(none)]),
    )
    assert codes == [0, 0, 1, 1, 1, 1, 1]
    assert said.isascii() and b"Traceback" not in said and b"\\" in said
    assert said.count(b"echolab: error: ") == 4
