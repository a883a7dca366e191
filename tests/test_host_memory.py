"""Memory of a process and its children, and what cgroups leave of the node's memory."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from echolab.training.guards.host_memory import (
    HostMemory,
    capacity,
    family,
    free,
    used,
    used_by_family,
)

MB = 1 << 20
LEAK = """
import os, subprocess, sys
if sys.argv[1] == "parent":
    sys.exit(subprocess.call([sys.executable, "-c", os.environ["LEAK"], "child"]))
kept = []
for line in sys.stdin:
    kept.append(os.urandom(1 << 20) * 20)
    print(len(kept), flush=True)
"""


def test_a_leak_in_a_grandchild_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", LEAK, "parent"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "LEAK": LEAK}, text=True, process_group=0,
    )  # fmt: skip
    assert child.stdin and child.stdout

    def leak() -> None:
        child.stdin.write("more\n")  # type: ignore[union-attr]
        child.stdin.flush()  # type: ignore[union-attr]
        child.stdout.readline()  # type: ignore[union-attr]

    try:
        leak()
        watch, patient = HostMemory(None, seconds=0), HostMemory(None, seconds=1000)
        first, before = watch.used_gb, patient.used_gb
        limited = HostMemory((first * 1e9 + 50 * MB) / 1e9, seconds=0)
        assert not limited.over() and not watch.over()
        for _ in range(5):
            leak()
        assert 95 * MB < (watch.used_gb - first) * 1e9 < 130 * MB
        assert limited.over() and not watch.over()
        assert patient.used_gb == before  # it looks now and then
        values = watch.values()
        assert values["perf/host_memory_gb"] == pytest.approx(watch.used_gb, rel=0.1)
        assert 0 < values["perf/host_memory_free_gb"] < 1e6
        pids = family(os.getpid())
        assert pids[0] == os.getpid() and child.pid in pids and len(pids) >= 3
        assert used_by_family(os.getpid()) >= used(child.pid) + used(os.getpid())
    finally:
        os.killpg(child.pid, 9)
        child.wait()
    deadline = time.monotonic() + 600
    while child.pid in family(os.getpid()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert used(child.pid) == 0  # it is gone: no error


def put(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    put(tmp_path / "proc", meminfo="MemTotal: 900 kB\nMemFree: 100 kB\nMemAvailable: 800 kB\n")
    return tmp_path / "proc"


def test_without_cgroups_the_nodes_memory_counts(proc: Path, tmp_path: Path) -> None:
    assert free(proc, tmp_path / "none") == 800 * 1024
    assert capacity(proc, tmp_path / "none") == 900 * 1024
    assert capacity(tmp_path / "no-proc") is None
    put(proc / "self", cgroup="0::/not/there\n")
    assert free(proc, tmp_path / "none") == 800 * 1024


def test_cgroups_v2_limit_the_memory(proc: Path, tmp_path: Path) -> None:
    put(proc / "self", cgroup="0::/job/step\n")
    groups = tmp_path / "cgroup"
    put(groups / "job/step", memory__max="max\n", memory__current="5000\n")
    assert free(proc, groups) == 800 * 1024
    # What files in memory take is given back when it is wanted.
    put(groups / "job", memory__max="9000\n", memory__current="8000\n")
    put(groups / "job", memory__stat="anon 6000\ninactive_file 1500\n")
    assert free(proc, groups) == 2500
    put(groups / "job/step", memory__max="6000\n")
    assert free(proc, groups) == 1000
    assert capacity(proc, groups) == 6000
    put(groups / "job/step", memory__current="7000\n")
    assert free(proc, groups) == 0


def test_cgroups_v1_limit_the_memory(proc: Path, tmp_path: Path) -> None:
    put(proc / "self", cgroup="5:devices:/x\n4:cpu,memory:/slurm/job\n0::/\n")
    groups = tmp_path / "cgroup"
    unlimited = {"memory__limit_in_bytes": "9223372036854771712", "memory__usage_in_bytes": "1"}
    put(groups / "memory", **unlimited)
    put(groups / "memory/slurm/job", memory__limit_in_bytes="7000", memory__usage_in_bytes="6000")
    put(groups / "memory/slurm/job", memory__stat="inactive_file 1\ntotal_inactive_file 300\n")
    assert free(proc, groups) == 1300
    assert capacity(proc, groups) == 7000
    # In a container the path is the host's, and the group's files lie at the root.
    put(proc / "self", cgroup="4:memory:/docker/0123\n")
    put(groups / "memory", memory__limit_in_bytes="5000", memory__usage_in_bytes="4000")
    assert free(proc, groups) == 1000


def test_a_process_with_a_session_of_its_own_is_not_counted(tmp_path: Path) -> None:
    """The tracker has such a session: however large it grows, the run continues."""
    put(tmp_path / "7", statm="1 1 1", stat="7 (rank) S 1 7 7")
    put(tmp_path / "8", statm="1 1 1", stat="8 (worker) S 7 7 7")
    put(tmp_path / "9", statm="1 99999 1", stat="9 (tracker) S 7 9 9")
    put(tmp_path / "10", statm="1 99999 1", stat="10 (wandb-core) S 9 10 10")
    assert family(7, tmp_path) == [7, 8]


def test_kernels_without_proportional_shares_are_supported(tmp_path: Path) -> None:
    put(tmp_path / "7", statm="900 25 3 1 0 4 0\n", stat="7 (a b) c) S 1 7 7")
    put(tmp_path / "8", stat="8 (x) S 7 7 7", statm="1 1 1", smaps_rollup="Rss: 9 kB\nPss: 3 kB\n")
    put(tmp_path / "9", stat="9 (y) S 1 7 7", statm="1 1 1")
    page = os.sysconf("SC_PAGE_SIZE")
    assert family(7, tmp_path) == [7, 8] and used(7, tmp_path) == 25 * page
    assert used_by_family(7, tmp_path) == 25 * page + 3 * 1024
