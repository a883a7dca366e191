"""Secrets are given to commands in every way, and none is in their output or files.

`ps` shows a secret only if the user typed it on the command line.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import encoded
import fault_server
import pytest

from echolab.config.compose import compose_both
from echolab.config.stored import resolved
from echolab.errors import ConfigError
from echolab.launch import rank_process

PASSWORD, SIGNATURE, TOKEN = "c4nary-p4ssw0rd", "c4nary-s1gn4ture", "c4nary-t0ken"
SETTING = "c4nary-s3tting"
CANARIES = (PASSWORD, SIGNATURE, TOKEN, SETTING)
ENV = {"HF_TOKEN": TOKEN, "DATA_PASSWORD": PASSWORD, "DATA_SIG": SIGNATURE, "NAME": SETTING}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fault_server.FaultServer]:
    clips, _ = encoded.write(tmp_path_factory.mktemp("encoded"))
    with fault_server.serving(clips) as server:
        yield server


def run(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command with secrets in its environment; assert that its output has none."""
    done = subprocess.run(
        [sys.executable, "-m", "echolab.cli", *words], cwd=cwd, capture_output=True, text=True,
        timeout=900, env={**os.environ, **ENV, "WANDB_MODE": "offline", "no_proxy": "127.0.0.1"},
    )  # fmt: skip
    check(done.stdout + done.stderr, cwd)
    assert "Traceback" not in done.stderr
    return done


def check(said: str, folder: Path) -> None:
    """Assert that no canary is in words, or in names and bytes of files."""
    for canary in CANARIES:
        assert canary not in said
        for path in folder.rglob("*"):
            assert canary not in path.name
            assert path.is_dir() or canary.encode() not in path.read_bytes(), path


def address(server: fault_server.FaultServer, password: str, signature: str) -> str:
    host = server.url.removeprefix("http://")
    return f"http://me:{password}@{host}?X-Amz-Date=1&X-Amz-Signature={signature}"


def settings(server: fault_server.FaultServer, url: str) -> list[str]:
    return ["train", *encoded.SETTINGS, encoded.plan(("sft", 2)), "run_dir=run",
            f'data.clips="{url}"', "data.cache_dir=cache", "logger=wandb"]  # fmt: skip


@pytest.mark.slow
def test_a_run_stores_no_secret_and_resumes_with_other_secrets(
    server: fault_server.FaultServer, tmp_path: Path
) -> None:
    """A secret is typed once, with two ranks; the run resumes with another signature, and is
    replayed.
    """
    url = address(server, PASSWORD, SIGNATURE)
    words = [*settings(server, url), "logger.project=${oc.env:HF_TOKEN}", "trainer.devices=2",
             "trainer.strategy=ddp", "data.log_samples=true"]  # fmt: skip
    assert run(words, tmp_path).returncode == 0
    kept = json.loads((tmp_path / "run/config.json").read_text())
    assert kept["data"]["clips"] == f"http://***@{server.url.removeprefix('http://')}?***"
    assert kept["logger"]["project"] == "${oc.env:HF_TOKEN}"
    assert list((tmp_path / "run/wandb").rglob("*.wandb"))

    again = settings(server, address(server, "c4nary-p4ssw0rd-2", "c4nary-s1gn4ture-2"))
    longer = [encoded.plan(("sft", 3)) if "epochs" in word else word for word in again]
    assert run([*longer, *words[len(again) :]], tmp_path).returncode == 0

    replay = ["replay", "run", "step=1"]
    refused = run(replay, tmp_path)
    assert refused.returncode == 1 and "give clips=ADDRESS" in refused.stderr
    refused = run([*replay, f"clips={url}"], tmp_path)
    assert refused.returncode == 1 and "give env=HF_TOKEN" in refused.stderr
    assert run([*replay, f"clips={url}", "env=HF_TOKEN"], tmp_path).returncode == 0


