"""The records that WandbRun writes offline, read back from wandb's own files."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from wandb.proto import wandb_internal_pb2

from echolab.errors import ConfigError, MediaError
from echolab.tracking.wandb_run import WandbRun

PATIENT = 300.0  # seconds for a busy machine
BLOCK = 32768  # a .wandb file is a LevelDB log: fragments with 7-byte heads, in blocks


def records(path: Path) -> Iterator[Any]:
    data, at, payload = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at < len(data):
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left
            continue
        if at + 7 > len(data):
            return  # still being written
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):
            return
        if kind == 0:
            at += left
            continue
        payload += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, or the last fragment
            record = wandb_internal_pb2.Record()
            record.ParseFromString(payload)
            payload = b""
            yield record


def finished(path: Path) -> list[Any]:
    """Return all records of a file, once its last record is written. wandb's finish() returns a
    little before its service has written the file; the process waits for it when it ends.
    """
    for _ in range(500):
        all_records = list(records(path))
        if "exit" in [record.WhichOneof("record_type") for record in all_records]:
            return all_records
        time.sleep(0.02)
    raise AssertionError(f"{path} has no exit record after 10 seconds")


def read(folder: Path) -> tuple[list[dict[str, Any]], list[Any]]:
    """Return history rows in order of the attempts, and the run records."""
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    finished_records = [record for path in files for record in finished(path)]
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
        for r in finished_records
        if (items := r.history.item)
    ]
    return rows, [r.run for r in finished_records if r.WhichOneof("record_type") == "run"]


def small_mp4(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for shade in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), shade * 40, np.uint8))
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def start(folder: Path, **changes: Any) -> WandbRun:
    settings: dict[str, Any] = {"project": "tests", "run_id": "r-1", "name": "a run"}
    return WandbRun(folder, **settings | {"config": {}, "mode": "offline"} | changes)


def test_scalars_config_video_and_table_are_recorded(tmp_path: Path) -> None:
    run = start(tmp_path, config={"optim": {"lr": 0.001}, "out": Path("a/b")})
    run.log(10, {"train/loss": 2.0, "tasks/probability/t2v": 0.25})
    run.log_videos(10, {"samples/clip": small_mp4(tmp_path / "clip.mp4")})
    run.log_table("scores", ["checkpoint", "sync_c_demo"], [["sft", 1.5], ["dpo", None]])
    run.finish(PATIENT)
    run.finish()
    rows, runs = read(tmp_path)
    assert rows[0]["trainer/step"] == 10 and rows[0]["train/loss"] == 2.0
    assert rows[0]["tasks/probability/t2v"] == 0.25
    assert rows[1]["samples/clip._type"] == "video-file" and rows[1]["trainer/step"] == 10
    recorded = next(tmp_path.glob("wandb/offline-run-*/files/" + rows[1]["samples/clip.path"]))
    assert recorded.read_bytes() == (tmp_path / "clip.mp4").read_bytes()
    table = next(tmp_path.glob("wandb/offline-run-*/files/" + rows[2]["scores.path"]))
    assert json.loads(table.read_text())["data"] == [["sft", 1.5], ["dpo", None]]
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["optim"] == {"lr": 0.001} and config["out"] == "a/b"
    assert (runs[0].run_id, runs[0].project, runs[0].display_name) == ("r-1", "tests", "a run")


def test_every_attempt_continues_the_same_run(tmp_path: Path) -> None:
    for attempt in range(2):
        run = start(tmp_path)
        run.log(5 - attempt, {"loss": float(attempt)})  # resumed at a step that was there before
        run.finish(PATIENT)
    rows, runs = read(tmp_path)
    assert {run.run_id for run in runs} == {"r-1"}
    assert [(row["trainer/step"], row["loss"]) for row in rows] == [(5, 0.0), (4, 1.0)]


def test_two_runs_can_be_open_at_once(tmp_path: Path) -> None:
    one, two = start(tmp_path / "1", run_id="one"), start(tmp_path / "2", run_id="two")
    one.log(1, {"loss": 1.0})
    two.log(1, {"loss": 2.0})
    one.finish(PATIENT)
    two.finish(PATIENT)
    losses = {n: [row["loss"] for row in read(tmp_path / n)[0]] for n in ("1", "2")}
    assert losses == {"1": [1.0], "2": [2.0]}


def test_no_secret_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = "c4nary-0123456789"
    monkeypatch.setenv("SOME_API_KEY", canary)
    monkeypatch.setattr("sys.argv", ["echolab", f"token={canary}"])
    run = start(tmp_path, config={"url": f"https://user:{canary}@host", "list": [canary]})
    run.log(1, {"loss": 1.0})
    run.finish(PATIENT)
    assert read(tmp_path)[0], "the file is complete before it is searched"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not [path for path in files if canary.encode() in path.read_bytes()]


def test_the_environment_can_disable_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = start(tmp_path / "run", mode="auto")
    run.log(1, {"loss": 1.0})
    run.finish(PATIENT)
    assert not (tmp_path / "run").exists()


def test_auto_means_offline_without_a_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    run = start(tmp_path / "run", mode="auto")
    run.finish(PATIENT)
    assert run.mode == "offline"


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a/b"):
        start(tmp_path, run_id="a/b")
    with pytest.raises(ConfigError, match="offlin"):
        start(tmp_path, mode="offlin")
    run = start(tmp_path, mode="disabled")
    with pytest.raises(MediaError, match="missing.mp4"):
        run.log_videos(1, {"x": tmp_path / "missing.mp4"})
