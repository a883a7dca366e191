"""Untrusted files: none is executed, none makes a command write or read elsewhere or exhaust
memory.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import encoded
import fault_server
import pytest

from echolab.data import download
from echolab.data.download import Expected, FetchError, RetryPolicy
from echolab.data.index import fingerprint
from echolab.data.shard_reader import open_dataset
from echolab.data.shard_writer import ShardWriter
from echolab.data.verify import verify
from echolab.errors import ConfigError, DataError, EcholabError
from echolab.launch import slurm

# Modules that the interpreter, the libraries and the packages import, and some that they look for.
SHADOWS = (
    "secrets", "json", "csv", "random", "tarfile", "wave", "cmd", "torch", "numpy", "yaml", "av",
    "safetensors", "hydra_plugins", "flash_attn", "apex", "sitecustomize", "usercustomize",
)  # fmt: skip


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """Make a working folder whose modules leave a trace when they are imported."""
    folder = tmp_path / "trap"
    folder.mkdir()
    for name in SHADOWS:
        code = f"open({str(tmp_path / 'executed')!r}, 'a').write({name!r} + ' ')\n"
        (folder / f"{name}.py").write_text(code)
    return folder


def run(words: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    full_environment = {**os.environ, "WANDB_MODE": "offline", **env}
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=full_environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def check_nothing_ran(done: subprocess.CompletedProcess[str], tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    assert not trace.exists(), trace.read_text()
    assert done.returncode == 0, done.stderr


ECHOLAB = str(Path(sys.executable).parent / "echolab")


@pytest.mark.slow
def test_a_run_executes_no_module_of_the_working_folder(trap: Path, tmp_path: Path) -> None:
    """The law holds for ranks, their loader workers, and wandb's service."""
    clips, _ = encoded.write(tmp_path / "data")
    words = [
        *encoded.SETTINGS,
        encoded.plan(("sft", 1)),
        f"data.clips={clips}",
        "data.num_workers=1",
    ]
    done = run([ECHOLAB, "train", *words, "logger=wandb", f"run_dir={tmp_path / 'run'}"], trap)
    check_nothing_ran(done, tmp_path)


@pytest.mark.slow
def test_spawned_workers_execute_no_module_of_the_working_folder(
    trap: Path, tmp_path: Path
) -> None:
    with ShardWriter(tmp_path / "data", kind="foreign", samples_per_shard=1) as writer:
        for i in range(2):
            writer.write(f"clip-{i}", {"json": b"{}"})
    done = run([ECHOLAB, "data", "verify", str(tmp_path / "data"), "workers=2"], trap)
    assert "complete" in done.stdout or "has no" in done.stdout
    assert not (tmp_path / "executed").exists(), (tmp_path / "executed").read_text()


@pytest.mark.parametrize("words", [["-m", "data_prep", "draw", "--help"],
                                   ["-m", "echolab.cli", "train", "--help"],
                                   ["-m", "echolab.cli", "estimate", "model=demo"]])  # fmt: skip
def test_a_command_executes_no_module_of_the_working_folder(
    trap: Path, tmp_path: Path, words: list[str]
) -> None:
    """runpy imports modules before any module of echolab."""
    check_nothing_ran(run(words, trap), tmp_path)


@pytest.mark.parametrize(
    ("path", "stays"),
    [("", False), ("{other}:", False), (":{other}", False), ("{here}", True), (".", True)],
)
def test_only_a_named_working_folder_is_searched(tmp_path: Path, path: str, stays: bool) -> None:
    """An empty part of PYTHONPATH names no folder; children inherit the rest."""
    root = str(Path(__file__).resolve().parent.parent)
    program = (
        "import os, sys; from echolab import remove_working_directory\n"
        "remove_working_directory()\n"
        "print(os.getcwd() in map(os.path.abspath, sys.path[:-1]), sys.flags.safe_path)\n"
        "if len(sys.argv) < 2: os.execv(sys.executable, [sys.executable, '-c', sys.argv.append('x')"
        " or open(os.environ['ME']).read(), 'x'])\n"
    )
    (tmp_path / "program").write_text(program)
    named = path.format(other=root, here=tmp_path)
    done = run(["-c", program], tmp_path, PYTHONPATH=named, ME=str(tmp_path / "program"))
    first, second = done.stdout.splitlines()
    assert (first, second) == (f"{stays} False", f"{stays} True"), done.stderr


def reindexed(folder: Path, change: Any) -> None:
    """Alter dataset.json, and the fingerprint that goes with it."""
    path = folder / "dataset.json"
    index = json.loads(path.read_text())
    change(index)
    head = index["kind"], index["encoders"], index["shards"]
    index["fingerprint"] = fingerprint(*head, index["samples"])
    path.write_text(json.dumps(index, separators=(",", ":")))


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    with ShardWriter(folder, kind="raw", samples_per_shard=2) as writer:
        for i in range(3):
            members = {"json": b'{"caption": "x"}', "mp4": bytes(500)}
            writer.write(f"clip-{i}", members | {"flac": b"", "tracks.npz": b""})
    return folder


