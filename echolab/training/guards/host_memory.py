"""Host memory of a rank with its loader workers, and of its node.

With a slow leak, the kernel finally kills a process.  A run with a memory limit saves and restarts
before.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
GB = 1e9
SECONDS = 60.0  # between two measurements: each takes milliseconds, more for 100 GB processes


def family(pid: int, proc: Path = PROC) -> list[int]:
    """Return the ids of a process and its descendants in the same session.

    A descendant in another session, such as the tracker's process, is excluded, since its memory
    must not end a run.
    """
    children: dict[int, list[int]] = {}
    sessions: dict[int, int] = {}
    # Read parents and sessions of all processes in one pass over /proc.
    for folder in proc.iterdir():
        if folder.name.isdecimal() and (stat := _read_text(folder / "stat")):
            _, parent, _, session = stat.rpartition(")")[2].split()[:4]  # (name) may contain ")"
            children.setdefault(int(parent), []).append(int(folder.name))
            sessions[int(folder.name)] = int(session)
    processes = [pid]
    for process in processes:
        processes += [
            child for child in children.get(process, []) if sessions[child] == sessions.get(pid)
        ]
    return processes


def used(pid: int, proc: Path = PROC) -> int:
    """Return the proportional set size in bytes: a page shared by n processes counts 1/n.

    If the kernel does not report it (smaps_rollup), return the resident set size.
    """
    # The resident set size would count pages shared with loader workers once per worker.
    for line in (_read_text(proc / str(pid) / "smaps_rollup") or "").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    pages = (_read_text(proc / str(pid) / "statm") or "0 0").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def used_by_family(pid: int, proc: Path = PROC) -> int:
    """Return the bytes used by a process and its descendants."""
    return sum(used(member, proc) for member in family(pid, proc))


def free(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Return the bytes that this process can still allocate on its node and in its cgroups."""
    lines = (_read_text(proc / "meminfo") or "").splitlines()
    # The smallest remainder of node and cgroups applies.
    node = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    remaining = [max(0, limit - usage) for limit, usage in _cgroup_limits(proc, cgroups)]
    return min([*node, *remaining])


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
        own_group = root / path.lstrip("/")
        # Limits of parent groups apply too; in a container the path may be that of the host.
        for group in [own_group, *own_group.parents]:
            if group.is_relative_to(root):
                yield from _limit_and_usage(group, limit, usage, cache)


def _limit_and_usage(group: Path, limit: str, usage: str, cache: str) -> Iterator[tuple[int, int]]:
    limit_text, usage_text = _read_text(group / limit), _read_text(group / usage)
    if limit_text and usage_text and limit_text.strip() != "max":
        stat = (line.split() for line in (_read_text(group / "memory.stat") or "").splitlines())
        cached = next((int(value) for name, value in stat if name == cache), 0)
        yield int(limit_text), int(usage_text) - cached


def _read_text(path: Path) -> str | None:
    """Return the text of a kernel file; None if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return None


class HostMemory:
    """Compares the memory of this process and its children with a limit."""

    def __init__(self, limit_gb: float | None, seconds: float = SECONDS) -> None:
        """Set the limit per rank with its loader workers in 10^9 bytes; None: no limit."""
        self.limit_gb, self.seconds = limit_gb, seconds
        self._read_at, self._used = -float("inf"), 0.0

    @property
    def used_gb(self) -> float:
        """Bytes in use / 10^9, at most `seconds` old."""
        # Measure only every `seconds`, since this is slow for large processes.
        now = time.monotonic()
        if now - self._read_at >= self.seconds:
            self._used, self._read_at = used_by_family(os.getpid()) / GB, now
        return self._used

    def over(self) -> bool:
        """Return whether this rank exceeds the limit and should save and stop.  Cheap."""
        return self.limit_gb is not None and self.used_gb > self.limit_gb

    def values(self) -> dict[str, float]:
        """Return the memory used by this rank and free on its node, in 10^9 bytes, to log."""
        return {"perf/host_memory_gb": self.used_gb, "perf/host_memory_free_gb": free() / GB}
