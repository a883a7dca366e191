"""A run that is killed, resumed and moved to other ranks and ZeRO stages equals the run of one
process. Tolerances are of a complete part: the norm of the difference over the norm of the
values of one process. Sums over ranks and micro-batches are rounded in another order, which
no run can avoid; loaded state is equal bit for bit.
"""

import random
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import runs
import torch
from forked import ForkServer

from echolab.training.checkpoints.checkpoint import PARTS, Checkpoint, latest_valid, open_checkpoint

pytestmark = pytest.mark.slow

SEED = 5
FIRST, LAST = 8, 28  # kill and resume end at step 8; 20 further steps elsewhere
LIMIT = 1e-6


class Topology(NamedTuple):
    strategy: str
    world: int
    accumulation: int

    def __str__(self) -> str:
        return f"{self.strategy}-{self.world}x{self.accumulation}"


ALONE = Topology("single", 1, 1)
TOPOLOGIES = [
    Topology("single" if world == 1 and strategy == "ddp" else strategy, world, accumulation)
    for world in (1, 2, 4)
    for strategy in ("ddp", "zero1", "zero2", "zero3")
    for accumulation in (1, 3)
]


def transitions() -> Iterator[tuple[Topology, Topology]]:
    """List transitions such that each topology is left or entered, to or from one of another
    world size and strategy.
    """
    chooser = random.Random(SEED)
    left = chooser.sample(TOPOLOGIES, len(TOPOLOGIES))
    while left:
        first = left.pop()
        fitting = [t for t in left if t.world != first.world and t.strategy != first.strategy]
        second = chooser.choice(fitting or left)
        left.remove(second)
        yield first, second


TRANSITIONS = list(transitions())


class Attempts:
    """Starts attempts over existing datasets."""

    def __init__(self, server: ForkServer, root: Path) -> None:
        self.server, self.root = server, root

    def _arguments(self, where: Topology, out: Path, until: int, **more: Any) -> dict[str, Any]:
        out.mkdir(parents=True, exist_ok=True)
        arguments = {**where._asdict(), "root": str(self.root), "out": str(out), "until": until}
        return {"world": where.world, "arguments": {**arguments, **more}}

    def run(self, where: Topology, out: Path, until: int, **more: Any) -> Checkpoint:
        """Run an attempt to its end, and return the newest checkpoint."""
        self.server.run("rank_topology:attempt", **self._arguments(where, out, until, **more))
        checkpoint, rejected = latest_valid(out / "checkpoints")
        assert checkpoint and checkpoint.step == until and not rejected
        return checkpoint

    def kill(self, where: Topology, out: Path, at: int, delay: float) -> None:
        """Kill all ranks with SIGKILL soon after step `at`."""
        arguments = self._arguments(where, out, LAST, kill_at=at)
        ranks = self.server.start("rank_topology:attempt", **arguments)
        while not (out / "reached").exists():
            assert not any(ranks.codes()), ranks.outputs()
            time.sleep(0.01)
        time.sleep(delay)
        ranks.signal(signal.SIGKILL)
        assert ranks.wait() == [-signal.SIGKILL] * where.world


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Attempts:
    root = tmp_path_factory.mktemp("topologies")
    runs.write_clips(root / "clips", 13)
    runs.write_pairs(root / "pairs", 5)
    attempts = Attempts(fork_server, root)
    attempts.run(ALONE, root / "alone-first", FIRST)
    attempts.run(ALONE, root / "alone", LAST)
    return attempts


def check_equal(checkpoint: Checkpoint, expected: Checkpoint, parts: Sequence[str] = PARTS) -> None:
    """Assert that weights, moments and average are equal within LIMIT."""
    for part in parts:
        ours, theirs = checkpoint.tensors(part), expected.tensors(part)
        assert set(ours) == set(theirs)
        expected_values = torch.cat([theirs[name].double().flatten() for name in theirs])
        error = torch.cat([(ours[n].double() - theirs[n].double()).flatten() for n in theirs])
        assert error.norm() <= LIMIT * expected_values.norm(), part
        if part in ("master", "ema"):
            assert error.abs().max() <= LIMIT, part


def folder(attempts: Attempts, where: Topology) -> Path:
    return attempts.root / str(where)


@pytest.mark.parametrize("where", TOPOLOGIES, ids=str)
def test_a_killed_and_resumed_run_equals_the_run_of_one_process(
    attempts: Attempts, where: Topology
) -> None:
    chooser = random.Random(f"{SEED} {where}")
    at, delay = chooser.randint(1, FIRST - 3), chooser.uniform(0, 0.2)
    print(f"seed {SEED}: killed {delay:.3f} s after step {at}")
    out = folder(attempts, where)
    attempts.kill(where, out, at, delay)
    checkpoint = attempts.run(where, out, FIRST)
    check_equal(
        checkpoint,
        open_checkpoint(attempts.root / f"alone-first/checkpoints/{checkpoint.path.name}"),
    )


@pytest.mark.parametrize("pair", TRANSITIONS, ids=lambda pair: f"{pair[0]}-to-{pair[1]}")
def test_another_topology_loads_a_checkpoint_bit_for_bit_and_resumes(
    attempts: Attempts, tmp_path: Path, pair: tuple[Topology, Topology]
) -> None:
    first, second = pair
    if not folder(attempts, first).exists():
        attempts.run(first, folder(attempts, first), FIRST)
    shutil.copytree(folder(attempts, first), tmp_path / "run")
    saved, _ = latest_valid(tmp_path / "run/checkpoints")
    assert saved and saved.step == FIRST
    before = {part: dict(saved.tensors(part)) for part in PARTS}
    updates = saved.state["optimizer_updates"]
    checkpoint = attempts.run(second, tmp_path / "run", LAST, again=str(tmp_path / "again"))
    loaded, _ = latest_valid(tmp_path / "again")
    assert loaded and loaded.state["optimizer_updates"] == updates
    for part in PARTS:
        for name, tensor in before[part].items():
            assert torch.equal(
                loaded.tensors(part)[name].view(torch.int32), tensor.view(torch.int32)
            )
    check_equal(
        checkpoint, open_checkpoint(attempts.root / f"alone/checkpoints/{checkpoint.path.name}")
    )


@pytest.mark.parametrize("part", PARTS[1:])
def test_a_resume_that_loses_a_part_is_detected(
    attempts: Attempts, tmp_path: Path, part: str
) -> None:
    """This tests the comparison itself."""
    attempts.run(ALONE, tmp_path, FIRST // 2)
    checkpoint = attempts.run(ALONE, tmp_path, FIRST, forget=part)
    expected = open_checkpoint(attempts.root / f"alone-first/checkpoints/{checkpoint.path.name}")
    with pytest.raises(AssertionError, match=part):
        check_equal(checkpoint, expected, [part])


def test_the_transitions_reach_every_topology() -> None:
    assert len(TRANSITIONS) == 12
    assert {t for pair in TRANSITIONS for t in pair} == set(TOPOLOGIES)
    assert all(a.world != b.world or a.strategy != b.strategy for a, b in TRANSITIONS)
