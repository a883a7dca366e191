"""Start processes on this machine and pass signals on: the ranks of a command, or one command."""

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType
from typing import Any, Self

from echolab.launch.exit_codes import STOPPED_SAVED
from echolab.training.signals import caught

GRACE_SECONDS = 30.0  # between one rank's failure and the end of the others


def started_by_launcher() -> bool:
    """Whether somebody (srun, torchrun, `run_ranks`) started this process as a rank."""
    if "SLURM_PROCID" in os.environ:
        return int(os.environ.get("SLURM_NTASKS", "1")) > 1
    return "LOCAL_RANK" in os.environ


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(command: list[str], count: int) -> int:
    """Run `command` as ranks 0 to count - 1; forward signals; the first failure ends all.

    Returns 0, or the exit code of the rank that failed first (128 + n for signal n).
    """
    common = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "NODE_RANK": "0",
    }
    ranks: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    before = {number: signal.signal(number, forward) for number in caught()}
    try:
        for number in range(count):
            own = {"RANK": str(number), "LOCAL_RANK": str(number)}
            # A session of its own: Ctrl-C reaches the ranks once, through us.
            ranks.append(subprocess.Popen(command, env={**common, **own}, start_new_session=True))
        return _wait(ranks)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
        for rank in ranks:
            rank.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list["subprocess.Popen[bytes]"]) -> int:
    first, deadline = 0, float("inf")
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        codes = [rank.poll() for rank in ranks]
        failed = [code for code in codes if code]
        if failed and not first:
            number = codes.index(failed[0])
            first, deadline = failed[0], time.monotonic() + GRACE_SECONDS
            if first != STOPPED_SAVED:
                print(f"echolab: rank {number} ended with {first}", file=sys.stderr, flush=True)
        time.sleep(0.05)
    first = first or next((rank.returncode for rank in ranks if rank.returncode), 0)
    return 128 - first if first < 0 else first


class SignalRelay:
    """Remember that this process was asked to stop, and pass signals on to the command it runs.

    The handlers before it come back at the end.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._relay) for number in caught()}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _relay(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if self._child and self._child.poll() is None:
            self._child.send_signal(number)

    def run(self, command: list[str]) -> int:
        """Run a command; return its exit code, which is 128 + n for signal n."""
        before = len(self.received)
        # In a session of its own, so that Ctrl-C reaches it once, through this process.
        child = subprocess.Popen(command, start_new_session=True)
        self._child = child
        try:
            for number in self.received[before:]:  # it came while the command started
                child.send_signal(number)
            code = child.wait()
        finally:
            self._child = None
            if child.poll() is None:
                child.kill()
                child.wait()
        return 128 - code if code < 0 else code
