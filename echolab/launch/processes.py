"""Rank processes and what Linux says of them."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

PR_SET_PDEATHSIG = 1


class Seen(NamedTuple):
    """A process as /proc shows it."""

    state: str  # R running, S asleep, D in the disk, T stopped, Z ended; "" where it is gone
    cpu: float  # seconds, of all its threads


def start(
    command: Sequence[str], env: Mapping[str, str], output: IO[bytes] | None
) -> "subprocess.Popen[bytes]":
    """A process in a session of its own, which dies with this one.

    Ctrl-C does not reach it but through us, and what it forks can be killed with it.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    parent = os.getpid()

    def die_with_parent() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # died before it was asked for
                os._exit(1)

    return subprocess.Popen(
        list(command),
        env=dict(env),
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def see(pid: int) -> Seen:
    """State and CPU time of a process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return Seen("", 0.0)
    fields = text.rpartition(")")[2].split()  # the name before may hold anything
    ticks = int(fields[11]) + int(fields[12])
    return Seen(fields[0].upper(), ticks / os.sysconf("SC_CLK_TCK"))


def birth(pid: int) -> str:
    """Tells a process from another that has its pid: boot and start time; "" where it is gone."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else f"{boot}-{fields[19]}"


def catches(pid: int, number: int) -> bool:
    """Return whether a process has a handler for a signal, which would end it otherwise."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def remove_after(folder: Path) -> tuple[int, int]:
    """Remove a folder once this process has ended, be it by SIGKILL.

    Return what `removed` takes: a process that waits for the end of this one, and its pipe.
    """
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(reader)
        return pid, writer
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        os.closerange(3, reader)
        os.closerange(reader + 1, os.sysconf("SC_OPEN_MAX"))
        os.read(reader, 1)  # ends when the last writer is closed
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os._exit(0)


def removed(pid: int, writer: int) -> None:
    """Let the process of `remove_after` remove its folder, and wait for it."""
    os.close(writer)
    os.waitpid(pid, 0)


def ended(pid: int) -> bool:
    """Whether a child is no more, without reaping it: its group is still its own."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def send(pid: int, number: int) -> None:
    """A signal to a process that may be gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def kill_group(pid: int) -> None:
    """End a process and all it forked, stopped ones too."""
    for number in (signal.SIGKILL, signal.SIGCONT):
        try:
            os.killpg(pid, number)
        except (ProcessLookupError, PermissionError):
            return
