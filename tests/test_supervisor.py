"""A supervisor ends its launch within the bound under any fault of a rank, and names rank and
cause.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from echolab.cli.__main__ import main
from echolab.launch import exit_codes, lease
from echolab.launch.attempts import attempts_of
from echolab.launch.launch_records import read_launch

PLAYED = Path(__file__).parent / "rank_scripted.py"
TIMEOUTS = {
    "init": 3, "first_step": 2, "step": 1.5, "eval": 1.5, "save": 1.5, "data_wait": 1.5,
    "teardown": 1.5, "safety_factor": 10, "min_step_timeout": 1.5,
}  # fmt: skip
BOUND = 300.0  # seconds after which it hangs, on a machine with other work


class Launch:
    """A supervisor in progress, as a process."""

    def __init__(
        self, folder: Path, parts: dict[str, Any], env: dict[str, str] | None = None, **about: Any
    ) -> None:
        self.folder, self.run = folder, folder / "run"
        fields = json.dumps({"ranks": 3, "timeouts": TIMEOUTS, **about})
        words = ["supervise", str(folder), json.dumps(parts), fields]
        self.process = subprocess.Popen(
            [sys.executable, str(PLAYED), *words],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )

    def end(self) -> tuple[int, str]:
        """Return the exit code and the output."""
        said = self.process.communicate(timeout=BOUND)[1]
        return self.process.returncode, said

    def pids(self) -> list[int]:
        """Return the pids of the ranks once they take steps."""
        end = time.monotonic() + BOUND
        while not list(self.folder.glob("step-5-*")):
            assert time.monotonic() < end and self.process.poll() is None
            time.sleep(0.02)
        return read_launch(next((self.run / "attempts").iterdir()))[0].pids


def why(run: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["why", str(run), "format=json", *words]) == 0
    verdict: dict[str, Any] = json.loads(capsys.readouterr().out)
    return verdict


@contextmanager
def on_hangup(action: signal.Handlers) -> Iterator[None]:
    """Start processes with this action on SIGHUP."""
    before = signal.signal(signal.SIGHUP, action)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def ended_pids(pids: Sequence[int]) -> bool:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


class Case(NamedTuple):
    does: str
    at: str
    cause: str
    words: str  # among those said
    code: int = exit_codes.RETRYABLE
    step: int = 3


CASES = [
    Case("loop", "forward", "hang", "computing without end"),
    Case("fifo", "data_wait", "hang", "blocked, in data_wait"),
    Case("stop", "backward", "stopped_process", "SIGSTOP"),
    Case("kill", "optimizer", "killed", "SIGKILL"),
    Case("segv", "forward", "killed", "SIGSEGV"),
    Case("quit", "forward", "exited", "exit code 3"),
    Case("bug", "backward", "code", "ZeroDivisionError: a bug"),
    Case("data", "data_wait", "data", "clips-000.tar: sample 3", exit_codes.FATAL),
    Case("config", "init", "config", "model.dim=0", exit_codes.FATAL),
    Case("sleep", "init", "hang", "blocked, in init"),
    Case("sleep", "save", "hang", "blocked, in save", step=10),
    Case("bug", "teardown", "teardown", "a bug", step=60),
    Case("sleep", "teardown", "teardown", "blocked, in teardown", step=60),
    Case("term", "forward", "preempted_unsaved", "SIGTERM", exit_codes.STOPPED_UNSAVED),
]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    os.mkfifo(tmp_path / "fifo")
    yield tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.does}-{case.at}")
def test_the_rank_that_fails_is_named_and_none_is_left(
    case: Case, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = Launch(folder, {"1": {"at": case.at, "does": case.does, "step": case.step}})
    code, said = launch.end()
    record = read_launch(folder / "run/attempts/played")[0]
    assert ended_pids(record.pids)
    verdict = why(folder / "run", capsys)
    assert (verdict["cause"], verdict["rank"], verdict["section"]) == (case.cause, 1, case.at), said
    assert code == verdict["exit_code"] == case.code
    assert verdict["host"] == "host-0" and verdict["next_action"]
    assert case.words in said and said.startswith(("echolab: error: ", "Traceback"))
    assert verdict["step"] == (0 if case.at == "init" else case.step)
    if case.does in ("loop", "fifo", "stop", "sleep"):
        assert any("in act" in frame for frame in verdict["stack"])
        assert (folder / "run/attempts/played/rank-1.stack").exists()
    assert not Path(record.local_folder).exists()


@pytest.mark.slow
def test_a_stopped_rank_is_detected_in_any_section(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A read may take long, but a stopped process does not read."""
    patient = {**TIMEOUTS, "data_wait": 10_000.0, "step": 10_000.0}
    does = {"1": {"at": "data_wait", "does": "stop", "step": 3}}
    code, said = Launch(folder, does, timeouts=patient).end()
    verdict = why(folder / "run", capsys)
    root_cause = (verdict["cause"], verdict["rank"], verdict["section"], verdict["step"])
    assert root_cause == ("stopped_process", 1, "data_wait", 3), said
    assert code == exit_codes.RETRYABLE


