"""Rank processes and what Linux says of them."""

import ctypes
import os
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
