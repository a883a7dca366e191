"""Heartbeat of a rank: the section of training that it is in, and the timeouts of sections.

A rank that hangs cannot report where it hangs.  It therefore records each section on entry, with
one write to a memory-mapped file that the supervisor on the same node reads.  The module imports no
large package, because the heartbeat starts before torch is imported.
"""

import ctypes
import errno
import faulthandler
import mmap
import os
import signal
import struct
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from echolab.errors import ConfigError

# Sections of training.  `vote` is the collective after each step in which all ranks agree to
# continue, save or stop.
SECTIONS = (
    "init", "data_wait", "forward", "backward", "optimizer", "vote", "eval", "save", "pause",
    "teardown",
)  # fmt: skip
# The sections of an optimizer step, which share one timeout.
STEP_SECTIONS = ("forward", "backward", "optimizer", "vote")
# Environment variable that holds the node-local folder of the ranks' heartbeats and error files.
LOCAL_DIR = "ECHOLAB_LOCAL_DIR"

# Layout of the file: number of writes, section index, step, first step, start of the section, then
# for each section the total and the longest seconds.  A CRC-32 follows, so that a reader can detect
# a write in progress.
LAYOUT = struct.Struct(f"=Qiqqd{len(SECTIONS)}d{len(SECTIONS)}d")
SIZE = LAYOUT.size + 4
_INDEX = {name: index for index, name in enumerate(SECTIONS)}

TICK_SECONDS = 2.0  # longest pause between two polls of a supervisor that is not suspended
STACKS_BYTES = 1 << 18  # disk space reserved for the stack traces of a rank and its workers
KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE


class HeartbeatState(NamedTuple):
    """Content of a heartbeat file."""

    section: str
    step: int  # optimizer steps done
    first_step: int  # first step that was recorded, -1 if none was
    switches: int  # number of sections entered
    since: float  # time.monotonic() of this node when the section was entered
    seconds: dict[str, float]  # total seconds by section, without the current stay
    longest: dict[str, float]  # longest single stay in seconds by section


class Heartbeat:
    """Measures the time spent in each section and publishes it in a file, if `path` is given.

    The process is in section `init` from construction on.  Raises OSError if the file cannot be
    created.
    """

    def __init__(self, path: Path | None) -> None:
        self.section, self.step, self.first_step, self.switches = "init", 0, -1, 0
        self.since = time.monotonic()
        self._seconds, self._longest = [0.0] * len(SECTIONS), [0.0] * len(SECTIONS)
        self._map: mmap.mmap | None = None
        if path is not None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                # Reserve the disk space now: a full disk raises OSError here, but would cause a
                # bus error on a write through the memory map.
                os.posix_fallocate(descriptor, 0, SIZE)
                self._map = mmap.mmap(descriptor, SIZE)
            finally:
                os.close(descriptor)
        self._publish()

    def enter(self, section: str, step: int | None = None) -> None:
        """End the current section and begin `section`; `step` counts the optimizer steps done.

        Takes microseconds.  Entering the current section again starts a new stay, which counts as
        progress.  Raises ValueError for an unknown section.
        """
        if section not in _INDEX:
            raise ValueError(f"no section {section!r}; one of {', '.join(SECTIONS)}")
        # Add the duration of the stay that ends to its section.
        index, now = _INDEX[self.section], time.monotonic()
        stay = now - self.since
        self._seconds[index] += stay
        self._longest[index] = max(self._longest[index], stay)
        # Begin the next stay.
        self.section, self.since = section, now
        self.switches += 1
        if step is not None:
            self.step = step
            self.first_step = step if self.first_step < 0 else self.first_step
        self._publish()

    @property
    def seconds(self) -> dict[str, float]:
        """Total seconds by section, without the current stay."""
        return dict(zip(SECTIONS, self._seconds, strict=True))

    @property
    def longest(self) -> dict[str, float]:
        """Longest stay in seconds by section, without the current stay."""
        return dict(zip(SECTIONS, self._longest, strict=True))

    def _publish(self) -> None:
        if self._map is not None:
            # Count writes from 1: a file of zeros was reserved but never written.
            writes = self.switches + 1
            values = (_INDEX[self.section], self.step, self.first_step, self.since)
            data = LAYOUT.pack(writes, *values, *self._seconds, *self._longest)
            self._map[:] = data + zlib.crc32(data).to_bytes(4, "little")


