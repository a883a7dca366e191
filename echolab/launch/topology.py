"""Topology of a launch: which ranks a supervisor starts, from its environment."""

import os
import re
import secrets
import socket
from collections.abc import Mapping
from typing import NamedTuple

from echolab.errors import ConfigError
from echolab.launch import slurm
from echolab.launch.processes import free_port

LAUNCH = "ECHOLAB_LAUNCH"  # environment variable of ranks: the id of their launch


class Topology(NamedTuple):
    """Ranks of one supervisor: `first_rank` to `first_rank + num_ranks - 1` of `world_size`."""

    launch: str  # shared by all supervisors of a launch
    first_rank: int
    num_ranks: int
    first_local_rank: int
    world_size: int
    node_rank: int
    supervisor: int  # index among all supervisors of the launch
    num_supervisors: int
    host: str
    address: str
    port: int

    @property
    def ranks(self) -> range:
        """Ranks of this supervisor."""
        return range(self.first_rank, self.first_rank + self.num_ranks)

    def environment(self, index: int) -> dict[str, str]:
        """Return the environment variables of rank `first_rank + index`."""
        return {
            LAUNCH: self.launch,
            "RANK": str(self.first_rank + index),
            "LOCAL_RANK": str(self.first_local_rank + index),
            "WORLD_SIZE": str(self.world_size),
            "NODE_RANK": str(self.node_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def find_topology(devices: int, nodes: int, env: Mapping[str, str] = os.environ) -> Topology:
    """Return the topology of this supervisor.

    In Slurm a task is a node or a rank, with torchrun a process is a rank, and without a launcher
    this process starts all ranks of one node.  Raises ConfigError if the number of tasks does not
    fit `devices` x `nodes`.
    """
    # The launcher is recognized by the variables that it sets.
    if "SLURM_PROCID" in env:
        return _slurm_topology(devices, nodes, env)
    if "LOCAL_RANK" in env:
        return _torchrun_topology(devices, nodes, env)
    if nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={nodes}: start one task on each node by srun (slurm/train.sbatch)"
        )
    # One node, without a launcher.
    launch = f"local-{secrets.token_hex(4)}"
    host = socket.gethostname()
    return Topology(launch, 0, devices, 0, devices, 0, 0, 1, host, "127.0.0.1", free_port())


def cpu_warning(topology: Topology, workers: int, env: Mapping[str, str] = os.environ) -> str:
    """Return a warning if a Slurm task has fewer CPUs than processes, else "".

    `workers` is the number of data loader workers of a rank.
    """
    # Slurm gives a task one CPU unless --cpus-per-task asks for more.
    cpus, needed = len(os.sched_getaffinity(0)), topology.num_ranks * (1 + workers)
    if "SLURM_PROCID" not in env or cpus >= needed:
        return ""
    return (
        f"echolab: {topology.host}: {cpus} CPUs for {topology.num_ranks} ranks with {workers} "
        f"loader workers each; give --cpus-per-task={needed} to sbatch and srun, or lower "
        "data.num_workers"
    )


def this_host(env: Mapping[str, str] = os.environ) -> str:
    """Return the name of this machine; in a Slurm task the name that Slurm uses."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def _slurm_topology(devices: int, nodes: int, env: Mapping[str, str]) -> Topology:
    world_size, tasks = devices * nodes, int(env.get("SLURM_NTASKS", "1"))
    if tasks not in (world_size, nodes):
        raise ConfigError(
            f"trainer.devices={devices}, trainer.num_nodes={nodes}: the job has {tasks} tasks; "
            f"give srun --ntasks={nodes} (one a node) or {world_size} (one a rank)"
        )
    # A task either starts all ranks of its node or is one rank.
    task, num_ranks = int(env["SLURM_PROCID"]), world_size // tasks
    return Topology(
        launch=slurm.launch_of(env),
        first_rank=task * num_ranks,
        num_ranks=num_ranks,
        first_local_rank=int(env.get("SLURM_LOCALID", "0")) if num_ranks == 1 else 0,
        world_size=world_size,
        node_rank=int(env.get("SLURM_NODEID", "0")),
        supervisor=task,
        num_supervisors=tasks,
        host=this_host(env),
        address=slurm_address(env),
        port=slurm_port(env),
    )


def _torchrun_topology(devices: int, nodes: int, env: Mapping[str, str]) -> Topology:
    # Each process of torchrun is a rank and has its own supervisor.
    tasks, local_rank = int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])
    if tasks != devices * nodes:
        raise ConfigError(
            f"trainer.devices={devices}, trainer.num_nodes={nodes}: torchrun started {tasks} "
            "ranks; make the product equal to its --nproc-per-node x --nnodes"
        )
    rank, port = int(env.get("RANK", local_rank)), int(env["MASTER_PORT"])
    # torchelastic counts its restarts: each restart is another launch.
    restarts = (env.get(f"TORCHELASTIC_{key}", "0") for key in ("RUN_ID", "RESTART_COUNT"))
    return Topology(
        launch=f"torchrun-{port}-{'-'.join(restarts)}",
        first_rank=rank,
        num_ranks=1,
        first_local_rank=local_rank,
        world_size=tasks,
        node_rank=int(env.get("GROUP_RANK", env.get("NODE_RANK", "0"))),
        supervisor=rank,
        num_supervisors=tasks,
        host=socket.gethostname(),
        address=env["MASTER_ADDR"],
        port=port,
    )


def slurm_address(env: Mapping[str, str]) -> str:
    """Return MASTER_ADDR, or the first node of the job step: `n[003-5,9],m1` gives n003."""
    if "MASTER_ADDR" in env:
        return env["MASTER_ADDR"]
    # Expand the first name of Slurm's compressed list.
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
    return "".join(part or "" for part in match.groups()) if match else nodes


def slurm_port(env: Mapping[str, str]) -> int:
    """Return MASTER_PORT, or a port derived from the job id, which is the same on all nodes."""
    if "MASTER_PORT" in env:
        return int(env["MASTER_PORT"])
    return 20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000
