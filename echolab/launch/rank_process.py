"""One rank as its supervisor sees it, and the observation of all of them when a run fails."""

import contextlib
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from echolab.heartbeat import SECTIONS, Beat, beats_path, read_beat, stacks_path
from echolab.launch import processes
from echolab.launch.diagnosis import STOPPING, Observation
from echolab.launch.error_files import end_of, error_path, failure_of
from echolab.launch.exit_codes import CAUSES, cause_of_result
from echolab.launch.processes import Seen
from echolab.training.guards.host_memory import family

DUMP_SECONDS = 2.0  # the most that ranks are given to write their stacks
WORKERS_SECONDS = 0.5  # for the workers of ranks to write theirs
STACK_CHARACTERS = 50_000


class Rank:
    """A process, where it tells its sections, and its end."""

    def __init__(self, number: int, process: "subprocess.Popen[bytes]", beats: Path) -> None:
        self.number, self.process, self.beats = number, process, beats
        nothing = dict.fromkeys(SECTIONS, 0.0)
        self._told = Beat("init", 0, -1, 0, time.monotonic(), nothing, nothing)
        self.exit: int | None = None
        self.died = 0.0

    @property
    def pid(self) -> int:
        """Of the process, and of its group."""
        return self.process.pid

    def look(self) -> int | None:
        """Its exit code, None while it lives; what it left behind ends with it."""
        if self.exit is None and processes.ended(self.pid):
            processes.kill_group(self.pid)
            self.exit, self.died = self.process.wait(), time.time()
            if -self.exit in STOPPING and (end := end_of(self.beats, self.number)):
                # A second signal while Python tidied up: training had ended before.
                cause = cause_of_result(end.reason, unsaved=end.unsaved)
                self.exit = CAUSES[cause].exit_code
        return self.exit

    def beat(self) -> Beat:
        """What it told last; in `init` since its start, where it has told nothing yet."""
        self._told = read_beat(beats_path(self.beats, self.number)) or self._told
        return self._told


def observe(
    ranks: Sequence[Rank], folder: Path, host: str, late: dict[int, float]
) -> list[Observation]:
    """Everything that can be seen of the ranks, with the stacks of those that live.

    The stacks, and what ranks told of exceptions, lie in `folder` afterwards.  Takes `DUMP_SECONDS`
    at most.
    """
    now = time.monotonic()
    beats = {rank.number: rank.beat() for rank in ranks}
    living = [rank for rank in ranks if rank.look() is None]
    before = {rank.number: processes.see(rank.pid) for rank in living}
    stacks = dump(living, before)
    took = max(time.monotonic() - now, 1e-3)
    seen = []
    for rank in ranks:
        number, beat = rank.number, beats[rank.number]
        state, cpu = before.get(number, Seen("", 0.0))
        # Where it ended meanwhile, by SIGQUIT before it could take it, it was alive all the same.
        busy = max(processes.see(rank.pid).cpu - cpu, 0.0) / took if rank in living else 0.0
        # A worker or rank that a fault killed has written its stack by itself.
        stack = stacks.get(number) or _written(stacks_path(rank.beats, number))
        with contextlib.suppress(OSError):  # a full disk: the verdict needs no file
            if stack:
                (folder / f"rank-{number}.stack").write_text(stack)
            if (told := error_path(rank.beats, number)).exists():
                shutil.copy(told, folder)
        seen.append(
            Observation(
                rank=number, host=host, section=beat.section, step=beat.step,
                switches=beat.switches, stay=now - beat.since, exit=rank.exit, died=rank.died,
                state=state, busy=busy, late=late.get(number, 0.0), stack=stack,
                failure=failure_of(rank.beats, number),
            )
        )  # fmt: skip
    return seen


def dump(ranks: Sequence[Rank], seen: dict[int, Seen]) -> dict[int, str]:
    """Stacks of all threads by rank, of those that can write them, below those of its workers.

    A stopped process writes them as soon as it goes on, so it is made to.
    """
    paths = {rank.number: stacks_path(rank.beats, rank.number) for rank in ranks}
    asked = [rank for rank in ranks if processes.catches(rank.pid, signal.SIGQUIT)]
    before = {rank.number: paths[rank.number].stat().st_size for rank in asked}
    workers = [pid for rank in asked for pid in family(rank.pid) if pid != rank.pid]
    for pid in workers:
        if processes.catches(pid, signal.SIGQUIT):
            processes.send(pid, signal.SIGQUIT)
    if workers:
        time.sleep(WORKERS_SECONDS)  # the rank's own stack is the last
    own = {rank.number: paths[rank.number].stat().st_size for rank in asked}
    for rank in asked:
        processes.send(rank.pid, signal.SIGQUIT)
        if seen[rank.number].state == "T":
            processes.send(rank.pid, signal.SIGCONT)
    end, sizes = time.monotonic() + DUMP_SECONDS, own
    while time.monotonic() < end:
        time.sleep(0.2)
        now = {rank.number: paths[rank.number].stat().st_size for rank in asked}
        if now == sizes and all(now[number] > own[number] for number in now):
            break
        sizes = now
    # The main thread of the rank is the last.
    return {rank.number: _written(paths[rank.number], before[rank.number]) for rank in asked}


def _written(path: Path, start: int = 0) -> str:
    """What stands in a file of stacks from byte `start` on, "" where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")[-STACK_CHARACTERS:]
    except OSError:
        return ""
