"""Which section of training a rank is in, told to whoever watches through a small mapped file.

A rank that hangs cannot say where.  So it says beforehand, each time it enters a section, by one
write to memory that another process of the node reads.  Nothing heavy is imported: this is in place
before torch is.
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
from pathlib import Path
from typing import NamedTuple

SECTIONS = (
    "init", "data_wait", "forward", "backward", "optimizer", "vote", "eval", "save", "pause",
    "teardown",
)  # fmt: skip
FOLDER = "ECHOLAB_BEATS"  # the node-local folder, in the environment

# Switches and one more; section, step, first step, start of the section; seconds in all and the
# longest stay, by section.  A CRC-32 follows: a reader that comes amid a write knows it.
LAYOUT = struct.Struct(f"=Qiqqd{len(SECTIONS)}d{len(SECTIONS)}d")
SIZE = LAYOUT.size + 4
_INDEX = {name: number for number, name in enumerate(SECTIONS)}


class Beat(NamedTuple):
    """What a rank told last."""

    section: str
    step: int  # optimizer steps done
    first: int  # the first that it told, -1 before
    switches: int  # sections entered
    since: float  # time.monotonic() of this node at which the section was entered
    seconds: dict[str, float]  # by section, without the present stay
    longest: dict[str, float]


class Beats:
    """Measures sections and tells them; with no path it tells nobody.

    The process is in `init` from here on.  Raises OSError where the file cannot be made.
    """

    def __init__(self, path: Path | None) -> None:
        self.section, self.step, self.first, self.switches = "init", 0, -1, 0
        self.since = time.monotonic()
        self._seconds, self._longest = [0.0] * len(SECTIONS), [0.0] * len(SECTIONS)
        self._map: mmap.mmap | None = None
        if path is not None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                # Room that is not there is an OSError here, and would be a bus error later.
                os.posix_fallocate(descriptor, 0, SIZE)
                self._map = mmap.mmap(descriptor, SIZE)
            finally:
                os.close(descriptor)
        self._tell()

    def enter(self, section: str, step: int | None = None) -> None:
        """End the present section and begin `section`; `step` is optimizer steps done.

        Microseconds.  Entering the section one is in begins it anew: that is progress too.
        """
        if section not in _INDEX:
            raise ValueError(f"no section {section!r}; one of {', '.join(SECTIONS)}")
        here, now = _INDEX[self.section], time.monotonic()
        stay = now - self.since
        self._seconds[here] += stay
        self._longest[here] = max(self._longest[here], stay)
        self.section, self.since = section, now
        self.switches += 1
        if step is not None:
            self.step = step
            self.first = step if self.first < 0 else self.first
        self._tell()

    @property
    def seconds(self) -> dict[str, float]:
        """In all, by section; the present stay is not in it."""
        return dict(zip(SECTIONS, self._seconds, strict=True))

    @property
    def longest(self) -> dict[str, float]:
        """The longest stay, by section."""
        return dict(zip(SECTIONS, self._longest, strict=True))

    def _tell(self) -> None:
        if self._map is not None:
            count = self.switches + 1  # a file of zeros is one that nothing was told in
            values = (_INDEX[self.section], self.step, self.first, self.since)
            data = LAYOUT.pack(count, *values, *self._seconds, *self._longest)
            self._map[:] = data + zlib.crc32(data).to_bytes(4, "little")


def beats_path(folder: Path, rank: int) -> Path:
    """The mapped file of a rank."""
    return folder / f"rank-{rank}.beats"


def stacks_path(folder: Path, rank: int) -> Path:
    """Where a rank writes its stacks when it gets SIGQUIT."""
    return folder / f"rank-{rank}.stacks"


def read_beat(path: Path) -> Beat | None:
    """What a rank told last; None where it has told nothing yet, or was stopped amid a write."""
    for _ in range(100):
        try:
            whole = path.read_bytes()
        except FileNotFoundError:
            return None
        if not any(whole):  # reserved, and nothing told
            return None
        data, crc = whole[:-4], whole[-4:]
        if len(whole) == SIZE and zlib.crc32(data) == int.from_bytes(crc, "little"):
            break
        time.sleep(0.001)  # the writer may have lost its core amid the write
    else:
        return None
    told, section, step, begun, since, *rest = LAYOUT.unpack(data)
    count = len(SECTIONS)
    seconds = dict(zip(SECTIONS, rest[:count], strict=True))
    longest = dict(zip(SECTIONS, rest[count:], strict=True))
    return Beat(SECTIONS[section], step, begun, told - 1, since, seconds, longest)


STACKS_ROOM = 1 << 18  # bytes that are kept free for the stacks of a rank and its workers
KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE


def reserve(folder: Path, rank: int) -> None:
    """Make the files of a rank, with room on the disk for all that is written to them later.

    So a /dev/shm that is full later neither kills the rank nor hides why it ended.  Raise OSError
    if there is no room now.
    """
    Beats(beats_path(folder, rank))
    keep_room(stacks_path(folder, rank), STACKS_ROOM)


def keep_room(path: Path, size: int) -> None:
    """Make an empty file that can grow to `size` bytes on a full disk; raise OSError if it cannot.

    File systems that keep no room are taken as they are.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        if libc.fallocate(descriptor, KEEP_SIZE, 0, size) and ctypes.get_errno() == errno.ENOSPC:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def beats_from_environment() -> Beats:
    """Those of this rank, in the folder that its supervisor named; else such as tell nobody.

    SIGQUIT then makes this process write the stacks of all its threads, even where Python is
    blocked in C; so does a fault that kills it.  Both hold for processes that are forked from it.
    """
    stacks = stacks_of_environment()
    if stacks is None:
        return Beats(None)
    faulthandler.register(signal.SIGQUIT, file=stacks, all_threads=True, chain=False)
    faulthandler.enable(stacks)
    return Beats(beats_path(Path(os.environ[FOLDER]), _rank()))


def _rank() -> int:
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def stacks_of_environment() -> int | None:
    """Open the file of this rank's stacks, for it and its workers; None without a supervisor."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return None
    path = stacks_path(Path(folder), _rank())
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