@pytest.mark.slow
def test_interpolations_are_stored_unresolved(
    server: fault_server.FaultServer, tmp_path: Path
) -> None:
    url = address(server, "${oc.env:DATA_PASSWORD}", "${oc.env:DATA_SIG}")
    words = [*settings(server, url.replace("X-Amz-Date=1&", "")), "seed=${oc.env:COUNT}"]
    command = [sys.executable, "-m", "echolab.cli", *words]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, **ENV, "COUNT": "7", "WANDB_MODE": "offline"},
    ) as process:  # fmt: skip
        seen = list(arguments_below(process))
        said = process.stdout.read() if process.stdout else ""
    assert process.returncode == 0, said
    check(said + " ".join(seen), tmp_path)
    assert any("oc.env:DATA_PASSWORD" in one for one in seen)
    kept = json.loads((tmp_path / "run/config.json").read_text())
    assert kept["data"]["clips"] == url.replace("X-Amz-Date=1&", "")
    assert kept["seed"] == 7  # what was trained can be read
    replay = ["replay", "run", "step=2", "env=DATA_PASSWORD,DATA_SIG"]
    assert run(replay, tmp_path).returncode == 0


def arguments_below(process: subprocess.Popen[str]) -> Iterator[str]:
    """Return the command lines of all processes of a session's tree, as `ps` shows them, until
    its end.
    """
    while process.poll() is None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if "DATA_PASSWORD" in line or any(canary in line for canary in CANARIES):
                    yield line
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["train", "data.clips={url}/missing", "timeouts.init=x"], 1),
        (["train", "data.clips={url}", "run_dir={url}"], 1),
        (["train", "data.clips={url}", "sede=${{oc.env:HF_TOKEN}}"], 1),
        (["train", "data.clips={url}", "trainer.devices=${{oc.env:HF_TOKEN}}"], 1),
        (["train", "-m", "launcher=slurm", "data.clips={url}", "seed=1,2"], 1),
        (["train", "data.clips={url}", "--cfg", "job", "--resolve"], 0),
        (["data", "verify", "{url}"], 1),
        (["fit", "autoencoder", "{url}", "out=net.safetensors"], 77),  # no server: may pass
        (["evaluate", "{url}"], 1),
        (["report", "{url}"], 1),
        (["why", "{url}"], 1),
        (["checkpoint", "inspect", "{url}"], 1),
        (["generate", "image={url}", "audio=a", "out=b"], 1),
        (["no-such-{url}"], 2),
        (["pairs", "sample", "x", "policy={url}"], 1),
    ],
)
def test_no_error_contains_a_secret(tmp_path: Path, words: list[str], code: int) -> None:
    """The server refuses; its answer and our error contain the URL."""
    url = f"http://me:{PASSWORD}@127.0.0.1:9/d?sig={SIGNATURE}"
    quoted = f'"{url}"' if words[0] == "train" else url
    done = run([word.format(url=quoted) for word in words], tmp_path)
    assert done.returncode == code, done.stderr


def test_a_ranks_error_file_contains_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        raise ValueError(f"401 for https://me:{PASSWORD}@host/d?sig={SIGNATURE} with {TOKEN}")
    except ValueError as error:
        rank_process.write_error_file(tmp_path, 0, error, "step", 3)
    check("", tmp_path)
    assert "401 for https://***@host/d?*** with ***" in (tmp_path / "rank-0.error.json").read_text()


def test_an_interpolated_setting_is_stored_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)
    words = ["data.clips=${oc.env:NAME}/clips", "data.val_clips=${data.clips}",
             "data.pairs=[a,${oc.env:HF_TOKEN,c4nary-s3tting}]", "init_from=${run_dir}/x",
             'batch_size="${oc.decode:${oc.env:COUNT,4}}"']  # fmt: skip
    plain, kept = compose_both(words)
    assert plain["data"]["val_clips"] == f"{SETTING}/clips"
    assert kept["data"]["clips"] == "${oc.env:NAME}/clips"
    assert kept["data"]["val_clips"] == "${data.clips}"
    assert kept["data"]["pairs"] == ["a", "${oc.env:HF_TOKEN}"]
    assert (kept["init_from"], kept["batch_size"]) == ("runs/train/x", 4)
    again = resolved(kept, ["NAME", "HF_TOKEN"])
    assert again["data"] == plain["data"]


def test_untrusted_settings_read_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for clips in ("https://evil/${oc.env:HF_TOKEN}", "${ oc.env : HF_TOKEN }", "${oc.env:${a}}"):
        with pytest.raises(ConfigError, match="from the environment; if you trust it"):
            resolved({"a": "HF_TOKEN", "data": {"clips": clips}}, [])
