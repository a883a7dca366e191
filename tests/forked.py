"""Ranks at the price of a fork: one process has imported torch, Lightning and DeepSpeed for all.

    def test_sum(fork_server):                      # of session scope, from conftest.py
        ranks = fork_server.start("forked:add_up", world=4, arguments={"to": str(file)})
        ranks.signal(signal.SIGTERM, rank=2)        # or to all
        assert ranks.wait(60) == [0, 0, 0, 0]       # exit codes; -9 after SIGKILL
        print(ranks.output(0))                      # stdout and stderr of rank 0
        fork_server.run("forked:add_up", world=2, arguments={...})  # all must end with 0

A function is named as "module:function", of tests or of echolab; every rank calls it with the same
arguments (JSON), and finds itself in RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
What it returns is its exit code (None: 0); what it raises is printed, and 1.  A launch of four
ranks costs about as much as importing the module of the function.  The server itself never runs a
tensor: a process with threads of OpenMP or autograd cannot be forked.
"""

import atexit
import ctypes
import faulthandler
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PRELOADED = ("torch", "pytorch_lightning", "deepspeed", "echolab.training.fit", "runs")
# After this long a launch hangs: far more than the slowest takes on a machine with other work.
HANGS = 900.0
PR_SET_PDEATHSIG = 1


class Ranks:
    """Processes that the server forked, by rank."""

    def __init__(self, server: "ForkServer", pids: list[int], folder: Path) -> None:
        self.server, self.pids, self.folder = server, pids, folder

    def codes(self) -> list[int | None]:
        """Exit codes; -n after signal n, None while it runs."""
        return self.server._ask({"poll": self.pids})["codes"]

    def signal(self, number: int, rank: int | None = None) -> None:
        """Signal one rank, or all; ranks that have ended are ignored."""
        for at, (pid, code) in enumerate(zip(self.pids, self.codes(), strict=True)):
            if code is None and rank in (None, at):
                os.kill(pid, number)

    def wait(self, seconds: float = HANGS) -> list[int]:
        """Wait until all ranks have ended, and return their exit codes.

        After a hang print the stacks, kill all ranks and raise TimeoutError.
        """
        deadline = time.monotonic() + seconds
        while None in (codes := self.codes()):
            if time.monotonic() > deadline:
                self.signal(signal.SIGCONT)
                self.signal(signal.SIGABRT)  # faulthandler writes the stacks
                time.sleep(1)
                self.signal(signal.SIGKILL)
                raise TimeoutError(f"codes {codes} after {seconds:g} s\n{self.outputs()}")
            time.sleep(0.02)
        return codes  # type: ignore[return-value]

    def output(self, rank: int) -> str:
        """Return what a rank wrote to stdout and stderr."""
        return (self.folder / f"rank-{rank}.txt").read_text(errors="replace")

    def outputs(self) -> str:
        """Return the outputs of all ranks, for the message of a failing test."""
        shown = (f"--- rank {at}\n{self.output(at)[-40_000:]}" for at in range(len(self.pids)))
        return "\n".join(shown)


class ForkServer:
    """The process that forks; ranks that are left are killed with it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        self._words = ours.makefile("rw")
        ours.close()
        self._outputs = tempfile.TemporaryDirectory(prefix="ranks-")
        self._count = 0

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self._words.write(json.dumps(request) + "\n")
        self._words.flush()
        return json.loads(self._words.readline())

    def start(
        self,
        function: str,
        *,
        world: int = 1,
        arguments: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Ranks:
        """Start `world` ranks that call `function`."""
        self._count += 1
        folder = Path(self._outputs.name) / str(self._count)
        folder.mkdir()
        for rank in range(world):
            (folder / f"rank-{rank}.txt").touch()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "NODE_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **(environment or {}),
        }
        call = {"function": function, "arguments": dict(arguments or {}), "folder": str(folder)}
        pids = self._ask({"start": call, "world": world, "environment": common})["pids"]
        return Ranks(self, pids, folder)

    def run(self, function: str, *, seconds: float = HANGS, **how: Any) -> Ranks:
        """Start ranks, wait, and assert that all ended with 0."""
        ranks = self.start(function, **how)
        codes = ranks.wait(seconds)
        assert not any(codes), f"codes {codes}\n{ranks.outputs()}"
        return ranks

    def close(self) -> None:
        """Kill what is left."""
        self._words.close()
        self._process.wait()
        self._outputs.cleanup()


# -- in the server ----------------------------------------------------------------------------


def _call(call: Mapping[str, Any], rank: int) -> int:
    """Run the function in a rank, and return its exit code."""
    import torch.distributed as dist

    module, name = call["function"].split(":")
    try:
        code = getattr(importlib.import_module(module), name)(**call["arguments"])
        if dist.is_initialized():
            dist.barrier()  # gloo aborts where one rank leaves while another still talks
            dist.destroy_process_group()
        return int(code or 0)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def _be_rank(call: Mapping[str, Any], rank: int, environment: Mapping[str, str]) -> None:
    """Become a rank; never return."""
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        out = os.open(f"{call['folder']}/rank-{rank}.txt", os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(out, stream)
        faulthandler.enable(2)
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
        code = _call(call, rank)
        atexit._run_exitfuncs()  # multiprocessing ends loader workers here
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _fork(request: Mapping[str, Any], words: Any) -> list[int]:
    pids = []
    for rank in range(request["world"]):
        if pid := os.fork():
            pids.append(pid)
        else:
            words.detach().close()
            _be_rank(request["start"], rank, request["environment"])
    return pids


def _poll(pid: int, ended: dict[int, int]) -> int | None:
    if pid not in ended:
        ended_pid, status = os.waitpid(pid, os.WNOHANG)
        if ended_pid:
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended.get(pid)


def forget(pids: list[int], ended: dict[int, int]) -> None:
    """Drop exit codes of earlier ranks: the kernel gives their pids to new ones."""
    for pid in pids:
        ended.pop(pid, None)


def serve(descriptor: int) -> None:
    """Answer until the other end is closed."""
    words = socket.socket(fileno=descriptor).makefile("rw")
    for name in PRELOADED:
        importlib.import_module(name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads after the imports: cannot be forked"
    started: set[int] = set()
    ended: dict[int, int] = {}
    for line in words:
        request = json.loads(line)
        if "start" in request:
            pids = _fork(request, words)
            started.update(pids)
            forget(pids, ended)
            answer: dict[str, Any] = {"pids": pids}
        else:
            answer = {"codes": [_poll(pid, ended) for pid in request["poll"]]}
        words.write(json.dumps(answer) + "\n")
        words.flush()
    for pid in started:
        if _poll(pid, ended) is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


# -- what its own test calls --------------------------------------------------------------------


def add_up(to: str) -> int:
    """Let all ranks meet over gloo and take a backward step; rank 0 writes the sum of their
    indices.
    """
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    number = torch.tensor(float(dist.get_rank() + 1), requires_grad=True)
    (number * 2).backward()
    total = number.grad.clone() / 2 * number.detach()  # type: ignore[union-attr]
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        Path(to).write_text(str(float(total)))
    return 0


def stay() -> int:
    """Wait until killed."""
    print("here", flush=True)
    while True:
        time.sleep(1)


def fail() -> None:
    """Raise an error on rank 1."""
    if os.environ["RANK"] == "1":
        raise ValueError("rank 1 has had enough")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    serve(int(sys.argv[1]))
