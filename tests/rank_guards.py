"""Ranks of the tests of guards; each writes its report to a file."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import runs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from echolab.errors import ReplicaError
from echolab.heartbeat import Heartbeat
from echolab.training.callbacks.metrics import Stragglers
from echolab.training.callbacks.replicas import ReplicaCheck, Unchanged, check_replicas, replicated
from echolab.training.config import Intervals
from echolab.training.fit import Machine
from echolab.training.guards.events import History


def flip(tensor: Tensor, bit: int) -> None:
    """Flip one bit of a tensor's last element."""
    tensor.data.view(-1)[-1:].view(torch.uint8)[bit // 8] ^= 1 << bit % 8


def said_by(check: Callable[[], Any]) -> str:
    try:
        check()
    except ReplicaError as error:
        return f"{error}; of rank {error.rank}"
    return ""


def compare(to: str) -> None:
    """Compare replicas on three ranks, each fault on one of them, in one launch."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    report: dict[str, Any] = {}
    named = {
        "weight": torch.arange(12.0).reshape(3, 4),
        "bias": torch.ones(5, dtype=torch.bfloat16),
        "steps": torch.tensor(7),
    }
    report["alike"] = said_by(lambda: check_replicas(named, "state"))
    for name, bit in (("weight", 0), ("bias", 15), ("steps", 63)):
        if rank == 1:
            flip(named[name], bit)
        report[name] = said_by(lambda: check_replicas(named))
        if rank == 1:
            flip(named[name], bit)
    report["state"] = said_by(lambda: check_replicas(named, "other" if rank == 2 else "state"))
    less = {name: tensor for name, tensor in named.items() if rank or name != "bias"}
    report["less"] = said_by(lambda: check_replicas(less))
    each = {"weight": named["weight"] + rank}
    report["each"] = said_by(lambda: check_replicas(each))
    frozen = {"a": torch.ones(3), "b": torch.zeros(2)}
    still = Unchanged("the reference", frozen)
    report["still"] = said_by(lambda: still.check(frozen))
    if rank == 2:
        flip(frozen["b"], 31)  # the sign of a zero
    report["changed"] = said_by(lambda: still.check(frozen))
    history = History(Path(to))
    history.add(3, "rollback", to=1, skip=["sft", 5, 2])
    report["events"] = [event[2:] for event in history.events]
    report["skips"] = history.skips
    report["slow"] = slow_rank()
    (Path(to) / f"report-{rank}.json").write_text(json.dumps(report))


def slow_rank() -> list[list[str]]:
    """Let rank 1 sleep in its forward, then rank 2 wait for data; write what each window
    reports.
    """
    heartbeat, result = Heartbeat(None), []
    watch = Stragglers([f"node-{rank}" for rank in range(3)])
    watch.start(heartbeat.seconds)
    for window in range(8):
        sleeps = {"data_wait": 0.02, "forward": 0.02, "backward": 0.01}
        if 1 <= window < 5 and dist.get_rank() == 1:
            sleeps["forward"] = 0.2
        if window >= 5 and dist.get_rank() == 2:
            sleeps["data_wait"] = 0.2
        for section, seconds in sleeps.items():
            heartbeat.enter(section)
            time.sleep(seconds)
        heartbeat.enter("vote")
        dist.barrier()
        values, slow = watch.look(heartbeat.seconds)
        assert set(values) == {"perf/straggler_score"}
        result.append([f"{one.rank} {one.host} {one.section}" for one in slow])
    return result


def fault_at(step: int, rank: int, fault: Callable[[nn.Module], None]) -> None:
    """Inject a hardware fault just before the replicas of `step` are compared."""
    check, seen = ReplicaCheck.after_step, []

    def with_fault(self: ReplicaCheck, state: Any) -> None:
        seen.append(1)
        if len(seen) == step and dist.get_rank() == rank:
            fault(self.net)
        check(self, state)

    ReplicaCheck.after_step = with_fault  # type: ignore[method-assign]


def train(root: str, strategy: str, to: str) -> None:
    """Train on two ranks; a bit flips on rank 1 after step 2 of 4."""

    def flip_one(net: nn.Module) -> None:
        name, tensor = list(replicated(net).items())[-1]
        print("flipped", name, flush=True)
        flip(tensor, 3)

    fault_at(2, 1, flip_one)
    result = said_by(
        lambda: runs.train(
            Path(root),
            runs.schedule(("sft", 4)),
            run_dir=Path(to) / strategy,
            intervals=Intervals(log_every=0, save_every=0, replica_check_every=1),
            machine=Machine(strategy, devices=2, zero3_shard_small=False),
        )
    )
    (Path(to) / f"{strategy}-{dist.get_rank()}").write_text(result)
