"""Child processes of one machine: start them, forward signals, read their state from /proc."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple, Self

from echolab.launch.exit_codes import STOPPED_SAVED
from echolab.training.signals import caught

PR_SET_PDEATHSIG = 1
GRACE_SECONDS = 30.0  # for the other ranks to end by themselves after one failed


class ProcessState(NamedTuple):
    """State of a process as /proc shows it."""

    state: str  # R running, S asleep, D disk wait, T stopped, Z zombie; "" if it does not exist
    cpu: float  # CPU seconds of all its threads


# -- start ----------------------------------------------------------------------------------------


def start(
    command: Sequence[str], env: Mapping[str, str], output: IO[bytes] | None
) -> "subprocess.Popen[bytes]":
    """Start a process in a new session; it is killed if this process dies.

    Ctrl-C reaches the new process only through this one, and its children can be killed with it.
    """
    # The kernel kills the child if this process dies, however it dies.
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    parent = os.getpid()

    def die_with_parent() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # the parent died before the request
                os._exit(1)

    return subprocess.Popen(
        list(command),
        env=dict(env),
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def started_by_launcher() -> bool:
    """Return whether a launcher (srun, torchrun, `run_ranks`) started this process as a rank."""
    # srun --ntasks=1 starts one task, which may start ranks itself.
    if "SLURM_PROCID" in os.environ:
        return int(os.environ.get("SLURM_NTASKS", "1")) > 1
    return "LOCAL_RANK" in os.environ


def free_port() -> int:
    """Return a TCP port that is currently free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(command: list[str], world_size: int) -> int:
    """Run `command` as ranks 0 to `world_size` - 1; forward signals, end all after a failure.

    Return 0, or the exit code of the rank that failed first (128 + n for signal n).
    """
    common = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "NODE_RANK": "0",
    }
    ranks: list[subprocess.Popen[bytes]] = []

    # Handlers first: a signal during the start must reach the ranks that run already.
    def forward(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    handlers = {number: signal.signal(number, forward) for number in caught()}
    try:
        for rank in range(world_size):
            env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # In a new session, so that Ctrl-C reaches the rank once, through this process.
            ranks.append(subprocess.Popen(command, env=env, start_new_session=True))
        return _wait(ranks)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
        for process in ranks:
            process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _wait(ranks: list["subprocess.Popen[bytes]"]) -> int:
    # After the first failure the other ranks get GRACE_SECONDS to end by themselves.
    first_code, deadline = 0, float("inf")
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        codes = [rank.poll() for rank in ranks]
        failed = [code for code in codes if code]
        if failed and not first_code:
            rank = codes.index(failed[0])
            first_code, deadline = failed[0], time.monotonic() + GRACE_SECONDS
            if first_code != STOPPED_SAVED:
                print(f"echolab: rank {rank} exited with code {first_code}", file=sys.stderr)
                sys.stderr.flush()
        time.sleep(0.05)
    first_code = first_code or next((rank.returncode for rank in ranks if rank.returncode), 0)
    return 128 - first_code if first_code < 0 else first_code


class SignalRelay:
    """Records the signals that ask this process to stop and forwards them to the command it runs.

    The previous handlers are restored at the end.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._child: subprocess.Popen[bytes] | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._relay) for number in caught()}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _relay(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if self._child and self._child.poll() is None:
            self._child.send_signal(number)

    def run(self, command: list[str]) -> int:
        """Run a command; return its exit code, which is 128 + n for signal n."""
        received = len(self.received)
        # In a new session, so that Ctrl-C reaches it once, through this process.
        child = subprocess.Popen(command, start_new_session=True)
        self._child = child
        try:
            for number in self.received[received:]:  # arrived while the command started
                child.send_signal(number)
            code = child.wait()
        finally:
            self._child = None
            if child.poll() is None:
                child.kill()
                child.wait()
        return 128 - code if code < 0 else code


# -- observe --------------------------------------------------------------------------------------


def process_state(pid: int) -> ProcessState:
    """Return the state and CPU time of a process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ProcessState("", 0.0)
    fields = text.rpartition(")")[2].split()  # skip the name, which may contain anything
    ticks = int(fields[11]) + int(fields[12])
    return ProcessState(fields[0].upper(), ticks / os.sysconf("SC_CLK_TCK"))


def process_identity(pid: int) -> str:
    """Return boot id and start time, which with the pid identify a process; "" if it ended."""
    # A later process may reuse the pid, but has another start time.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else f"{boot}-{fields[19]}"


def handles_signal(pid: int, number: int) -> bool:
    """Return whether a process has a handler for a signal; without one the signal would end it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    mask = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(mask, 16) >> (number - 1) & 1)


def has_ended(pid: int) -> bool:
    """Return whether a child ended, without reaping it, so that its process group stays valid."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


# -- end ------------------------------------------------------------------------------------------


def send(pid: int, number: int) -> None:
    """Send a signal to a process; do nothing if it has ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def kill_group(pid: int) -> None:
    """Kill a process and its children, suspended processes included."""
    # SIGKILL of a suspended process takes effect once it continues.
    for number in (signal.SIGKILL, signal.SIGCONT):
        try:
            os.killpg(pid, number)
        except (ProcessLookupError, PermissionError):
            return


def remove_at_exit(folder: Path) -> tuple[int, int]:
    """Start a process that removes a folder once this process ends, even by SIGKILL.

    Return its pid and the pipe that it waits on, for `remove_now`.
    """
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(reader)
        return pid, writer
    # The child: detach from the terminal, close everything but the pipe, and wait for its end.
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        os.closerange(3, reader)
        os.closerange(reader + 1, os.sysconf("SC_OPEN_MAX"))
        os.read(reader, 1)  # returns when the last writer is closed
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os._exit(0)


def remove_now(pid: int, writer: int) -> None:
    """Let the process of `remove_at_exit` remove its folder, and wait for it."""
    os.close(writer)
    os.waitpid(pid, 0)
