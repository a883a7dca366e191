"""The diagnosis of a failed launch, the timeouts and the topology: pure functions, by tables."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from echolab.data.download import FetchError, UnreachableError
from echolab.errors import CheckpointError as Damaged
from echolab.errors import (
    CollectiveError,
    ConfigError,
    DataError,
    DiskFullError,
    DivergedError,
    EcholabError,
    ParityError,
    ReplicaError,
    SaveError,
    SharedMemoryError,
    StorageError,
    WorkerError,
)
from echolab.heartbeat import (
    SECTIONS,
    HeartbeatState,
    SectionTimeouts,
    allowed_seconds,
    overdue_ranks,
)
from echolab.launch.diagnosis import Failure, Observation, find_root_cause, in_collective
from echolab.launch.exit_codes import CAUSES, cause_of_exception
from echolab.launch.explain import failure_message
from echolab.launch.launch_records import NodeRecord
from echolab.launch.rank_process import read_error_file, write_error_file
from echolab.launch.topology import cpu_warning, find_topology, slurm_address

COLLECTIVE = """Thread 0x00007f0000000001 (most recent call first):
  File "/lib/threading.py", line 324 in wait

Current thread 0x00007f0000000000 (most recent call first):
  File "/site-packages/torch/distributed/distributed_c10d.py", line 2806 in all_reduce
  File "/echolab/training/distributed.py", line 40 in sums
"""
BACKWARD = """Current thread 0x00007f0000000000 (most recent call first):
  File "/site-packages/torch/autograd/graph.py", line 865 in _engine_run_backward
"""
ELSEWHERE = """Thread 0x00007f0000000001 (most recent call first):
  File "/site-packages/torch/distributed/distributed_c10d.py", line 2806 in all_reduce

Current thread 0x00007f0000000000 (most recent call first):
  File "/echolab/data/tars.py", line 31 in read
  File "/site-packages/torch/autograd/graph.py", line 865 in _engine_run_backward
