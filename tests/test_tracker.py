"""No fault of wandb disturbs the process that logs, and every loss is reported."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from test_wandb_run import records, small_mp4

from echolab.tracking import wandb_run
from echolab.tracking.wandb_run import WandbRun

STEPS = 8
HANGS = 300.0
KEY = "0123456789abcdef" * 3


def children(parent: int) -> dict[int, str]:
    """Return the names of the child processes of a process by pid, of all its threads."""
    listing = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(parent)], capture_output=True)
    lines = [line.split(maxsplit=1) for line in listing.stdout.decode().splitlines()]
    return {int(pid): name for pid, name in lines if name != "ps"}


def processes(parent: int) -> list[int]:
    """Return the pids of the child processes that run Python or wandb."""
    return [p for p, name in children(parent).items() if name.startswith(("python", "wandb"))]


def tracker(of: int | None = None) -> tuple[list[int], list[int]]:
    """Return the tracker's processes of a process, and wandb's services of these."""
    ours = [
        pid for pid in processes(of or os.getpid())
        if b"wandb_process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]  # fmt: skip
    return ours, [service for pid in ours for service in processes(pid)]


def wait_until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + HANGS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def begin(folder: Path, mode: str = "offline") -> WandbRun:
    folder.mkdir(exist_ok=True)
    return WandbRun(folder, project="tests", run_id="r-1", name="a run", config={}, mode=mode)  # type: ignore[arg-type]


def log_all(run: WandbRun, folder: Path, steps: range = range(STEPS)) -> None:
    """Log scalars, a video and a table."""
    for step in steps:
        run.log(step, {"loss": step / 2})
    run.log_videos(steps[-1], {"clip": small_mp4(folder / "clip.mp4")})
    run.log_table("scores", ["name", "value"], [["a", 1.0]])


def rows_of(folder: Path, kind: str = "offline-run-*") -> list[dict[str, Any]]:
    """Return the rows of all wandb runs in a folder, including those that were cut short."""
    files = sorted(folder.glob(f"wandb/{kind}/*.wandb"))
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
        for path in files
        if path.stat().st_size  # it may only just have been made
        for record in records(path)
        if (items := record.history.item)
    ]


def recorded(folder: Path) -> list[float]:
    """Return the logged losses, and assert that a video and a table are among the rows."""
    rows = rows_of(folder)
    assert sum("clip._type" in row for row in rows) == 1
    assert sum("scores._type" in row for row in rows) == 1
    return [row["loss"] for row in rows if "loss" in row]


ALL = [step / 2 for step in range(2 * STEPS)]


@pytest.mark.parametrize(
    ("when", "number", "victim"),
    [
        ("opening", signal.SIGTERM, "both"), ("opening", signal.SIGKILL, "tracker"),
        ("logging", signal.SIGTERM, "both"), ("logging", signal.SIGKILL, "service"),
        ("logging", signal.SIGKILL, "tracker"), ("logging", signal.SIGSTOP, "both"),
    ],
)  # fmt: skip
def test_a_killed_tracker_is_restarted_and_gets_all_rows(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], when: str, number: int, victim: str
) -> None:
    run = begin(tmp_path)
    if when == "logging":
        log_all(run, tmp_path, range(STEPS))
        wait_until(lambda: list(tmp_path.glob("wandb/offline-run-*/files/media")))
    else:
        wait_until(lambda: tracker()[0])
    ours, services = tracker()
    for pid in {"both": ours + services, "service": services, "tracker": ours}[victim]:
        os.kill(pid, number)
    if when == "opening":
        log_all(run, tmp_path, range(STEPS))
    for step in range(STEPS, 2 * STEPS):
        run.log(step, {"loss": step / 2})
    run.finish(10 if number == signal.SIGSTOP else 60)  # half of it for one that is stopped
    losses = sorted(recorded(tmp_path))
    assert losses == ALL
    assert capfd.readouterr().err == ""  # nothing was lost


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.1, 0.3])
def test_a_service_killed_while_the_run_finishes_loses_no_row(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], delay: float
) -> None:
    run = begin(tmp_path)
    log_all(run, tmp_path)
    wait_until(lambda: list(tmp_path.glob("wandb/offline-run-*/files/media")))
    (ours,), (service,) = tracker()
    # The stopped process gets the rest of the rows and the end together, without its service.
    os.kill(ours, signal.SIGSTOP)
    for step in range(STEPS, 2 * STEPS):
        run.log(step, {"loss": step / 2})
    end = threading.Thread(target=run.finish, args=(60,))
    end.start()
    time.sleep(0.5)
    os.kill(service, signal.SIGSTOP)  # it reads nothing more, but is not seen to end
    os.kill(ours, signal.SIGCONT)
    time.sleep(delay)
    os.kill(service, signal.SIGKILL)
    end.join()
    assert sorted(recorded(tmp_path)) == ALL
    assert capfd.readouterr().err == ""


def silent(server: socket.socket, kept: list[socket.socket]) -> None:
    while True:
        try:
            kept.append(server.accept()[0])
        except OSError:
            return


@contextmanager
def never_answers() -> Iterator[str]:
    """Start a server that accepts connections, and never answers."""
    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=silent, args=(server, kept), daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    for connection in kept:
        connection.close()


@contextmanager
def closed_port() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    yield address


@pytest.mark.parametrize(("mode", "server"), [("online", never_answers), ("auto", closed_port)])
def test_without_a_server_the_run_is_recorded_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    mode: str, server: Callable[[], Iterator[str]],
) -> None:  # fmt: skip
    """This holds even if the run ends before the server's silence is detected."""
    for name in ("WANDB_MODE", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with server() as address:  # type: ignore[attr-defined]
        monkeypatch.setenv("WANDB_BASE_URL", address)
        run = begin(tmp_path, mode)
        log_all(run, tmp_path)
        wait_until(lambda: run.mode == "online")
        run.finish(12)
    assert run.mode == "offline" and recorded(tmp_path) == ALL[:STEPS]
    lines = capfd.readouterr().err.splitlines()
    folder = next(tmp_path.glob("wandb/offline-run-*"))
    assert len(lines) == 1 and f"`wandb sync {folder}`" in lines[0] and KEY not in lines[0]


RUN = {"id": "r", "name": "r-1", "project": {"name": "tests", "entity": {"name": "somebody"}}}


class FallsSilent(BaseHTTPRequestHandler):
    """Answers wandb's requests at the begin of a run, and nothing after them."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["content-length"])).decode()
        if "RunResumeStatus" in asked:
            answer: dict[str, Any] = {"model": {"id": "p", "name": "tests", "bucket": None}}
        elif "UpsertBucket" in asked:
            answer = {"upsertBucket": {"bucket": RUN, "inserted": True}}
        else:
            time.sleep(HANGS)
        body = json.dumps({"data": answer}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_a_run_survives_a_server_that_falls_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every row is on the disk; the end does not wait, and one line says how to upload."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with ThreadingHTTPServer(("127.0.0.1", 0), FallsSilent) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        run = begin(tmp_path, "online")
        log_all(run, tmp_path)
        wait_until(lambda: len(rows_of(tmp_path, "run-*")) >= STEPS)
        ours, services = tracker()
        run.finish(8)
        assert run.mode == "online"
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ours + services))
        server.shutdown()
    (lines,) = [line for line in capfd.readouterr().err.splitlines() if "echolab" in line]
    folder = next(tmp_path.glob("wandb/run-*"))
    assert "not finished after 8 s" in lines and f"`wandb sync {folder}`" in lines
    assert [row["loss"] for row in rows_of(tmp_path, "run-*") if "loss" in row] == ALL[:STEPS]


def test_a_wrong_key_is_reported_and_the_run_recorded_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "too-short-a-key")
    run = begin(tmp_path, "online")
    log_all(run, tmp_path)
    run.finish(60)
    assert recorded(tmp_path) == ALL[:STEPS]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "WANDB_API_KEY" in lines[0] and "wandb sync" in lines[0]
    assert "too-short-a-key" not in lines[0]


@pytest.mark.parametrize("kilobytes", [4, 40])
def test_a_full_disk_is_reported_with_the_number_of_missing_records(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kilobytes: int
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small disk")
    (disk := tmp_path / "wandb").mkdir()
    small = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
    if subprocess.run(small, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        run = begin(tmp_path)
        for step in range(500):
            run.log(step, {f"loss/{i}": step + i / 7 for i in range(20)})
        run.finish(60)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    (lines,) = capfd.readouterr().err.splitlines()
    assert "of 500 records are missing" in lines, lines


def test_auto_means_offline_in_a_slurm_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    run = begin(tmp_path, "auto")
    assert run.mode == "offline"
    run.finish(60)
    assert run.mode == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert wandb_run._chosen("auto") == "online"  # who asks for it gets it


def test_a_blocked_tracker_blocks_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """More records come than any pipe or queue holds; a tracker that cannot start gives one
    line.
    """
    before, stuck = children(os.getpid()), tmp_path / "stuck"
    stuck.write_text("#!/bin/sh\nexec sleep 1000\n")
    stuck.chmod(0o755)
    monkeypatch.setattr(wandb_run, "PROCESS", (str(stuck),))
    run = begin(tmp_path / "a")
    for step in range(2 * wandb_run.MAX_QUEUED):
        run.log(step, {"loss": 1.0, "a/long/name/of/a/metric": 2.0})
    run.finish(0.2)
    run = begin(tmp_path / "b")
    run.finish(0.2)
    monkeypatch.setattr(wandb_run, "PROCESS", (str(tmp_path / "missing"),))
    run = begin(tmp_path / "c")
    run.log(1, {"loss": 1.0})
    run.finish(60)
    lines = capfd.readouterr().err.splitlines()
    assert ["not finished" in line for line in lines] == [True, True, False]
    assert "missing" in lines[2] and "sends no more records" in lines[2]
    wait_until(lambda: children(os.getpid()).keys() <= before.keys())


def test_the_tracker_ends_with_the_process_that_logs(tmp_path: Path) -> None:
    """After a kill of that process every row it logged is on the disk."""
    program = (
        "import os, sys, time; from pathlib import Path; sys.path[:0] = sys.argv[2:];"
        "from test_tracker import begin, log_all; folder = Path(sys.argv[1]);"
        "log_all(begin(folder), folder);"
        "[time.sleep(0.01) for _ in iter(lambda: list(folder.glob('wandb/*/files/media')), [])];"
        "time.sleep(1000)"
    )
    done = subprocess.Popen(
        [os.sys.executable, "-c", program, str(tmp_path), str(Path(__file__).parent)]  # type: ignore[attr-defined]
    )
    wait_until(lambda: list(tmp_path.glob("wandb/*/files/media")))
    ours, services = tracker(done.pid)
    assert len(ours) == len(services) == 1
    done.kill()
    done.wait()
    wait_until(lambda: len(rows_of(tmp_path)) == STEPS + 2)
    assert recorded(tmp_path) == ALL[:STEPS]
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ours + services))


def test_a_tracker_that_still_opens_a_run_ends_with_the_process_that_logs(tmp_path: Path) -> None:
    """`wandb.init` may hang for long, and would write into the folder of the next launch."""
    (tmp_path / "wandb.py").write_text(
        "import os, time\nfrom pathlib import Path\n"
        "class Settings:\n    def __init__(self, **values): pass\n"
        "def init(**values):\n"
        "    Path(os.environ['OPENING']).write_text(str(os.getpid()))\n    time.sleep(1000)\n"
    )
    (tmp_path / "run").mkdir()
    opening = tmp_path / "opening"
    program = (
        "import sys, time; from pathlib import Path; "
        "from echolab.tracking.wandb_run import WandbRun; folder = Path(sys.argv[1]);"
        "WandbRun(folder, project='tests', run_id='r-1', name='a', config={}, mode='offline');"
        "time.sleep(1000)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OPENING": str(opening)},
    )
    wait_until(lambda: opening.exists() and opening.read_text())
    process = Path("/proc", opening.read_text())
    assert process.exists()
    parent.kill()
    parent.wait()
    wait_until(lambda: not process.exists())
