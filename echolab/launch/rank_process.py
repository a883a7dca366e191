"""One rank of a launch: the files in which it reports its end, and its state when the run fails.

The files lie in the node-local folder of the heartbeats: a full or hung shared file system, which
may be the cause of the end, cannot prevent a rank from writing them.  The supervisor copies error
files into the run folder.

    rank-N.error.json  an exception: type, message, traceback, time, section, step, cause
    rank-N.end.json    how training ended without an exception
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from echolab.errors import CollectiveError
from echolab.heartbeat import (
    LOCAL_DIR,
    SECTIONS,
    HeartbeatState,
    heartbeat_path,
    read_heartbeat,
    reserve_files,
    reserve_space,
    stacks_path,
)
from echolab.launch import processes
from echolab.launch.diagnosis import Failure, Observation
from echolab.launch.exit_codes import (
    CAUSES,
    DONE,
    PRUNED,
    STOPPED_SAVED,
    STOPPED_UNSAVED,
    cause_of_exception,
    cause_of_result,
)
from echolab.launch.processes import ProcessState
from echolab.redaction import mask_secrets
from echolab.training.guards.host_memory import family

PREFIX = "echolab-rank-"
TRACEBACK_CHARACTERS = 20_000  # kept from the end of a traceback
REPORT_BYTES = 1 << 17  # disk space reserved for an error file and an end file
DUMP_SECONDS = 2.0  # longest wait for the ranks to write their stacks
WORKERS_SECONDS = 0.5  # wait for data loader workers to write their stacks
STACK_CHARACTERS = 50_000


# -- files of a rank ------------------------------------------------------------------------------


class End(NamedTuple):
    """The end of training without an exception, from `FitResult`."""

    reason: str
    stopped_by: int
    unsaved: bool
    step: int
    steps: int


def make_local_folder(ranks: Iterable[int]) -> Path:
    """Make the node-local folder of these ranks, in memory if there is space, else on disk.

    Disk space is reserved for all that the ranks may write.  Raise OSError if there is none.
    """
    # Reserve the space of all files now, so that a disk that fills up later cannot hide an error.
    rank_list = list(ranks)
    parents = ["/dev/shm"] if os.access("/dev/shm", os.W_OK) else []
    for parent in (*parents, tempfile.gettempdir()):
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        try:
            for rank in rank_list:
                reserve_files(folder, rank)
                for path in (error_path(folder, rank), end_path(folder, rank)):
                    reserve_space(_partial(path), REPORT_BYTES)
            return folder
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            no_space = error
    raise no_space


def local_folder() -> Path | None:
    """Return the folder that this rank reports to; None if no supervisor started it."""
    folder = os.environ.get(LOCAL_DIR)
    return Path(folder) if folder else None


def error_path(folder: Path, rank: int) -> Path:
    """Return the path of a rank's error file."""
    return folder / f"rank-{rank}.error.json"


def end_path(folder: Path, rank: int) -> Path:
    """Return the path of the file in which a rank records how training ended."""
    return folder / f"rank-{rank}.end.json"


def write_error_file(folder: Path, rank: int, error: BaseException, section: str, step: int) -> int:
    """Write the error file of an exception; return the exit code for it.

    Secrets in the message and the traceback are masked, and the environment is not recorded.
    """
    # Keep the end of a long traceback, where the exception is.
    cause = cause_of_exception(error, section)
    text = mask_secrets("".join(traceback.format_exception(error)))[-TRACEBACK_CHARACTERS:]
    failure = Failure(type(error).__name__, mask_secrets(str(error)), cause, time.time(), text)
    if isinstance(error, CollectiveError):
        failure = failure._replace(shared=True, rank=error.rank)
    try:
        content = {**failure._asdict(), "section": section, "step": step}
        _write(error_path(folder, rank), content)
    except OSError:  # the exit code still carries the kind of failure
        pass
    return CAUSES[cause].exit_code


def write_end_file(folder: Path, rank: int, end: End) -> None:
    """Record how training ended."""
    _write(end_path(folder, rank), end._asdict())


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file atomically, in the disk space that was reserved for it."""
    partial = _partial(path)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT, 0o644)
    with open(descriptor, "wb") as file:
        file.write(json.dumps(content).encode())
    partial.replace(path)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def read_error_file(folder: Path, rank: int) -> Failure | None:
    """Read the exception that a rank recorded; None without one."""
    content = read_json(error_path(folder, rank))
    return Failure(**{name: content[name] for name in Failure._fields}) if content else None


def read_end_file(folder: Path, rank: int) -> End | None:
    """Read how training ended on a rank; None without a record."""
    content = read_json(end_path(folder, rank))
    return End(**content) if content else None


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON file; None if it does not exist or is incomplete."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return content


def is_planned(exit_code: int) -> bool:
    """Return whether a rank's exit code means an end that all ranks reach together."""
    return exit_code in (DONE, STOPPED_SAVED, STOPPED_UNSAVED, PRUNED)


# -- observation by the supervisor ----------------------------------------------------------------


