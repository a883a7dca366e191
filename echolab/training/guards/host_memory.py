"""Host memory of a rank and its loader workers, and the memory of its node.

Slow leaks end with the kernel killing some process.  A run that watches can save and restart first.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
GB = 1e9
SECONDS = 60.0  # between two looks: one costs milliseconds, and more in a process of 100 GB


def family(pid: int, proc: Path = PROC) -> list[int]:
    """Return a process and its descendants in the same session.

    A process with a session of its own, such as the tracker's, is not part of the training: its
    memory must not end a run.
    """
    children: dict[int, list[int]] = {}
    sessions: dict[int, int] = {}
    # Parents and sessions of all processes, in one pass over /proc.
    for folder in proc.iterdir():
        if folder.name.isdecimal() and (stat := _read_text(folder / "stat")):
            _, parent, _, session = stat.rpartition(")")[2].split()[:4]  # a name may hold anything
            children.setdefault(int(parent), []).append(int(folder.name))
            sessions[int(folder.name)] = int(session)
    processes = [pid]
    for process in processes:
        processes += [
            child for child in children.get(process, []) if sessions[child] == sessions.get(pid)
        ]
    return processes


def used(pid: int, proc: Path = PROC) -> int:
    """Return the bytes that a process keeps in memory; a page shared by n processes counts 1/n.

    If the kernel does not report shares (smaps_rollup), these are all resident bytes.
    """
    # Shared pages of loader workers would otherwise count once for each worker.
    for line in (_read_text(proc / str(pid) / "smaps_rollup") or "").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    pages = (_read_text(proc / str(pid) / "statm") or "0 0").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def used_by_family(pid: int, proc: Path = PROC) -> int:
    """Return the bytes of a process and all its descendants."""
    return sum(used(one, proc) for one in family(pid, proc))


def free(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Return the bytes that this process may still take, of the node and of its cgroups."""
    lines = (_read_text(proc / "meminfo") or "").splitlines()
    # The smallest of what node and cgroups leave.
    node = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    left = [max(0, limit - taken) for limit, taken in _cgroup_limits(proc, cgroups)]
    return min([*node, *left])


def capacity(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Return the bytes of memory of this node, or of the smallest cgroup; None if unknown."""
    lines = (_read_text(proc / "meminfo") or "").splitlines()
    node = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")]
    # A container may have less than its node.
    limits = [limit for limit, _ in _cgroup_limits(proc, cgroups)]
    return min([*node, *limits], default=None)


def _cgroup_limits(proc: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and usage in bytes, without file cache, of each cgroup that has a limit."""
    for line in (_read_text(proc / "self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, limit, usage, cache = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, cache = cgroups / "memory", "total_inactive_file"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = root / path.lstrip("/")
        # Limits of the groups above hold too; in a container the path may be the host's.
        for group in [own, *own.parents]:
            if group.is_relative_to(root):
                yield from _limit_and_usage(group, limit, usage, cache)


def _limit_and_usage(group: Path, limit: str, usage: str, cache: str) -> Iterator[tuple[int, int]]:
    most, taken = _read_text(group / limit), _read_text(group / usage)
    if most and taken and most.strip() != "max":
        stat = (line.split() for line in (_read_text(group / "memory.stat") or "").splitlines())
        cached = next((int(value) for name, value in stat if name == cache), 0)
        yield int(most), int(taken) - cached


def _read_text(path: Path) -> str | None:
    """Return the text of a file of the kernel; None if it is missing, or not readable."""
    try:
        return path.read_text()
    except OSError:
        return None


class HostMemory:
    """Watches this process and its children against a limit."""

    def __init__(self, limit_gb: float | None, seconds: float = SECONDS) -> None:
        """`limit_gb` is in 10^9 bytes a rank, its loader workers included; None: no limit."""
        self.limit_gb, self.seconds = limit_gb, seconds
        self._read_at, self._used = -float("inf"), 0.0

    @property
    def used_gb(self) -> float:
        """Bytes in use / 10^9, at most `seconds` old."""
        # Reading the shares of large processes is slow, so that it is done now and then.
        now = time.monotonic()
        if now - self._read_at >= self.seconds:
            self._used, self._read_at = used_by_family(os.getpid()) / GB, now
        return self._used

    def over(self) -> bool:
        """Return whether this rank should ask for a planned restart: save and stop.  Cheap."""
        return self.limit_gb is not None and self.used_gb > self.limit_gb

    def values(self) -> dict[str, float]:
        """Return values for the log in 10^9 bytes, of this rank and of its node."""
        return {"perf/host_memory_gb": self.used_gb, "perf/host_memory_free_gb": free() / GB}
