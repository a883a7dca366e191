"""File system errors, transient and persistent, never count as damaged data."""

import ctypes
import errno
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import saved
from forked import ForkServer

from echolab import atomic_io
from echolab.atomic_io import LineLog, append_text, retry, write_atomic
from echolab.data.bad_samples import TolerantReader, read_quarantine
from echolab.data.ledger import read_ledger
from echolab.data.samples import MemberReader
from echolab.data.shard_reader import open_dataset
from echolab.errors import DataError, DiskFullError, SaveError, StorageError
from echolab.launch.exit_codes import CAUSES, FATAL, RETRYABLE, cause_of_exception
from echolab.tracking.metrics import MetricsLog, read_metrics, series
from echolab.training.checkpoints.checkpoint import folder_of, latest_valid, open_checkpoint
from echolab.training.config import Intervals
from echolab.training.guards import events

PASSING = [
    errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EACCES, errno.EIO, errno.EPERM,
    errno.ESHUTDOWN, errno.EREMOTEIO, errno.EHOSTDOWN, errno.EAGAIN, errno.EMFILE, errno.ENOMEM,
    errno.ECONNRESET, errno.EPROTO, errno.ENODEV, errno.EBADF, errno.ENXIO,
]  # fmt: skip
FULL = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_io, "PAUSES", (0.0, 0.01, 0.0))


class Failing:
    """A function that fails `times` times with an OSError, and then works."""

    def __init__(self, function: Callable[..., Any], number: int, times: float = 1) -> None:
        self.function, self.number, self.times, self.calls = function, number, times, 0

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls <= self.times:
            raise OSError(self.number, os.strerror(self.number))
        return self.function(*given, **named)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    runs.write_clips(tmp_path / "clips", 4)
    return tmp_path / "clips"


