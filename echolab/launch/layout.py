"""Which ranks a supervisor starts, read from the environment that it was started in."""

import os
import re
import secrets
import socket
from collections.abc import Mapping
from typing import NamedTuple

from echolab.errors import ConfigError
from echolab.launch.local import free_port

LAUNCH = "ECHOLAB_LAUNCH"  # in the environment of ranks: the id of their launch


class Layout(NamedTuple):
    """The ranks of one supervisor: `first` to `first + count - 1` of `world`."""

    launch: str  # shared by all supervisors of a launch
    first: int
    count: int
    local: int  # local rank of the first
    world: int
    node: int  # of the machine
    supervisor: int  # of all supervisors of the launch
    supervisors: int
    host: str
    address: str
    port: int

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
    world = devices * nodes
    if "SLURM_PROCID" in env:
        tasks = int(env.get("SLURM_NTASKS", "1"))
        task, node = int(env["SLURM_PROCID"]), int(env.get("SLURM_NODEID", "0"))
        name = "-".join(
            env.get(f"SLURM_{key}", "0") for key in ("JOB_ID", "RESTART_COUNT", "STEP_ID")
        )
        launch, address, port = f"slurm-{name}", slurm_address(env), slurm_port(env)
        if tasks not in (world, nodes):
            raise ConfigError(
                f"trainer.devices={devices}, trainer.nodes={nodes}: the job has {tasks} tasks; "
                f"give srun --ntasks={nodes} (one a node) or {world} (one a rank)"
            )
        local = int(env.get("SLURM_LOCALID", "0"))
    elif "LOCAL_RANK" in env:
        tasks, task = int(env["WORLD_SIZE"]), int(env.get("RANK", env["LOCAL_RANK"]))
        if tasks != world:
            raise ConfigError(
                f"trainer.devices={devices}, trainer.nodes={nodes}: the launcher started {tasks}"
            )
        node, local = int(env.get("GROUP_RANK", env.get("NODE_RANK", "0"))), int(env["LOCAL_RANK"])
        address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
        # Elastic agents count restarts; one launch is one round.
        launch = f"torchrun-{port}-{env.get('TORCHELASTIC_RUN_ID', '0')}"
        launch += f"-{env.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    elif nodes > 1:
        raise ConfigError(
            f"trainer.nodes={nodes}: start one task on each node by srun (slurm/train.sbatch)"
        )
    else:
        tasks, task, node, local = 1, 0, 0, 0
        launch, address, port = f"local-{secrets.token_hex(4)}", "127.0.0.1", free_port()
    count = world // tasks
    return Layout(
        launch, task * count, count, local if count == 1 else 0, world, node, task, tasks,
        socket.gethostname(), address, port,
    )  # fmt: skip


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
