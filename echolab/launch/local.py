"""Starts the ranks of one machine, and ends with the exit code that tells what happened."""

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from echolab.launch.exit_codes import STOPPED_SAVED

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


def run_ranks(command: list[str], count: int, *, alone: bool = False) -> int:
    """Run `command` as ranks 0 to count - 1; forward signals; the first failure ends all.

    With `alone` it is one process and no rank, which may start ranks of its own.
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

    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, forward) for number in caught}
    try:
        for number in range(count):
            own = {"RANK": str(number), "LOCAL_RANK": str(number)}
            environment = dict(os.environ) if alone else {**common, **own}
            # A session of its own: Ctrl-C reaches the ranks once, through us.
            ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))
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
