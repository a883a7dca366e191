"""One launch at a time writes into a run folder, however the launches before it ended."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import runs

from echolab.errors import BusyError, FencedError, StorageError
from echolab.launch import lease
from echolab.launch.lease import LEASE, Holder, Lease, handover, held, newest, take, this_process
from echolab.launch.run_dir import begin, claim
from echolab.training.checkpoints import retention
from echolab.training.checkpoints.writer import CheckpointWriter
from echolab.training.config import Intervals

HOLDS = """
import sys, time
from pathlib import Path
from echolab.errors import FencedError
from echolab.launch import lease
lease.RENEW_SECONDS = 0.1
with lease.held(Path(sys.argv[1]), "local-other") as own:
    print("holds", flush=True)
    while True:
        time.sleep(0.05)
        try:
            own.check()
        except FencedError as error:
            sys.exit(f"left: {error}")
"""


def elsewhere(**changes: Any) -> Holder:
    """Return a holder on another machine."""
    about = {"host": "n9", "machine": "other", "pid": 1, "identity": "x", "taken": time.time()}
    return Holder(**{"launch": "local-elsewhere", **about, **changes})


def older(own: Lease, seconds: float) -> None:
    """Make a lease's last heartbeat older."""
    then = time.time() - seconds
    os.utime(own.path, (then, then))