"""
PEER = "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"


def seen(rank: int, **changes: Any) -> Observation:
    fields: dict[str, Any] = {
        "host": "n1", "section": "vote", "step": 7, "switches": 40, "stay": 61.0,
        "process_state": "S", "stack": COLLECTIVE, **changes,
    }  # fmt: skip
    return Observation(rank, **fields)


def failed(kind: str, message: str, time: float, cause: str = "code") -> Failure:
    return Failure(kind, message, cause, time)


LATE = {"timeout": 60.0}
BUG = failed("ZeroDivisionError", "a bug", 20.0)
ECHO = failed("RuntimeError", PEER, 10.0)
BROKEN = failed("DistNetworkError", "sendBytes failed on SocketImpl: Broken pipe", 11.0)
NAN = failed("DivergedError", "step 7: the loss is not finite", 30.0, "diverged")


@pytest.mark.parametrize(
    ("observations", "rank", "cause"),
    [
        ([seen(0), seen(1)], None, None),
        # died by a signal: the others' exceptions are its echo, even where it is unlike one
        ([seen(0, exit_code=1, failure=BUG), seen(1, exit_code=-9, ended_at=9.0)], 1, "killed"),
        ([seen(0, exit_code=-9, ended_at=9.5), seen(1, exit_code=-11, ended_at=9.0)], 1, "killed"),
        # SIGABRT is how NCCL's watchdog ends a rank: an echo
        ([seen(0, exit_code=-6, ended_at=9.0), seen(1, exit_code=1, failure=BUG)], 1, "code"),
        ([seen(0, exit_code=-6, ended_at=9.0), seen(1)], 0, "exited"),
        # the earliest exception that is no echo
        ([seen(0, failure=ECHO, exit_code=1), seen(1, failure=BUG, exit_code=1)], 1, "code"),
        ([seen(0, failure=NAN, exit_code=1), seen(1, failure=BUG, exit_code=1)], 1, "code"),
        ([seen(0, failure=ECHO, exit_code=1), seen(1, failure=BROKEN, exit_code=1)], 0, "code"),
        ([seen(0, failure=ECHO, exit_code=1), seen(1, process_state="T")], 1, "stopped_process"),
        ([seen(0, failure=ECHO, exit_code=1), seen(1, exit_code=3, ended_at=5.0)], 1, "exited"),
        # asked to stop before it could listen, but not if that was because of a failure
        ([seen(0), seen(1, exit_code=-15)], 1, "preempted_unsaved"),
        ([seen(0, failure=BUG, exit_code=1), seen(1, exit_code=-15)], 0, "code"),
        # late: the rank outside of the collective, for any counts
        ([seen(0, **LATE), seen(1, stack=ELSEWHERE, switches=44)], 1, "hang"),
        ([seen(0, **LATE, stack=BACKWARD), seen(1, stack=ELSEWHERE)], 1, "hang"),
        # a deadlocked collective: who is behind
        ([seen(0, **LATE), seen(1, switches=39), seen(2, step=8)], 1, "hang"),
        ([seen(0, **LATE), seen(1, step=6, switches=50)], 1, "hang"),
        # nobody's stack could be had
        ([seen(0, **LATE, stack=""), seen(1, stack="", switches=39)], 1, "hang"),
        ([seen(0, **LATE, stack=""), seen(1, stack="", cpu_usage=0.9)], 1, "hang"),
        ([seen(0, **LATE, section="teardown"), seen(1, exit_code=0)], 0, "teardown"),
        # the others ended as planned
        ([seen(0, exit_code=75), seen(1, **LATE, stack=ELSEWHERE)], 1, "hang"),
    ],
)
def test_the_root_cause_is_the_first_failure(
    observations: list[Observation], rank: int | None, cause: str | None
) -> None:
    for order in (observations, observations[::-1]):
        root_cause = find_root_cause(order)
        assert (root_cause.rank, root_cause.cause) == (rank, cause) if root_cause else rank is None


@pytest.mark.parametrize("kind", [DivergedError, ReplicaError])
@pytest.mark.parametrize(("has", "blamed"), [(None, -1), (2, 2)])
def test_a_fault_that_all_ranks_report_is_assigned_to_the_rank_that_has_it(
    tmp_path: Path, kind: type[CollectiveError], has: int | None, blamed: int
) -> None:
    error = kind("step 7: not finite", rank=has)
    assert str(error) == "step 7: not finite"
    observations = []
    for rank in range(3):
        write_error_file(tmp_path, rank, error, "vote", 7)
        failure = read_error_file(tmp_path, rank)
        assert failure and failure.rank == has
        observations.append(seen(rank, exit_code=1, failure=failure))
    root_cause = find_root_cause(observations)
    assert (
        root_cause
        and root_cause.rank == blamed
        and root_cause.detail == f"{kind.__name__}: {error}"
    )
    record = NodeRecord("x", 0, 1, "n1", 3, [0, 1, 2], 1, "", 0.0)
    record.observations, record.detail = observations, root_cause.detail
    record.cause, record.rank = root_cause.cause, root_cause.rank
    words = failure_message(tmp_path, record)
    assert "step 7: not finite" in words and "rank -1" not in words


def test_a_stack_shows_which_rank_waits() -> None:
    assert in_collective(COLLECTIVE) and in_collective(BACKWARD)
    assert not in_collective(ELSEWHERE) and not in_collective("")


@pytest.mark.parametrize(
    ("error", "section", "cause", "code"),
    [
        (ConfigError("x"), "init", "config", 1),
        (DataError("x"), "data_wait", "data", 1),
        (DivergedError("x"), "vote", "diverged", 1),
        (EcholabError("x"), "init", "config", 1),
        (EcholabError("x"), "vote", "refused", 1),
        (ParityError("x"), "eval", "parity", 1),
        (ReplicaError("x"), "vote", "replicas", 77),
        (Damaged("x"), "init", "start", 1),
        (Damaged("x"), "save", "disk", 77),
        (OSError(28, "No space left"), "save", "disk", 77),
        (OSError(28, "No space left"), "init", "disk", 77),
        (OSError(30, "Read-only file system"), "vote", "disk", 77),
        (OSError(5, "Input/output error"), "save", "storage", 77),
        (OSError(116, "Stale file handle"), "init", "storage", 77),
        (PermissionError(13, "Permission denied"), "vote", "storage", 77),
        (StorageError("x"), "init", "storage", 77),
        (DiskFullError("x"), "data_wait", "disk", 77),
        (UnreachableError("x"), "data_wait", "storage", 77),
        (FetchError("x"), "data_wait", "data", 1),
        (SharedMemoryError("x"), "data_wait", "shared_memory", 77),
        (WorkerError("x"), "data_wait", "worker", 77),
        (
            RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. "),
            "backward",
            "worker",
            77,
        ),
        (
            RuntimeError(
                "DataLoader worker (pid 5) is killed by signal: Bus error. It is possible"
                " that dataloader's workers are out of shared memory"
            ),
            "vote",
            "shared_memory",
            77,
        ),
        (
            RuntimeError(
                "unable to write to file </torch_1_2>: No space left on device (28): shared"
                " memory(shm)"
            ),
            "vote",
            "shared_memory",
            77,
        ),
        (ConnectionResetError(104, "Connection reset by peer"), "vote", "code", 77),
        (FileNotFoundError(2, "No such file"), "vote", "code", 77),
        (SaveError("a checkpoint needs 9 bytes, 3 are free"), "init", "disk", 77),
        (ValueError("x"), "forward", "code", 77),
        (ValueError("x"), "teardown", "teardown", 77),
        (KeyboardInterrupt(), "forward", "interrupted", 130),
    ],
)
def test_every_exception_has_a_cause(
    error: BaseException, section: str, cause: str, code: int
) -> None:
    assert cause_of_exception(error, section) == cause
    assert CAUSES[cause].exit_code == code


def test_a_full_disk_behind_another_error_is_recognized() -> None:
    error = DataError("quarantine.jsonl: could not be written")
    error.__cause__ = OSError(28, "No space left")
    assert cause_of_exception(error, "data_wait") == "disk"


# -- deadlines --------------------------------------------------------------------------------

NOTHING = dict.fromkeys(SECTIONS, 0.0)


def beat(section: str, since: float, step: int = 9, **longest: float) -> HeartbeatState:
    return HeartbeatState(section, step, 0, 50, since, NOTHING, {**NOTHING, **longest})


def test_the_step_timeout_is_measured_between_its_bounds() -> None:
    usual = SectionTimeouts()
    assert allowed_seconds(usual, "step", NOTHING) == 600  # nothing seen
    assert allowed_seconds(usual, "step", {**NOTHING, "backward": 12.0, "forward": 8.0}) == 120
    assert allowed_seconds(usual, "step", {**NOTHING, "vote": 0.5}) == 60
    assert allowed_seconds(usual, "step", {**NOTHING, "vote": 61.0}) == 600
    with pytest.raises(ConfigError, match=r"timeouts.save=0: must be above 0"):
        SectionTimeouts(save=0).check()


@pytest.mark.parametrize(
    ("section", "seconds"),
    [("init", 1800), ("eval", 3600), ("save", 1800), ("data_wait", 900), ("teardown", 300)],
)
def test_a_slow_operation_in_a_quick_section_keeps_its_full_timeout(
    section: str, seconds: float
) -> None:
    """The export check after quick validations, a complete save after copies, and the loading of
    a reference keep the timeout of their section.
    """
    quick = dict.fromkeys(SECTIONS, 0.01)
    assert allowed_seconds(SectionTimeouts(), section, quick) == seconds
    slow = {0: HeartbeatState(section, 9, 0, 50, 100.0, quick, quick)}
    assert not overdue_ranks(slow, 100.0 + seconds - 1, SectionTimeouts())
    assert list(overdue_ranks(slow, 100.0 + seconds + 1, SectionTimeouts())) == [0]


@pytest.mark.parametrize(
    ("heartbeat", "late"),
    [
        ([beat("vote", 100), beat("vote", 100)], []),
        ([beat("vote", 30, vote=1), beat("vote", 100)], [0]),
        # it waits for one that rightly loads data, validates or saves
        ([beat("vote", 30, vote=1), beat("data_wait", 30)], []),
        ([beat("vote", 30, vote=1), beat("save", 30, step=8)], []),
        # which ends when that one is late too
        ([beat("vote", -801, vote=1), beat("data_wait", -801)], [0, 1]),
        # not for one that is ahead, nor for one within the step
        ([beat("vote", 30, vote=1), beat("save", 30, step=10)], [0]),
        ([beat("vote", 30, vote=1), beat("forward", 95)], [0]),
        ([beat("pause", -9999), beat("pause", -9999)], []),
        ([beat("forward", 30, step=1, vote=1)], []),  # the first step: compilation
    ],
)
def test_a_rank_past_its_timeout_is_late(heartbeat: list[HeartbeatState], late: list[int]) -> None:
    assert sorted(overdue_ranks(dict(enumerate(heartbeat)), 100.0, SectionTimeouts())) == late


def test_ranks_without_a_heartbeat_may_load_data() -> None:
    one = {0: beat("vote", 30, vote=1)}
    assert overdue_ranks(one, 100.0, SectionTimeouts()) and not overdue_ranks(
        one, 100.0, SectionTimeouts(), has_remote_ranks=True
    )


# -- layout -----------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1", "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "n[003-005,9],m1",
}  # fmt: skip


def test_topology_of_one_task_a_rank() -> None:
    topology = find_topology(2, 2, {**SLURM, "SLURM_NTASKS": "4", "SLURM_PROCID": "3"})
    assert (
        topology.first_rank,
        topology.num_ranks,
        topology.num_supervisors,
        topology.node_rank,
    ) == (3, 1, 4, 1)
    env = topology.environment(0)
    assert (env["RANK"], env["LOCAL_RANK"], env["NODE_RANK"], env["WORLD_SIZE"]) == (
        "3", "1", "1", "4",
    )  # fmt: skip
    assert env["MASTER_ADDR"] == "n003" and env["MASTER_PORT"] == "20012"


def test_topology_of_one_task_a_node() -> None:
    env = {**SLURM, "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    topology = find_topology(4, 2, {**env, "MASTER_ADDR": "head"})
    assert (topology.first_rank, topology.num_ranks, topology.num_supervisors) == (4, 4, 2)
    assert [topology.environment(n)["RANK"] for n in range(4)] == ["4", "5", "6", "7"]
    assert [topology.environment(n)["LOCAL_RANK"] for n in range(4)] == ["0", "1", "2", "3"]
    assert topology.address == "head"
    other = find_topology(4, 2, {**env, "SLURM_PROCID": "0", "SLURM_NODEID": "0"})
    assert other.launch == topology.launch and other.port == topology.port
    again = find_topology(4, 2, {**env, "SLURM_RESTART_COUNT": "1"})
    assert again.launch != topology.launch


def test_too_few_cpus_for_the_ranks_give_a_warning() -> None:
    """Slurm 22.05's srun gives a task one CPU, even if sbatch requested more."""
    env = {**SLURM, "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}
    one, before = find_topology(2, 2, env), os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert "1 CPUs for 1 ranks with 2 loader workers" in cpu_warning(one, 2, env)
        assert "--cpus-per-task=3" in cpu_warning(one, 2, env)
        assert not cpu_warning(one, 0, env)
        assert cpu_warning(
            find_topology(2, 2, {**env, "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}), 0, env
        )
        assert not cpu_warning(one, 2, {})  # on one's own machine one knows
    finally:
        os.sched_setaffinity(0, before)


def test_a_node_has_the_name_that_slurm_knows() -> None:
    """The name is not always the hostname, and Slurm must recognize the hosts to exclude."""
    env = {**SLURM, "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}
    assert find_topology(2, 2, {**env, "SLURMD_NODENAME": "gpu-17"}).host == "gpu-17"
    assert find_topology(2, 2, env).host == socket.gethostname()


def test_a_layout_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="the job has 3 tasks"):
        find_topology(2, 2, {**SLURM, "SLURM_NTASKS": "3", "SLURM_PROCID": "0"})
    with pytest.raises(ConfigError, match="trainer.num_nodes=2"):
        find_topology(2, 2, {})
    with pytest.raises(ConfigError, match="torchrun started 3"):
        find_topology(2, 1, {"LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "a"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n[003-005,9],m1", "n003"), ("gpu7", "gpu7"), ("a1,b2", "a1"), ("x[2,4]-ib", "x2-ib")],
)
def test_the_first_node_of_a_list_of_hosts(nodes: str, first: str) -> None:
    assert slurm_address({"SLURM_STEP_NODELIST": nodes}) == first


def test_topology_without_slurm() -> None:
    topology = find_topology(3, 1, {})
    assert (
        topology.first_rank,
        topology.num_ranks,
        topology.num_supervisors,
        topology.world_size,
    ) == (0, 3, 1, 3)
    assert find_topology(3, 1, {}).launch != topology.launch