@pytest.mark.parametrize(
    "key", ["../../x", "/etc/x", "a/b", "..", "", "a.b", "a\0b", "\x1b[31m", "a" * 81, "é", 3, None]
)
def test_untrusted_keys_are_checked_by_the_reader(foreign: Path, key: Any) -> None:
    reindexed(foreign, lambda index: index["samples"][0].update(key=key))
    with pytest.raises(DataError, match=r"dataset\.json: cannot be read") as error:
        open_dataset(foreign)
    assert str(error.value).isprintable()
    assert len(verify(foreign)) == 1


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/x"])
def test_keys_with_folders_are_written_below_the_output_folder(foreign: Path, key: str) -> None:
    def change(index: dict[str, Any]) -> None:
        index["kind"] = "foreign"
        index["samples"][0]["key"] = key

    reindexed(foreign, change)
    with pytest.raises(DataError, match="relative path"):
        open_dataset(foreign)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda i: i["samples"][0]["members"].update(mp4=[-512, 500, 0]), "outside its shard"),
        (lambda i: i["samples"][0]["members"].update(mp4=[0, 2**60, 0]), "outside its shard"),
        (lambda i: i["samples"][0]["members"].update(mp4=[2**62, 2**62, 0]), "outside its shard"),
        (lambda i: i["samples"][0]["members"].update(mp4=[2**70, 1, 0]), "cannot be read"),
        (lambda i: i["samples"][0]["members"].update(mp4=["a", 1, 0]), "cannot be read"),
        (lambda i: i["shards"][0].update(bytes=-1), "-1 bytes"),
        (lambda i: i["shards"][0].update(samples=-1), "-1 samples"),
        (lambda i: i["shards"][0].update(name="../x.tar"), "not a tar's name"),
        (lambda i: i.update(kind=["raw"]), "is not a string"),
        (lambda i: i.update(encoders=["a"]), "encoders is not a JSON object"),
        (lambda i: i.update(description=1), "description is not a JSON object"),
    ],
)
def test_untrusted_byte_offsets_are_checked_by_the_reader(
    foreign: Path, change: Any, what: str
) -> None:
    reindexed(foreign, change)
    with pytest.raises(DataError, match=what):
        open_dataset(foreign)


QUICK = RetryPolicy(attempts=2, stall_seconds=20.0, first_pause_seconds=0.01)


@pytest.mark.parametrize("right", [True, False])
def test_an_endless_answer_is_cut_at_the_declared_size(tmp_path: Path, right: bool) -> None:
    data = os.urandom(100_000)
    (tmp_path / "a.tar").write_bytes(data)
    expected = Expected(len(data), hashlib.sha256(data if right else b"").hexdigest())
    with fault_server.serving(tmp_path) as server, (tmp_path / "got").open("w+b") as file:
        server.always["a.tar"] = fault_server.endless
        if right:  # the first bytes are those that are wanted
            download.fetch(f"{server.url}/a.tar", file, expected, QUICK)
        else:
            with pytest.raises(FetchError, match="wrong bytes"):
                download.fetch(f"{server.url}/a.tar", file, expected, QUICK)
    assert (tmp_path / "got").stat().st_size == len(data)


@pytest.mark.parametrize("fault", [fault_server.endless, fault_server.announces(2**40)])
def test_an_endless_index_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: fault_server.Fault
) -> None:
    monkeypatch.setattr(download, "MAX_BYTES", 2**20)
    with fault_server.serving(tmp_path) as server:
        server.always["dataset.json"] = fault
        with pytest.raises(FetchError, match=r"dataset\.json: .*1048576"):
            open_dataset(server.url, cache_dir=tmp_path / "cache", retry_policy=QUICK)
        assert server.asked["dataset.json"] == 1


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1:9/x", "data:,x", "/loop"])
def test_redirects_lead_only_to_the_web(tmp_path: Path, url: str) -> None:
    with fault_server.serving(tmp_path) as server:
        server.always["dataset.json"] = server.always["loop"] = fault_server.sent_to(url)
        with pytest.raises(FetchError) as error:
            open_dataset(server.url, cache_dir=tmp_path / "cache", retry_policy=QUICK)
    assert str(error.value).isprintable() and "root:" not in str(error.value)


def test_errors_contain_no_terminal_control_codes() -> None:
    error = EcholabError("a\x1b]0;x\x07\n\r\x9b1m\u202eb \udc80 é\xa0ü")
    assert str(error) == "a\\x1b]0;x\\x07\\n\\r\\x9b1m\\u202eb \\udc80 é\xa0ü"


def test_jobs_of_a_sweep_execute_no_module_of_the_working_folder(
    trap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The jobs start as the script that submitit writes starts them."""
    from submitit.slurm.slurm import SlurmExecutor

    scripts: list[str] = []

    def refuse(executor: Any, command: str) -> None:
        scripts.append(executor._make_submission_file_text(command, "x"))
        raise RuntimeError("no Slurm here")

    monkeypatch.setattr(SlurmExecutor, "_submit_command", refuse)
    monkeypatch.setattr(SlurmExecutor, "affinity", classmethod(lambda _: 1))
    with pytest.raises(ConfigError, match="no Slurm here"):
        slurm.submit(print, [["a"]], {"submitit_folder": str(trap / "%j"), "timeout_min": 1})
    lines = scripts[0].splitlines()
    start = next(i for i, line in enumerate(lines) if "submitit.core._submit" in line)
    assert any("PYTHONSAFEPATH=1" in line for line in lines[:start])


def test_a_password_is_not_sent_to_another_server(tmp_path: Path) -> None:
    """The query is not sent either, which may be a signature."""
    seen: list[tuple[str, str | None]] = []

    def listen(answer: fault_server.Answer) -> None:
        seen.append((answer.path, answer.headers["Authorization"]))
        fault_server.complete(answer)

    with fault_server.serving(tmp_path) as one, fault_server.serving(tmp_path) as other:
        other.always["dataset.json"] = listen
        one.always["dataset.json"] = fault_server.sent_to(f"{other.url}/dataset.json")
        url = one.url.replace("://", "://user:password@")
        with pytest.raises(FetchError, match="HTTP 404"):
            open_dataset(f"{url}?sig=x", cache_dir=tmp_path / "cache", retry_policy=QUICK)
    assert seen == [("/dataset.json", None)]