@pytest.fixture
def other(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Start a process of this machine that holds tmp_path/run."""
    words = [sys.executable, "-c", HOLDS, str(tmp_path / "run")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(lease, "OBSERVE_SECONDS", 0.5)


def test_a_released_lease_can_be_taken(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in (1, 2, 3):
        with held(run, f"local-{number}") as own:
            assert own.epoch == number and not own.fenced()
            with pytest.raises(
                BusyError, match=f"launch local-{number} on .* is using this run folder"
            ):
                take(run, this_process("local-x"))
    assert newest(run) == Lease(run, 3)


def test_one_of_many_simultaneous_takers_holds_the_lease(tmp_path: Path) -> None:
    def start(number: int) -> int:
        try:
            return take(tmp_path, this_process(f"local-{number}")).epoch
        except BusyError:
            return 0

    with ThreadPoolExecutor(16) as pool:
        assert sorted(pool.map(start, range(32))) == [0] * 31 + [1]


def test_the_lease_needs_no_file_system_lock(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert take(tmp_path, this_process("local-1")).epoch == 1


def test_a_killed_process_of_this_machine_holds_nothing(
    tmp_path: Path, other: "subprocess.Popen[str]"
) -> None:
    run = tmp_path / "run"
    with pytest.raises(BusyError, match=f"process {other.pid}"):
        take(run, this_process("local-1"))
    other.kill()
    other.wait()
    own = take(run, this_process("local-1"))
    assert own.epoch == 2 and handover(own) is None


@pytest.mark.usefixtures("quick")
def test_a_frozen_holder_is_fenced_when_it_wakes(
    tmp_path: Path, other: "subprocess.Popen[str]"
) -> None:
    run = tmp_path / "run"
    os.kill(other.pid, signal.SIGSTOP)
    time.sleep(1.1)
    own = take(run, this_process("local-1"))
    assert own.epoch == 2
    renewed_at = Lease(run, 1).renewed_at()
    os.kill(other.pid, signal.SIGCONT)
    said = other.communicate(timeout=300)[1]
    assert "left: " in said and "launch local-1" in said and other.returncode == 1
    assert Lease(run, 1).renewed_at() == renewed_at  # the fenced one does not even beat
    assert not own.fenced()


def test_a_passing_error_of_the_disk_fences_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = take(tmp_path, elsewhere())

    def stale(path: object, **how: object) -> os.stat_result:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        for function in ("stat", "utime", "listdir"):
            patch.setattr(os, function, stale)
        own.check()
        own.renew()
        assert not own.has_left() and lease.lease_of(tmp_path, "local-elsewhere") is None
    assert lease.lease_of(tmp_path, "local-elsewhere") == own


def test_a_later_start_of_the_same_job_fences_the_earlier(tmp_path: Path) -> None:
    first = take(tmp_path, elsewhere(launch="slurm-7-0-0", job="7"))
    second = take(tmp_path, elsewhere(launch="slurm-7-1-0", job="7", restart=1))
    assert second.epoch == 2 and first.fenced() and not second.fenced()
    with pytest.raises(FencedError, match="slurm-7-1-0 of Slurm job 7 on n9"):
        first.check()
    with pytest.raises(BusyError):  # the zombie cannot come back
        take(tmp_path, elsewhere(launch="slurm-7-0-1", job="7"))


def test_a_new_holder_waits_until_the_previous_one_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = take(tmp_path, elsewhere(launch="slurm-7-0-0", job="7"))
    wait = handover(take(tmp_path, elsewhere(launch="slurm-7-1-0", job="7", restart=1)))
    assert wait and not wait.is_over()
    first.leave()
    assert wait.is_over()
    third = take(tmp_path, elsewhere(launch="slurm-7-2-0", job="7", restart=2))
    older(Lease(tmp_path, 2), lease.QUIET_SECONDS + 1)  # dead for long: no time is lost
    wait = handover(third)
    assert wait and wait.is_over()
    # A holder that cannot see the fence keeps its heartbeat, and is waited for this long only.
    os.utime(Lease(tmp_path, 2).path)
    wait = handover(third)
    assert wait and not wait.is_over()
    monkeypatch.setattr(lease, "LEAVE_SECONDS", 0.0)
    assert wait.is_over()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("age", "renews", "taken"), [(0, False, False), (9, False, True),
    (9, True, False), (-9, False, True), (-9, True, False)])  # fmt: skip
def test_a_holder_elsewhere_is_dead_only_after_long_silence(
    tmp_path: Path, age: float, renews: bool, taken: bool
) -> None:
    """A wrong clock makes no holder count as dead."""
    first = take(tmp_path, elsewhere())
    older(first, age)
    with ThreadPoolExecutor(1) as pool:
        lease = pool.submit(take, tmp_path, this_process("local-1"))
        for n in range(10 if renews else 0):
            time.sleep(0.1)
            older(first, age + n)
        if taken:
            assert lease.result(300).epoch == 2
        else:
            with pytest.raises(BusyError):
                lease.result(300)


def commands(folder: Path, scontrol: str, squeue: str = "true") -> None:
    for name, does in {"scontrol": scontrol, "squeue": squeue}.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (folder / name).chmod(0o755)


RUNNING = "echo 'JobId=7 JobState=RUNNING Reason=None Restarts=0 BatchFlag=1'"


@pytest.mark.parametrize(
    ("scontrol", "squeue", "taken"),
    [
        (RUNNING, "echo 7.0", False),
        (RUNNING, "true", True),  # its step is over
        (RUNNING.replace("Restarts=0", "Restarts=1"), "true", False),  # it may come any moment
        (RUNNING.replace("RUNNING", "CANCELLED"), "echo 7.0", True),
        (RUNNING.replace("RUNNING", "PENDING"), "echo 7.0", True),
        (RUNNING.replace("RUNNING", "COMPLETING"), "echo 7.0", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "true", True),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "exit 1", False),
    ],
)
def test_slurm_says_whether_another_jobs_holder_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scontrol: str, squeue: str, taken: bool
) -> None:
    commands(tmp_path, scontrol, squeue)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    take(tmp_path / "run", elsewhere(launch="slurm-7-0-0", job="7"))
    me = elsewhere(launch="slurm-8-0-0", job="8")
    if taken:
        assert take(tmp_path / "run", me).epoch == 2
    else:
        with pytest.raises(BusyError, match="Slurm job 7 on n9"):
            take(tmp_path / "run", me)


@pytest.mark.usefixtures("quick")
def test_a_holder_that_died_at_its_first_write_counts_as_silent(tmp_path: Path) -> None:
    own = take(tmp_path, elsewhere())
    own.path.write_text("{")
    with pytest.raises(BusyError):
        take(tmp_path, this_process("local-1"))
    older(own, 9)
    assert take(tmp_path, this_process("local-1")).epoch == 2


def test_a_rank_of_a_fenced_launch_claims_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = take(tmp_path / "run", elsewhere(launch="slurm-7-0-0", job="7"))
    monkeypatch.setenv(lease.EPOCH, str(first.epoch))
    with claim(tmp_path / "run", {"seed": 1}) as run:
        assert run.lease == first
        take(tmp_path / "run", elsewhere(launch="slurm-7-1-0", job="7", restart=1))
        before = contents(tmp_path / "run")
        with pytest.raises(FencedError):
            begin(run, {"seed": 1}, 0)
    with pytest.raises(FencedError), claim(tmp_path / "run", {"seed": 1}):
        pass
    assert contents(tmp_path / "run") == before


# -- what a fenced process writes: nothing ----------------------------------------------------


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return the files of a run, except those of a save that a thread still writes."""
    own = sorted(path for path in folder.rglob("*") if LEASE not in path.parts)
    paths = (path for path in own if "/.partial-" not in str(path))
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


PLAN = runs.schedule(("sft", 6))


class Moment:
    """A moment at which another launch takes the run; keeps the contents of the run's folder
    since.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.before: dict[str, bytes | None] | None = None

    def fenced(self) -> bool:
        return self.before is not None

    def comes(self) -> None:
        if self.before is None:
            self.before = contents(self.run)


@pytest.mark.parametrize("moment", ["a step", "before a save", "amid a save", "amid the removal"])
def test_a_fenced_training_leaves_without_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """From the moment at which another launch takes the run, the folder does not change."""
    later = Moment(tmp_path / "run")
    monkeypatch.setattr("echolab.training.callbacks.step_sync.POLL_SECONDS", 0.0)
    if moment == "before a save":
        begin = CheckpointWriter.begin

        def begun(self: CheckpointWriter, state: dict[str, Any]) -> None:
            if state["step"] == 4:
                self.close()  # what was being removed by then is gone
                later.comes()
            begin(self, state)

        monkeypatch.setattr(CheckpointWriter, "begin", begun)
    if moment == "amid a save":
        write = CheckpointWriter._write

        def written(self: CheckpointWriter, state: bytes) -> None:
            write(self, state)
            if self._path.name == "step-000004":
                later.comes()

        monkeypatch.setattr(CheckpointWriter, "_write", written)
    if moment == "amid the removal":
        monkeypatch.setattr(
            retention, "saved_steps", lambda folder: (later.comes(), [4, 3, 2, 1])[1]
        )

    def on_step(step: int, steps: int) -> None:
        if step == 4 and moment == "a step":
            later.comes()

    every = Intervals(log_every=1, save_every=0 if moment == "a step" else 1)
    with pytest.raises(FencedError, match="a later launch took over the run"):
        runs.train(tmp_path, PLAN, intervals=every, fenced=later.fenced, on_step=on_step)
    assert contents(tmp_path / "run") == later.before


def test_a_save_that_a_later_launch_removed_is_never_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder is frozen after its last check, the later launch removes its save, and no file
    is left to rename.
    """
    publish = CheckpointWriter._publish

    def frozen(self: CheckpointWriter, receipts: Any) -> None:
        retention.tidy(self.folder)
        (self.folder / ".partial-later-step-000002").mkdir()
        publish(self, receipts)

    monkeypatch.setattr(CheckpointWriter, "_publish", frozen)
    with pytest.raises(StorageError):
        runs.train(tmp_path, PLAN, intervals=Intervals(save_every=2))
    left = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    assert left == [".partial-later-step-000002"]
