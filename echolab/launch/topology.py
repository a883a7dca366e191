"""Which ranks a supervisor starts, read from the environment that it was started in."""

import os
import re
import secrets
import socket
from collections.abc import Mapping
from typing import NamedTuple

from echolab.errors import ConfigError
from echolab.launch import slurm
from echolab.launch.local import free_port

LAUNCH = "ECHOLAB_LAUNCH"  # in the environment of ranks: the id of their launch


class Layout(NamedTuple):
    """The ranks of one supervisor: `first` to `first + ranks - 1` of `world`."""

    launch: str  # shared by all supervisors of a launch
    first: int
    ranks: int
    local: int  # local rank of the first
    world: int
    node: int  # of the machine
    supervisor: int  # of all supervisors of the launch
    supervisors: int
    host: str
    address: str
    port: int

    @property
    def numbers(self) -> range:
        """The ranks of this supervisor."""
        return range(self.first, self.first + self.ranks)

    def environment(self, number: int) -> dict[str, str]:
        """What rank `first + number` is told."""
        return {
            LAUNCH: self.launch,
            "RANK": str(self.first + number),
            "LOCAL_RANK": str(self.local + number),
            "WORLD_SIZE": str(self.world),
            "NODE_RANK": str(self.node),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def layout(devices: int, nodes: int, env: Mapping[str, str] = os.environ) -> Layout:
    """In Slurm one task a node, or one a rank; by torchrun one a rank; else all ranks of one node.

    Raises ConfigError where the tasks do not fit `devices` x `nodes`.
    """
    if "SLURM_PROCID" in env:
        return _in_slurm(devices, nodes, env)
    if "LOCAL_RANK" in env:
        return _by_torchrun(devices, nodes, env)
    if nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={nodes}: start one task on each node by srun (slurm/train.sbatch)"
        )
    launch = f"local-{secrets.token_hex(4)}"
    host = socket.gethostname()
    return Layout(launch, 0, devices, 0, devices, 0, 0, 1, host, "127.0.0.1", free_port())


def cpu_warning(places: Layout, workers: int, env: Mapping[str, str] = os.environ) -> str:
    """Return what to say where a Slurm task has fewer CPUs than processes; "" where it is enough.

    `workers` are the loader processes of a rank.
    """
    cpus, wanted = len(os.sched_getaffinity(0)), places.ranks * (1 + workers)
    if "SLURM_PROCID" not in env or cpus >= wanted:
        return ""
    return (
        f"echolab: {places.host}: {cpus} CPUs for {places.ranks} ranks with {workers} loader "
        f"workers each; give sbatch --cpus-per-task={wanted}, and srun too, or less "
        "data.num_workers"
    )


def this_host(env: Mapping[str, str] = os.environ) -> str:
    """Return the name of this machine: the one by which Slurm knows it, in one of its tasks."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def _in_slurm(devices: int, nodes: int, env: Mapping[str, str]) -> Layout:
    world, tasks = devices * nodes, int(env.get("SLURM_NTASKS", "1"))
    if tasks not in (world, nodes):
        raise ConfigError(
            f"trainer.devices={devices}, trainer.num_nodes={nodes}: the job has {tasks} tasks; "
            f"give srun --ntasks={nodes} (one a node) or {world} (one a rank)"
        )
    task, count = int(env["SLURM_PROCID"]), world // tasks
    return Layout(
        launch=slurm.launch_of(env),
        first=task * count,
        ranks=count,
        local=int(env.get("SLURM_LOCALID", "0")) if count == 1 else 0,
        world=world,
        node=int(env.get("SLURM_NODEID", "0")),
        supervisor=task,
        supervisors=tasks,
        host=this_host(env),
        address=slurm_address(env),
        port=slurm_port(env),
    )


def _by_torchrun(devices: int, nodes: int, env: Mapping[str, str]) -> Layout:
    tasks, local = int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])
    if tasks != devices * nodes:
        raise ConfigError(
            f"trainer.devices={devices}, trainer.num_nodes={nodes}: the launcher started {tasks}"
        )
    task, port = int(env.get("RANK", local)), int(env["MASTER_PORT"])
    # An elastic agent counts its restarts: each is a launch.
    rounds = (env.get(f"TORCHELASTIC_{key}", "0") for key in ("RUN_ID", "RESTART_COUNT"))
    return Layout(
        launch=f"torchrun-{port}-{'-'.join(rounds)}",
        first=task,
        ranks=1,
        local=local,
        world=tasks,
        node=int(env.get("GROUP_RANK", env.get("NODE_RANK", "0"))),
        supervisor=task,
        supervisors=tasks,
        host=socket.gethostname(),
        address=env["MASTER_ADDR"],
        port=port,
    )


def slurm_address(env: Mapping[str, str]) -> str:
    """MASTER_ADDR, or the first node of the step: `n[003-5,9],m1` is n003."""
    if "MASTER_ADDR" in env:
        return env["MASTER_ADDR"]
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
    return "".join(part or "" for part in match.groups()) if match else nodes


def slurm_port(env: Mapping[str, str]) -> int:
    """MASTER_PORT, or one that the job's number gives: alike on all nodes."""
    if "MASTER_PORT" in env:
        return int(env["MASTER_PORT"])
    return 20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000