class Rank:
    """A rank process: its heartbeat, its files and its exit code."""

    def __init__(self, rank: int, process: "subprocess.Popen[bytes]", folder: Path) -> None:
        self.rank, self.process, self.folder = rank, process, folder
        no_time = dict.fromkeys(SECTIONS, 0.0)
        self._state = HeartbeatState("init", 0, -1, 0, time.monotonic(), no_time, no_time)
        self.exit_code: int | None = None
        self.ended_at = 0.0

    @property
    def pid(self) -> int:
        """Id of the process and of its group."""
        return self.process.pid

    def poll(self) -> int | None:
        """Return the exit code, None while the rank runs; kill the children of an ended rank."""
        if self.exit_code is None and processes.has_ended(self.pid):
            processes.kill_group(self.pid)
            self.exit_code, self.ended_at = self.process.wait(), time.time()
            end = read_end_file(self.folder, self.rank)
            if self.exit_code < 0 and end:
                # A second signal, or a library that crashes in its destructors, during Python's
                # shutdown: training had ended already, and its checkpoint is complete.
                cause = cause_of_result(end.reason, unsaved=end.unsaved)
                self.exit_code = CAUSES[cause].exit_code
        return self.exit_code

    def heartbeat(self) -> HeartbeatState:
        """Read the heartbeat; before the first write the rank is in `init` since its start."""
        self._state = read_heartbeat(heartbeat_path(self.folder, self.rank)) or self._state
        return self._state


def observe(
    ranks: Sequence[Rank], folder: Path, host: str, overdue: Mapping[int, float]
) -> list[Observation]:
    """Record the state of all ranks, with the stacks of those that are alive.

    Stacks and error files are copied to `folder`.  This takes at most `DUMP_SECONDS`.
    """
    # Measure the CPU usage of the living ranks while they write their stacks.
    now = time.monotonic()
    states = {rank.rank: rank.heartbeat() for rank in ranks}
    alive = [rank for rank in ranks if rank.poll() is None]
    before = {rank.rank: processes.process_state(rank.pid) for rank in alive}
    stacks = dump_stacks(alive, before)
    seconds = max(time.monotonic() - now, 1e-3)
    observations = []
    for rank in ranks:
        heartbeat = states[rank.rank]
        process = before.get(rank.rank, ProcessState("", 0.0))
        # A rank that SIGQUIT ended before it had its handler still counts as alive.
        usage = 0.0
        if rank in alive:
            usage = max(processes.process_state(rank.pid).cpu - process.cpu, 0.0) / seconds
        # A worker or rank that a fatal signal killed has written its stack by itself.
        stack = stacks.get(rank.rank) or _read_from(stacks_path(rank.folder, rank.rank))
        with contextlib.suppress(OSError):  # a full disk: the diagnosis needs no files
            if stack:
                (folder / f"rank-{rank.rank}.stack").write_text(stack)
            if (error_file := error_path(rank.folder, rank.rank)).exists():
                shutil.copy(error_file, folder)
        observations.append(
            Observation(
                rank=rank.rank, host=host, section=heartbeat.section, step=heartbeat.step,
                switches=heartbeat.switches, stay=now - heartbeat.since, exit_code=rank.exit_code,
                ended_at=rank.ended_at, process_state=process.state, cpu_usage=usage,
                timeout=overdue.get(rank.rank, 0.0), stack=stack,
                failure=read_error_file(rank.folder, rank.rank),
            )
        )  # fmt: skip
    return observations


def dump_stacks(ranks: Sequence[Rank], states: Mapping[int, ProcessState]) -> dict[int, str]:
    """Return the stack traces of all threads and data loader workers, by rank.

    A suspended process is resumed, because otherwise it cannot write its stacks.
    """
    paths = {rank.rank: stacks_path(rank.folder, rank.rank) for rank in ranks}
    # Without a handler SIGQUIT would end the rank.
    responsive = [rank for rank in ranks if processes.handles_signal(rank.pid, signal.SIGQUIT)]
    begin = {rank.rank: paths[rank.rank].stat().st_size for rank in responsive}
    # The workers first, so that the main thread of the rank is the last in the file.
    workers = [pid for rank in responsive for pid in family(rank.pid) if pid != rank.pid]
    for pid in workers:
        if processes.handles_signal(pid, signal.SIGQUIT):
            processes.send(pid, signal.SIGQUIT)
    if workers:
        time.sleep(WORKERS_SECONDS)
    # Then the ranks themselves.
    after_workers = {rank.rank: paths[rank.rank].stat().st_size for rank in responsive}
    for rank in responsive:
        processes.send(rank.pid, signal.SIGQUIT)
        if states[rank.rank].state == "T":
            processes.send(rank.pid, signal.SIGCONT)
    # Wait until all files have grown and grow no more.
    end, sizes = time.monotonic() + DUMP_SECONDS, after_workers
    while time.monotonic() < end:
        time.sleep(0.2)
        present = {rank.rank: paths[rank.rank].stat().st_size for rank in responsive}
        if present == sizes and all(present[rank] > after_workers[rank] for rank in present):
            break
        sizes = present
    return {rank.rank: _read_from(paths[rank.rank], begin[rank.rank]) for rank in responsive}


def _read_from(path: Path, start: int = 0) -> str:
    """Read a stack file from byte `start` to its end; return "" if it does not exist."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")[-STACK_CHARACTERS:]
    except OSError:
        return ""