def heartbeat_path(folder: Path, rank: int) -> Path:
    """Return the path of a rank's heartbeat file."""
    return folder / f"rank-{rank}.heartbeat"


def stacks_path(folder: Path, rank: int) -> Path:
    """Return the path to which a rank writes its stack traces on SIGQUIT."""
    return folder / f"rank-{rank}.stacks"


def read_heartbeat(path: Path) -> HeartbeatState | None:
    """Read a heartbeat file; return None if it was never written, or only in part."""
    # Read again if the writer was in the middle of a write.
    for _ in range(100):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        if not any(content):  # reserved but never written
            return None
        data, crc = content[:-4], content[-4:]
        if len(content) == SIZE and zlib.crc32(data) == int.from_bytes(crc, "little"):
            break
        time.sleep(0.001)  # the writer may have been preempted during the write
    else:
        return None
    # Unpack the fields in the order of LAYOUT.
    writes, section, step, first_step, since, *durations = LAYOUT.unpack(data)
    count = len(SECTIONS)
    seconds = dict(zip(SECTIONS, durations[:count], strict=True))
    longest = dict(zip(SECTIONS, durations[count:], strict=True))
    return HeartbeatState(SECTIONS[section], step, first_step, writes - 1, since, seconds, longest)


def reserve_files(folder: Path, rank: int) -> None:
    """Create the heartbeat and stack files of a rank and reserve disk space for all later writes.

    If /dev/shm fills up later, this neither kills the rank nor hides why the rank ended.  Raises
    OSError if there is not enough space now.
    """
    Heartbeat(heartbeat_path(folder, rank))
    reserve_space(stacks_path(folder, rank), STACKS_BYTES)


def reserve_space(path: Path, size: int) -> None:
    """Create an empty file that can grow to `size` bytes even if the disk becomes full.

    Raises OSError if the disk has too little space now.  Does nothing more on file systems that
    cannot reserve space.
    """
    # os.posix_fallocate would change the file size; with KEEP_SIZE, fallocate only reserves space.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        if libc.fallocate(descriptor, KEEP_SIZE, 0, size) and ctypes.get_errno() == errno.ENOSPC:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def heartbeat_from_environment() -> Heartbeat:
    """Return the heartbeat of this rank; it writes a file if a supervisor started the rank.

    With a supervisor, SIGQUIT and fatal signals make this process write the stack traces of all its
    threads, even if Python is blocked in C code.  Forked child processes inherit this.
    """
    stacks = open_stacks_file()
    if stacks is None:
        return Heartbeat(None)
    faulthandler.register(signal.SIGQUIT, file=stacks, all_threads=True, chain=False)
    faulthandler.enable(stacks)
    return Heartbeat(heartbeat_path(Path(os.environ[LOCAL_DIR]), _rank()))


def _rank() -> int:
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def open_stacks_file() -> int | None:
    """Open the stack file of this rank and its workers; return None without a supervisor."""
    folder = os.environ.get(LOCAL_DIR)
    if not folder:
        return None
    path = stacks_path(Path(folder), _rank())
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


# -- timeouts of sections --------------------------------------------------------------------------


class SectionTimeouts(NamedTuple):
    """Timeouts in seconds.

    A step may take `safety_factor` times the longest step so far, but not less than
    `min_step_timeout` and not more than `step`.  The other timeouts are fixed, because work within
    one of these sections varies widely in length: `eval` covers validation and the export check,
    `save` a copy to host memory and a full checkpoint, `data_wait` a batch and the reference model.
    """

    init: float = 1800.0
    first_step: float = 1800.0
    step: float = 600.0
    eval: float = 3600.0
    save: float = 1800.0
    data_wait: float = 900.0
    teardown: float = 300.0
    safety_factor: float = 10.0
    min_step_timeout: float = 60.0

    def check(self) -> "SectionTimeouts":
        """Return self; raise ConfigError for a value that is not positive."""
        for name, value in self._asdict().items():
            if not value > 0:
                raise ConfigError(f"timeouts.{name}={value:g}: must be above 0 seconds")
        return self