@pytest.mark.slow
def test_an_undisturbed_launch_ends_with_0(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = Launch(folder, {}).end()
    verdict = why(folder / "run", capsys)
    assert (code, said, verdict["cause"], verdict["requeue"]) == (0, "", "done", False)
    assert verdict["checkpoint"] == 60 and verdict["step"] == 60 and verdict["rank"] is None
    assert 0 < verdict["goodput"] < 1


@pytest.mark.slow
def test_a_signal_to_the_supervisor_is_forwarded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = Launch(folder, {"all": {"steps": 100_000}})
    launch.pids()
    assert why(launch.run, capsys)["cause"] == "running"
    launch.process.send_signal(signal.SIGUSR1)
    code, _ = launch.end()
    verdict = why(launch.run, capsys)
    assert code == verdict["exit_code"] == exit_codes.STOPPED_SAVED
    assert verdict["cause"] == "preempted" and verdict["detail"] == "SIGUSR1" and verdict["requeue"]


@pytest.mark.slow
@pytest.mark.parametrize("number", ["TERM", "ABRT", "SEGV", "KILL"])
def test_a_signal_after_the_end_of_training_changes_nothing(
    number: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm sends TERM twice, and libraries crash in destructors, when all is saved."""
    launch = Launch(folder, {"all": {"does": f"late {number}", "steps": 100_000}})
    launch.pids()
    launch.process.send_signal(signal.SIGTERM)
    code, said = launch.end()
    verdict = why(launch.run, capsys)
    assert (code, verdict["cause"]) == (exit_codes.STOPPED_SAVED, "preempted"), said


@pytest.mark.slow
def test_closing_the_terminal_saves(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGHUP comes, and the terminal no longer exists: writing to it fails nothing."""
    ours, theirs = os.openpty()
    with on_hangup(signal.SIG_DFL):  # also if these tests run under nohup
        launch = Launch(folder, {"all": {"steps": 100_000}}, stderr=theirs)
    os.close(theirs)
    launch.pids()
    os.close(ours)  # hangs up
    launch.process.send_signal(signal.SIGHUP)
    assert launch.process.wait(BOUND) == exit_codes.STOPPED_SAVED
    verdict = why(launch.run, capsys)
    assert (verdict["cause"], verdict["detail"]) == ("preempted", "SIGHUP") and verdict["requeue"]


@pytest.mark.slow
def test_under_nohup_a_closed_terminal_is_nothing(folder: Path) -> None:
    with on_hangup(signal.SIG_IGN):
        launch = Launch(folder, {})
    launch.pids()
    launch.process.send_signal(signal.SIGHUP)
    assert launch.end()[0] == exit_codes.DONE


@pytest.mark.slow
def test_a_suspended_job_is_not_a_hang(folder: Path) -> None:
    """The launch is suspended for longer than any timeout, in a section of any rank."""
    timeouts = {**dict.fromkeys(TIMEOUTS, 6.0), "safety_factor": 10}
    launch = Launch(folder, {"all": {"steps": 300}}, timeouts=timeouts)
    pids = [launch.process.pid, *launch.pids()]
    for _ in range(2):
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(9)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.5)
    code, said = launch.end()
    assert code == exit_codes.DONE, said


@pytest.mark.slow
@pytest.mark.parametrize("grace", [3.0, None])
def test_ranks_that_wait_when_a_stop_comes_are_ended(
    folder: Path, capsys: pytest.CaptureFixture[str], grace: float | None
) -> None:
    """They wait for a batch that never comes, though its timeout is far away."""
    patient = {
        **dict.fromkeys(TIMEOUTS, 10_000.0),
        "step": 3.0,
        "safety_factor": 10,
        "min_step_timeout": 3.0,
    }
    does = {"1": {"at": "data_wait", "does": "sleep", "step": 8}}
    about = {"grace": {signal.SIGTERM: grace}} if grace else {}
    launch = Launch(folder, does, timeouts=patient, **about)
    pids = launch.pids()
    while len(list(folder.glob("step-7-*"))) < 3:  # all ranks have checked for a signal in step 7
        time.sleep(0.05)
    launch.process.send_signal(signal.SIGTERM)
    code, said = launch.end()
    verdict = why(launch.run, capsys)
    assert code == verdict["exit_code"] == exit_codes.STOPPED_UNSAVED, said
    assert (verdict["cause"], verdict["rank"], verdict["section"]) == (
        "preempted_unsaved",
        1,
        "data_wait",
    )
    assert "SIGTERM, and no step ended within 3 s: blocked, in data_wait" in verdict["detail"]
    assert ended_pids(pids)


@pytest.mark.slow
def test_a_killed_supervisor_leaves_no_shared_memory(folder: Path) -> None:
    launch = Launch(folder, {"all": {"steps": 100_000}})
    pids = launch.pids()
    local_folder = Path(read_launch(launch.run / "attempts/played")[0].local_folder)
    assert (local_folder / "rank-0.heartbeat").exists()
    launch.process.kill()
    launch.process.wait()
    assert ended_pids(pids)
    end = time.monotonic() + 20
    while local_folder.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not local_folder.exists()


@pytest.mark.slow
def test_ranks_that_ignore_signals_are_killed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = Launch(folder, {"all": {"deaf": True, "steps": 100_000}})
    pids = launch.pids()
    launch.process.send_signal(signal.SIGTERM)
    code, _ = launch.end()
    assert code == exit_codes.RETRYABLE and why(launch.run, capsys)["cause"] == "hang"
    assert ended_pids(pids)


@pytest.mark.slow
def test_ctrl_c_twice_shortens_the_grace(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch = Launch(folder, {"all": {"deaf": True, "steps": 100_000}})
    launch.pids()
    launch.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    launch.process.send_signal(signal.SIGINT)
    assert launch.end() == (exit_codes.INTERRUPTED, "echolab: stopped\n")
    assert why(launch.run, capsys)["cause"] == "interrupted"


@pytest.mark.slow
def test_ctrl_c_twice_ends_ranks_that_cannot_react(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One rank is stopped; the others wait for it."""
    usual = {**TIMEOUTS, "step": 1000, "min_step_timeout": 1000}
    launch = Launch(folder, {"all": {"steps": 100_000}}, timeouts=usual)
    os.kill(launch.pids()[1], signal.SIGSTOP)
    launch.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    launch.process.send_signal(signal.SIGINT)
    assert launch.end() == (exit_codes.INTERRUPTED, "echolab: stopped\n")
    verdict = why(launch.run, capsys)
    assert verdict["cause"] == "interrupted" and verdict["exit_code"] == exit_codes.INTERRUPTED


@pytest.mark.slow
def test_a_full_disk_hides_no_cause(folder: Path) -> None:
    (folder / "run").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder / "run")]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root, to mount a small disk")
    try:
        launch = Launch(folder, {"1": {"at": "forward", "does": "bug", "step": 40}})
        launch.pids()
        with pytest.raises(OSError), (folder / "run/fill").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))
        code, said = launch.end()
    finally:
        subprocess.run(["umount", str(folder / "run")], check=True)
    assert code == exit_codes.RETRYABLE and "could not be written (No space left" in said
    last = said.splitlines()[-1]
    assert "rank 1 (host-0): exception in the code in forward at step 40: ZeroDivisionError" in last


@pytest.mark.slow
def test_no_rank_outlives_its_supervisor(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch = Launch(folder, {"all": {"steps": 100_000}})
    pids = launch.pids()
    launch.process.kill()
    launch.process.wait()
    assert ended_pids(pids)
    verdict = why(launch.run, capsys, "over=true")
    assert verdict["cause"] == "node_lost" and verdict["host"] == "host-0" and verdict["requeue"]
    assert verdict["exit_code"] == exit_codes.RETRYABLE


@pytest.mark.slow
def test_the_slower_of_two_nodes_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"2": {"at": "forward", "does": "sleep"}}
    both = [
        Launch(folder, parts, ranks=2, world=4, supervisor=number, launch="two")
        for number in range(2)
    ]
    ended = [launch.end() for launch in both]
    verdict = why(folder / "run", capsys)
    assert (verdict["cause"], verdict["rank"], verdict["host"]) == ("hang", 2, "host-1")
    assert [code for code, _ in ended] == [exit_codes.RETRYABLE] * 2
    records = read_launch(folder / "run/attempts/two")
    assert sorted(record.followed for record in records) == [False, True]
    # The ranks of the first node alone do not show the cause.
    only = [o for o in records[0].observations if o.stack]
    assert only and all("rank_scripted.py" in o.stack for o in only)
    (folder / "run/attempts/two/node-1.json").unlink()
    assert attempts_of(folder / "run", assume_ended=True)[0].cause == "node_lost"


# -- two launches in one folder ---------------------------------------------------------------


@pytest.mark.slow
def test_one_of_two_simultaneous_starts_trains_and_the_other_leaves_no_trace(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [Launch(folder, {}, launch=f"start-{number}") for number in range(2)]
    ended = sorted(launch.end() for launch in both)
    assert [code for code, _ in ended] == [0, exit_codes.RETRYABLE]
    assert ended[0][1] == ""
    assert (
        "is using this run folder; wait for its end" in ended[1][1] and ended[1][1].count("\n") == 1
    )
    verdict = why(folder / "run", capsys)
    assert (verdict["cause"], verdict["attempts"], verdict["exit_code"]) == ("done", 1, 0)
    assert len(list((folder / "run/attempts").iterdir())) == 1


def written(run: Path) -> dict[str, tuple[int, bytes]]:
    paths = (path for path in run.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


@pytest.mark.slow
def test_a_later_start_of_the_job_fences_the_earlier_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The earlier processes live: they exit without writing, and the later ones train."""
    job = {"SLURM_JOB_ID": "7"}
    first = Launch(folder, {"all": {"steps": 100_000}}, job, launch="slurm-7-0-0")
    pids = first.pids()
    for path in folder.glob("*-[0-9]"):  # the barriers of the first
        path.unlink()
    second = Launch(
        folder, {}, {**job, "SLURM_RESTART_COUNT": "1"}, launch="slurm-7-1-0"
    )  # fmt: skip
    code, said = first.end()
    assert code == exit_codes.RETRYABLE and "a later launch took over the run" in said
    assert ended_pids(pids)
    before = written(folder / "run/attempts/slurm-7-0-0")
    code, said = second.end()
    assert code == 0 and "waiting for launch slurm-7-0-0 of Slurm job 7" in said, said
    assert written(folder / "run/attempts/slurm-7-0-0") == before
    record = read_launch(folder / "run/attempts/slurm-7-0-0")[0]
    assert record.ended is None
    assert read_launch(folder / "run/attempts/slurm-7-1-0")[0].waited > 0
    verdict = why(folder / "run", capsys)
    assert (verdict["cause"], verdict["attempts"]) == ("done", 2)


@pytest.mark.slow
def test_a_signal_during_the_wait_for_the_lease_is_not_lost(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The earlier holder never leaves: it is elsewhere and does not see the fence."""
    env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    zombie = lease.Holder("slurm-7-0-0", "7", 0, "n9", "other", 1, "x")
    held = lease.take(folder / "run", zombie)
    launch = Launch(folder, {}, env, launch="slurm-7-1-0")
    end = time.monotonic() + BOUND
    while not held.fenced():
        assert time.monotonic() < end
        time.sleep(0.05)
    launch.process.send_signal(signal.SIGUSR1)
    code, said = launch.end()
    assert code == exit_codes.STOPPED_UNSAVED and "waiting for launch slurm-7-0-0" in said
    verdict = why(folder / "run", capsys)
    assert (verdict["cause"], verdict["requeue"]) == ("preempted_unsaved", True)
    assert verdict["detail"] == "SIGUSR1 before the ranks started" and verdict["exit_code"] == 76
    assert Launch(folder, {}, {**env, "SLURM_RESTART_COUNT": "2"}, launch="l").end()[0] == 0


@pytest.mark.slow
def test_a_frozen_launch_is_fenced_when_it_wakes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = {"RENEW_SECONDS": 0.2, "SILENT_SECONDS": 3.0, "OBSERVE_SECONDS": 1.0}
    first = Launch(folder, {"all": {"steps": 100_000}}, launch="first", lease=quick)
    pids = [first.process.pid, *first.pids()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for path in folder.glob("*-[0-9]"):  # the barriers of the first
        path.unlink()
    before = written(folder / "run/attempts/first")
    code, said = Launch(folder, {}, launch="second", lease=quick).end()
    assert code == exit_codes.RETRYABLE and "is using this run folder" in said  # it beat just now
    time.sleep(3)
    second = Launch(folder, {}, launch="second", lease=quick)
    assert second.end()[0] == 0
    done = written(folder / "run/checkpoints")
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    code, said = first.end()
    assert code == exit_codes.RETRYABLE and "a later launch took over the run" in said
    assert written(folder / "run/attempts/first") == before
    assert written(folder / "run/checkpoints") == done
    verdict = why(folder / "run", capsys)
    assert (verdict["cause"], verdict["attempts"]) == ("done", 2)
