"""The output path of a command is checked before the command's work."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.__main__ import main as prepare
from echolab.atomic_io import check_writable
from echolab.cli.__main__ import main
from echolab.errors import ConfigError


@pytest.mark.parametrize(
    ("where", "folder"),
    [("file/x", False), ("file/x", True), ("file/deep/x", True), ("folder", False),
     ("file", True), ("y" * 250, False), ("/proc/none/x", False), ("/dev/null/x", True)],
)  # fmt: skip
def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, where: str, folder: bool) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError) as raised:
        check_writable(tmp_path / where, folder=folder)
    assert str(raised.value).startswith(f"{tmp_path / where}: ") and "\n" not in str(raised.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_bytes() == b"kept"


@pytest.mark.parametrize("folder", [False, True])
def test_a_folder_is_created_and_left_empty(tmp_path: Path, folder: bool) -> None:
    out = tmp_path / "a/b/c"
    check_writable(out, folder=folder)
    assert (tmp_path / "a/b").is_dir() and not os.listdir(tmp_path / "a/b")
    out.write_bytes(b"old") if not folder else out.mkdir()
    check_writable(out, folder=folder)
    assert os.listdir(tmp_path / "a/b") == ["c"]
    assert folder or out.read_bytes() == b"old"


COMMANDS: list[tuple[Callable[[list[str]], int], list[str]]] = [
    (main, ["fit", "autoencoder", "nodata", "out={}/x.safetensors"]),
    (main, ["export", "norun", "out={}/x.safetensors"]),
    (main, ["export", "norun", "out={}/x"]),
    (main, ["pairs", "sample", "{}/x", "clips=nodata", "checkpoint=norun"]),
    (main, ["generate", "out={}/x.mp4", "task=t2v", "seconds=1"]),
    (prepare, ["draw", "{}/x"]),
    (prepare, ["encode", "nodata", "{}/x", "vae=none"]),
    (prepare, ["run", "novideos", "{}/x"]),
]


@pytest.mark.parametrize(("command", "words"), COMMANDS, ids=[words[0] for _, words in COMMANDS])
def test_every_command_checks_its_output_path_first(
    command: Callable[[list[str]], int], words: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "file").touch()
    assert command([word.format(tmp_path / "file") for word in words]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'file'}/x" in said and "cannot be written" in said, said
    assert said.count("\n") == 1