def timeout_name(state: HeartbeatState) -> str | None:
    """Return the name of the timeout that applies to a rank, or None during a pause."""
    if state.section == "pause":
        return None
    if state.section not in STEP_SECTIONS:
        return state.section
    # The first step also compiles, allocates memory and selects kernels.
    return "step" if 0 <= state.first_step < state.step - 1 else "first_step"


def allowed_seconds(timeouts: SectionTimeouts, name: str, longest: Mapping[str, float]) -> float:
    """Return the seconds that timeout `name` allows; `longest` has the longest stay by section."""
    upper_bound = float(getattr(timeouts, name))
    if name != "step" or not (longest_step := max(longest[section] for section in STEP_SECTIONS)):
        return upper_bound
    return min(max(timeouts.safety_factor * longest_step, timeouts.min_step_timeout), upper_bound)


def longest_stays(states: Iterable[HeartbeatState]) -> dict[str, float]:
    """Return the longest stay in seconds of any rank, by section."""
    stays: dict[str, float] = {}
    for state in states:
        for section, seconds in state.longest.items():
            stays[section] = max(stays.get(section, 0.0), seconds)
    return stays


def overdue_ranks(
    states: Mapping[int, HeartbeatState],
    now: float,
    timeouts: SectionTimeouts,
    *,
    has_remote_ranks: bool = False,
) -> dict[int, float]:
    """Return the ranks that exceeded their timeout, each with that timeout in seconds.

    A rank within a step waits for the slowest rank.  Such a rank is not overdue while another rank
    at the same or an earlier step loads data, validates or saves within its own timeout.  Ranks on
    other nodes cannot be observed: with `has_remote_ranks`, a step may take as long as a wait for
    data.
    """
    # Find the ranks that exceeded their timeout.
    longest = longest_stays(states.values())
    limits: dict[int, float] = {}
    for rank, state in states.items():
        if name := timeout_name(state):
            limits[rank] = allowed_seconds(timeouts, name, longest)
            if has_remote_ranks and name == "step":
                limits[rank] = max(limits[rank], allowed_seconds(timeouts, "data_wait", longest))
    overdue = {rank: limits[rank] for rank in limits if now - states[rank].since > limits[rank]}

    # Exclude ranks that wait for a rank that is still within its timeout.
    def is_excused(rank: int) -> bool:
        return states[rank].section in STEP_SECTIONS and any(
            state.section not in STEP_SECTIONS and state.step <= states[rank].step
            for peer, state in states.items()
            if peer in limits and peer not in overdue
        )

    return {rank: seconds for rank, seconds in overdue.items() if not is_excused(rank)}


def stop_timeout(
    timeouts: SectionTimeouts, grace: float | None, states: Iterable[HeartbeatState]
) -> float | None:
    """Return the seconds after a signal within which a step must end, or None without a limit.

    `grace` is the time in seconds until the ranks are killed, or None if they are not killed.
    Without `grace`, a step may take its usual time and the other sections have their own timeouts.
    There is no limit once a rank is saving or exiting.
    """
    # Ranks that save or exit are already stopping.
    states = list(states)
    sections = {state.section for state in states}
    if sections & {"save", "teardown"}:
        return None
    if grace is not None:
        return grace
    if sections - {*STEP_SECTIONS, "data_wait"}:
        return None
    longest = longest_stays(states)
    data_wait = min(timeouts.safety_factor * longest["data_wait"], timeouts.data_wait)
    return max(allowed_seconds(timeouts, "step", longest), data_wait)


class RunningClock:
    """Clock that excludes gaps in which this process did not run.

    A suspended job or a sleeping machine causes such a gap, in which ranks cannot make progress.
    """

    def __init__(self) -> None:
        self._last_tick = time.monotonic()
        self._gaps: list[tuple[float, float]] = []

    def tick(self) -> float:
        """Return time.monotonic() and record a gap if there was one; call at least every 2 s."""
        now = time.monotonic()
        if now - self._last_tick > TICK_SECONDS:
            self._gaps.append((self._last_tick + TICK_SECONDS, now))
        self._last_tick = now
        return now

    def elapsed(self, since: float) -> float:
        """Return the seconds from `since` (time.monotonic()) to the last tick, without gaps."""
        gaps = sum(max(end - max(begin, since), 0.0) for begin, end in self._gaps)
        return self._last_tick - since - gaps
