"""Ranks that play a scripted part, and a supervisor of them.

`python rank_scripted.py rank FOLDER PARTS` starts one.  The ranks import no torch: each steps
through its sections, meets the others at a barrier of files, and at one moment does what its part
says.
"""

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from echolab.errors import BusyError, ConfigError, DataError
from echolab.heartbeat import Heartbeat, SectionTimeouts, heartbeat_from_environment
from echolab.launch import lease, rank_process
from echolab.launch.exit_codes import RETRYABLE
from echolab.launch.supervisor import Supervisor
from echolab.launch.topology import Topology
from echolab.training.signals import SIGNALS, StopSignals

STEPS = 60
# A file whose path says that it is a collective, as that of torch's own does.
BARRIER = """
import time
from pathlib import Path

def barrier(folder, rank, world, name):
    (Path(folder) / f"{name}-{rank}").touch()
    while not all((Path(folder) / f"{name}-{r}").exists() for r in range(world)):
        if (Path(folder) / "lost").exists():
            raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]")
        time.sleep(0.005)
"""


def collective(folder: Path) -> Any:
    """Wait at the barrier, from a file below torch/distributed."""
    path = folder / "torch" / "distributed" / "rank_scripted.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f"{os.getpid()}.py")
    own.write_text(BARRIER)
    own.replace(path)
    spec = importlib.util.spec_from_file_location("played_barrier", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.barrier


def act(part: str, folder: Path) -> None:
    """Do what the part says."""
    match part:
        case "loop":
            while True:
                pass
        case "fifo":
            (folder / "fifo").read_bytes()
        case "sleep":
            time.sleep(1000)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(1000)
        case "kill" | "term" | "segv":
            (folder / "lost").touch()
            if part == "term":
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), getattr(signal, f"SIG{part.upper()}"))
        case "quit":
            os._exit(3)
        case "bug":
            (folder / "lost").touch()
            raise ZeroDivisionError("a bug")
        case "config":
            raise ConfigError("model.dim=0: must be above 0")
        case "data":
            raise DataError("clips-000.tar: sample 3 is damaged")


def play(
    folder: Path, part: dict[str, Any], heartbeat: Heartbeat, signals: StopSignals
) -> tuple[str, int]:
    """Play all steps, or until a signal; return the reason of the end and the step."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    barrier = collective(folder)

    def at(section: str, step: int) -> None:
        heartbeat.enter(section, step)
        if part.get("at") == section and part.get("step", 3) <= step:
            act(part["does"], folder)

    if part.get("at") == "init":
        act(part["does"], folder)
    barrier(folder, rank, world, "start")
    for step in range(part.get("steps", STEPS)):
        for section in ("data_wait", "forward", "backward", "optimizer"):
            at(section, step)
            time.sleep(0.004)
        at("vote", step + 1)
        if signals.received and not part.get("deaf"):
            (folder / "asked").touch()
        barrier(folder, rank, world, f"step-{step}")
        asked = (folder / "asked").exists()
        barrier(folder, rank, world, f"agreed-{step}")
        if step % 10 == 9 or asked:
            at("save", step + 1)
            if rank == 0:
                saved = folder / f"run/checkpoints/step-{step + 1:06d}"
                saved.mkdir(parents=True, exist_ok=True)  # the launch before may have made it
        if asked:
            return "signal", step + 1
    at("teardown", STEPS)
    return "done", STEPS


def rank(folder: Path, parts: dict[str, Any]) -> None:
    """Run a rank as `echolab train` does, without training."""
    heartbeat, signals = heartbeat_from_environment(), StopSignals()
    signals.__enter__()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    number, to = int(os.environ["RANK"]), rank_process.local_folder()
    assert to
    try:
        part = parts.get(str(number), parts.get("all", {}))
        reason, step = play(folder, part, heartbeat, signals)
    except BaseException as error:
        os._exit(
            rank_process.write_error_file(to, number, error, heartbeat.section, heartbeat.step)
        )
    rank_process.write_end_file(
        to, number, rank_process.End(reason, signals.received, False, step, STEPS)
    )
    if (does := part.get("does", "")).startswith("late "):
        number = signal.Signals[f"SIG{does.removeprefix('late ')}"]
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)  # as Python does before it ends
        os.kill(os.getpid(), number)
    sys.exit(0 if reason == "done" else 75)


def supervise(folder: Path, parts: str, about: dict[str, Any]) -> None:
    """Run a supervisor; `about` has deadlines, ranks, and the supervisor's index and count."""
    count, world = about["ranks"], about.get("world", about["ranks"])
    number = about.get("supervisor", 0)
    topology = Topology(
        about.get("launch", "played"), number * count, count, 0, world, number, number,
        world // count, f"host-{number}", "127.0.0.1", 0,
    )  # fmt: skip
    command = [sys.executable, __file__, "rank", str(folder), parts]
    timeouts = SectionTimeouts(**about["timeouts"])
    for name, value in about.get("lease", {}).items():
        setattr(lease, name, value)
    try:
        grace = {int(number): seconds for number, seconds in about.get("grace", {}).items()}
        code = Supervisor(topology, command, folder / "run", timeouts, grace).watch()
    except BusyError as error:
        print(f"echolab: error: {error}", file=sys.stderr)
        code = RETRYABLE
    sys.exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        rank(Path(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        supervise(Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