@pytest.mark.parametrize("number", [*PASSING, errno.ENOENT], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["preadv", "open"])
def test_a_read_survives_a_transient_error(
    clips: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    dataset = open_dataset(clips)
    expected = dataset.take(1, "safetensors", MemberReader.rest)
    other = open_dataset(clips)
    monkeypatch.setattr(os, name, failing := Failing(getattr(os, name), number, 2))
    assert other.take(1, "safetensors", MemberReader.rest) == expected
    assert failing.calls > 2


@pytest.mark.parametrize("number", [*PASSING, errno.ENOENT], ids=errno.errorcode.get)
def test_a_persistent_read_error_names_file_and_error_number(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    dataset = open_dataset(clips)
    reader = TolerantReader(dataset, max_bad_fraction=0.9, quarantine=tmp_path / "quarantine.jsonl")
    monkeypatch.setattr(os, "preadv", Failing(os.preadv, number, float("inf")))
    with pytest.raises(StorageError, match=rf"encoded-0.*\.tar.*errno {number}\)") as caught:
        reader.read(0, lambda i: dataset.take(i, "safetensors", MemberReader.rest))
    assert "\n" not in str(caught.value)
    assert read_quarantine(tmp_path / "quarantine.jsonl") == []
    assert cause_of_exception(caught.value, "data_wait") == "storage"
    assert CAUSES["storage"].exit_code == RETRYABLE


def test_a_stale_handle_is_opened_again(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read through the first handle fails; a new handle works."""
    dataset, read, opens = open_dataset(clips), os.preadv, Failing(os.open, 0, 0)

    def preadv(*given: Any) -> int:
        if opens.calls == 1:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(*given)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "open", opens)
    assert dataset.take(0, "safetensors", MemberReader.rest)
    assert opens.calls == 2


@pytest.mark.parametrize("number", PASSING, ids=errno.errorcode.get)
def test_opening_a_dataset_survives_a_transient_error(
    clips: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = Path.read_bytes
    failing = Failing(real, number)
    monkeypatch.setattr(Path, "read_bytes", _method(failing))
    assert len(open_dataset(clips)) == 4
    monkeypatch.setattr(Path, "read_bytes", _method(Failing(real, number, float("inf"))))
    with pytest.raises(StorageError, match=rf"dataset.json.*errno {number}\)"):
        open_dataset(clips)


def _method(function: Callable[..., Any]) -> Any:
    return lambda self, *given, **named: function(self, *given, **named)


def test_damaged_bytes_are_a_data_error(clips: Path) -> None:
    dataset = open_dataset(clips)
    shard = clips / dataset.sample(0).shard
    data = bytearray(shard.read_bytes())
    data[dataset.sample(0).members["safetensors"][0] + 9] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError) as caught:
        dataset.take(0, "safetensors", MemberReader.rest)
    assert cause_of_exception(caught.value, "data_wait") == "data"


# -- writing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", PASSING, ids=errno.errorcode.get)
def test_patient_writes_survive_a_transient_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", Failing(os.fsync, number, 2))
    write_atomic(tmp_path / "a", b"complete", patient=True)
    assert (tmp_path / "a").read_bytes() == b"complete"
    monkeypatch.setattr(os, "fsync", Failing(os.fsync, number, float("inf")))
    with pytest.raises(StorageError, match=rf"b: could not be written .*errno {number}\)") as error:
        write_atomic(tmp_path / "b", b"complete", patient=True)
    assert not isinstance(error.value, DiskFullError)
    assert cause_of_exception(error.value, "save") == "storage"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("number", FULL, ids=errno.errorcode.get)
def test_a_full_disk_is_reported_without_retries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", failing := Failing(os.fsync, number, float("inf")))
    with pytest.raises(DiskFullError) as error:
        write_atomic(tmp_path / "b", b"complete", patient=True)
    assert failing.calls == 1 and cause_of_exception(error.value, "vote") == "disk"
    assert cause_of_exception(OSError(number, "words"), "vote") == "disk"


def test_retries_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(lambda: 7, errno.ESTALE, 3)
    assert retry(failing) == 7 and failing.calls == 4
    failing = Failing(lambda: 7, errno.ESTALE, 4)
    with pytest.raises(OSError):
        retry(failing)
    failing = Failing(lambda: 7, errno.ENOENT, 1)
    with pytest.raises(FileNotFoundError):
        retry(failing)
    assert failing.calls == 1


class Outages:
    """`append_text` that fails, fully or half-way, at the calls named."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: range, number: int) -> None:
        self.count, self.calls, self.number = 0, calls, number
        monkeypatch.setattr(atomic_io, "append_text", self)

    def __call__(self, path: Path, text: str, *, patient: bool = False) -> None:
        self.count += 1
        if self.count not in self.calls:
            append_text(path, text, patient=patient)
            return
        if self.count % 2:  # half of it came to the disk
            append_text(path, text[: len(text) // 2])
        raise atomic_io.write_error(path, OSError(self.number, os.strerror(self.number)))


@pytest.mark.parametrize("number", [*PASSING[:6], *FULL], ids=errno.errorcode.get)
def test_metrics_wait_in_memory_during_an_outage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing is raised, every row is written afterwards in order, and start and end are logged
    once.
    """
    Outages(monkeypatch, range(3, 7), number)
    log = MetricsLog(tmp_path / "metrics.jsonl", 1)
    for step in range(1, 11):
        log.log(step, {"loss": float(step)})
    log.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert series(rows, "loss") == (list(range(1, 11)), [float(s) for s in range(1, 11)])
    said = capfd.readouterr().err
    assert said.count("kept in memory") == 1 and "lines written late, 0 dropped" in said


def test_waiting_rows_are_bounded_and_lost_rows_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Outages(monkeypatch, range(1, 21), errno.ESTALE)
    log = LineLog(tmp_path / "log.jsonl", limit=5)
    for number in range(21):
        log.add(f"{number}\n")
    assert (tmp_path / "log.jsonl").read_text().splitlines()[-5:] == ["16", "17", "18", "19", "20"]
    assert "5 lines written late, 16 dropped" in capfd.readouterr().err
    Outages(monkeypatch, range(1, 100), errno.ESTALE)
    log.add("late\n")
    log.close()
    assert "1 lines are lost" in capfd.readouterr().err


def test_events_are_retried_until_the_error_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next steps of a run depend on its events, so they are written, or the run ends."""
    monkeypatch.setattr(os, "fsync", Failing(os.fsync, errno.ETIMEDOUT, 2))
    events.append(tmp_path, 3, "spike")
    assert [event.step for event in events.read(tmp_path)] == [3]
    monkeypatch.setattr(os, "fsync", Failing(os.fsync, errno.ETIMEDOUT, float("inf")))
    with pytest.raises(StorageError, match=r"events.jsonl.*errno 110"):
        events.append(tmp_path, 4, "spike")


# -- a run ------------------------------------------------------------------------------------


@pytest.fixture
def outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Make all opening, reading and writing below `tmp_path` fail once in so many calls."""

    def begin(every: int) -> None:
        for name in ("preadv", "fsync"):
            monkeypatch.setattr(os, name, _sometimes(getattr(os, name), every))
        opened, sometimes = Path.open, _sometimes(Path.open, every)

        def open_path(self: Path, *given: Any, **named: Any) -> Any:
            ours = self.is_relative_to(tmp_path)
            return (sometimes if ours else opened)(self, *given, **named)

        monkeypatch.setattr(Path, "open", open_path)

    yield begin
    monkeypatch.undo()


def _sometimes(function: Callable[..., Any], every: int) -> Callable[..., Any]:
    calls = 0

    def call(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % every == 0:
            number = PASSING[calls // every % len(PASSING)]
            raise OSError(number, os.strerror(number))
        return function(*given, **named)

    return call


def test_a_run_on_a_flaky_file_system_equals_an_undisturbed_run(
    tmp_path: Path, outage: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards, ledger and checkpoints fail at times: trained weights and records are equal."""
    plan, settings = (
        runs.schedule(("sft", 6)),
        {"log_samples": True, "intervals": Intervals(log_every=1, save_every=2)},
    )
    _, rows = runs.train(tmp_path, plan, run_dir=tmp_path / "good", **settings)
    outage(3)
    result, again = runs.train(tmp_path, plan, run_dir=tmp_path / "bad", **settings)
    monkeypatch.undo()
    assert result.done
    assert [row["train/loss"] for row in again] == [row["train/loss"] for row in rows]
    for step in (4, 6):
        one, other = (folder_of(tmp_path / run / "checkpoints", step) for run in ("good", "bad"))
        assert runs.tensors_of(one) == runs.tensors_of(other)
    ledgers = [read_ledger(tmp_path / run) for run in ("good", "bad")]
    assert ledgers[0].steps == ledgers[1].steps and ledgers[1].faults == []


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ESTALE, StorageError, "see to that file system"),
        (errno.EIO, StorageError, "see to that file system"),
        (errno.EDQUOT, SaveError, "make room there"),
        (errno.EROFS, SaveError, "make room there"),
    ],
)
def test_a_failed_save_names_its_kind_of_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], words: str
) -> None:
    saver = saved.Saver(tmp_path, more=())
    saver.save(1)
    monkeypatch.setattr(os, "fsync", Failing(os.fsync, number, float("inf")))
    with pytest.raises(kind, match=f"{os.strerror(number)}.*nothing was kept of it.*{words}"):
        saver.save(2)
    monkeypatch.undo()
    checkpoint, rejected = latest_valid(tmp_path)
    assert checkpoint and checkpoint.step == 1 and rejected == []


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "ema-00001-of-00001.safetensors"])
def test_an_unreadable_checkpoint_is_not_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An older one would repeat steps that are saved; the file system may work again later."""
    saver = saved.Saver(tmp_path, more=())
    for step in (1, 2):
        saver.save(step)
    calls = {"left": 2.0}
    for method in ("open", "read_bytes"):
        real = getattr(Path, method)

        def failing(self: Path, *given: Any, real: Any = real, **named: Any) -> Any:
            if self.name == name and "step-000002" in str(self) and calls["left"] > 0:
                calls["left"] -= 1
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return real(self, *given, **named)

        monkeypatch.setattr(Path, method, failing)
    assert open_checkpoint(folder_of(tmp_path, 2)).step == 2
    calls["left"] = float("inf")
    with pytest.raises(StorageError, match=rf"step-000002/{name}.*errno 116\)") as caught:
        latest_valid(tmp_path)
    assert cause_of_exception(caught.value, "init") == "storage"


# -- loader workers -----------------------------------------------------------------------------


def train_with_workers(root: str, how: str) -> int:
    """Train in a rank with two workers, of which one dies; print the cause, exit with its code."""
    from echolab.launch.rank_process import write_error_file

    atomic_io.PAUSES = (0.0, 0.0)
    parent, calls, preadv = os.getpid(), 0, os.preadv

    def read_in_worker(*given: Any) -> int:
        nonlocal calls
        calls += 1
        if os.getpid() != parent and calls > 3:
            if how == "stale":
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            os.kill(os.getpid(), getattr(signal, how))
        return preadv(*given)

    os.preadv = read_in_worker  # type: ignore[assignment]

    def on_failure(error: BaseException) -> None:
        code = write_error_file(Path(root), 0, error, "data_wait", 3)
        os._exit(code)

    runs.train(Path(root), runs.schedule(("sft", 40)), num_workers=2, on_failure=on_failure)
    return 0


@pytest.mark.parametrize(
    ("how", "cause", "words"),
    [
        ("SIGKILL", "worker", "is killed by signal: Killed"),
        ("SIGSEGV", "worker", "Segmentation fault"),
        ("SIGBUS", "shared_memory", "Bus error"),
        ("stale", "storage", ".tar: sample clip-"),
    ],
)
def test_the_death_of_a_worker_has_a_cause(
    fork_server: ForkServer, tmp_path: Path, how: str, cause: str, words: str
) -> None:
    runs.write_clips(tmp_path / "clips", 7)
    runs.write_pairs(tmp_path / "pairs", 5)
    arguments = {"root": str(tmp_path), "how": how}
    ranks = fork_server.start("test_storage_errors:train_with_workers", arguments=arguments)
    assert ranks.wait() == [RETRYABLE], ranks.outputs()
    error = json.loads((tmp_path / "rank-0.error.json").read_text())
    assert error["cause"] == cause and words in error["message"], error
    assert "\n" not in error["message"].strip()
    if how in ("SIGSEGV", "SIGBUS"):  # with the stack of the worker
        assert "read_in_worker" in ranks.output(0)


# -- shared memory ------------------------------------------------------------------------------

CLONE_NEWNS = 0x20000
SHARED_BYTES = 4 << 20  # bytes of the /dev/shm of these tests


def mount_shared(size: int) -> None:
    """Give this process a private /dev/shm."""
    assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    words = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"]
    subprocess.run(["mount", *words], check=True)


def fill_shared(leave: int) -> None:
    statvfs = os.statvfs("/dev/shm")
    with open(f"/dev/shm/other-{leave}", "wb") as file:
        file.write(bytes(statvfs.f_bavail * statvfs.f_frsize - leave))


def train_in_little_memory(root: str, when: str) -> int:
    """Train in a rank with two workers and little /dev/shm, which fills up at some moment."""
    from echolab.launch.rank_process import write_error_file

    mount_shared(SHARED_BYTES if when != "too small" else 1 << 16)
    if when == "before":
        fill_shared(1 << 16)

    def on_step(step: int, steps: int) -> None:
        if step == 3 and when == "meanwhile":
            fill_shared(0)

    def on_failure(error: BaseException) -> None:
        os._exit(write_error_file(Path(root), 0, error, "data_wait", 3))

    runs.train(
        Path(root),
        runs.schedule(("sft", 60)),
        num_workers=2,
        on_step=on_step,
        on_failure=on_failure,
    )
    return 0


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a file system")
@pytest.mark.parametrize(
    ("when", "code", "cause", "words"),
    [
        ("never", 0, "", ""),
        ("too small", FATAL, "config", "data.num_workers=2: 1 ranks x 6 batches of .* bytes need"),
        ("before", RETRYABLE, "shared_memory", "free of 4,194,304; make room there"),
        ("meanwhile", RETRYABLE, "shared_memory", "/dev/shm: no room for a batch of"),
    ],
)
def test_full_shared_memory_is_named_as_the_cause(
    fork_server: ForkServer, tmp_path: Path, when: str, code: int, cause: str, words: str
) -> None:
    """Without the check a rank would wait for ever: PyTorch loses the batch in a thread."""
    runs.write_clips(tmp_path / "clips", 7)
    runs.write_pairs(tmp_path / "pairs", 5)
    arguments = {"root": str(tmp_path), "when": when}
    ranks = fork_server.start("test_storage_errors:train_in_little_memory", arguments=arguments)
    assert ranks.wait() == [code], ranks.outputs()
    if cause:
        error = json.loads((tmp_path / "rank-0.error.json").read_text())
        assert error["cause"] == cause and re.search(words, error["message"]), error
        assert "/dev/shm" in error["message"] and "data.num_workers" in error["message"]


def report_under_full_memory(root: str) -> int:
    """Check that error files, heartbeats and stacks are written while /dev/shm is full."""
    from echolab.heartbeat import Heartbeat, heartbeat_path, read_heartbeat, stacks_path
    from echolab.launch import rank_process

    mount_shared(SHARED_BYTES)
    folder = rank_process.make_local_folder(range(2))
    assert str(folder).startswith("/dev/shm")
    fill_shared(0)
    heartbeat = Heartbeat(heartbeat_path(folder, 1))
    heartbeat.enter("data_wait", 3)
    seen = read_heartbeat(heartbeat_path(folder, 1))
    assert seen and (seen.section, seen.step) == ("data_wait", 3)
    rank_process.write_error_file(folder, 1, ValueError("x" * 20_000), "vote", 3)
    failure = rank_process.read_error_file(folder, 1)
    assert failure and failure.message == "x" * 20_000
    with stacks_path(folder, 1).open("ab") as file:
        file.write(b"stack\n" * 10_000)
    other = rank_process.make_local_folder([0])  # a start on a node that is full
    assert not str(other).startswith("/dev/shm")
    shutil.rmtree(other)
    return 0


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a file system")
def test_full_shared_memory_hides_no_report_of_a_rank(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    arguments = {"root": str(tmp_path)}
    fork_server.run("test_storage_errors:report_under_full_memory", arguments=arguments)
