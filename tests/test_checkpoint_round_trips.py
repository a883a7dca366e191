"""A checkpoint loads into any number of ranks and strategy, and is saved again bit for bit."""

from pathlib import Path

import pytest
import saved
from forked import ForkServer

from echolab.training.checkpoints.checkpoint import latest_valid
from echolab.training.checkpoints.diff import state_differences, tensor_differences

pytestmark = pytest.mark.slow

STRATEGIES = ["ddp", "zero1", "zero2", "zero3", "zero3-full"]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_loading_and_saving_changes_no_bit(
    fork_server: ForkServer, tmp_path: Path, world: int
) -> None:
    source = saved.odd_checkpoint(tmp_path / "source")
    strategies = ["single", *STRATEGIES] if world == 1 else STRATEGIES
    arguments = {"strategies": strategies, "source": str(source.parent), "out": str(tmp_path)}
    fork_server.run("saved:load_and_save", world=world, arguments=arguments)
    first, _ = latest_valid(source.parent)
    assert first
    for strategy in strategies:
        again, rejected = latest_valid(tmp_path / f"{strategy}-{world}")
        assert again and not rejected
        assert not list(tensor_differences(first, again)), strategy
        assert not state_differences(first.state, again.state)
        assert [f.name for f in sorted(source.iterdir())] == [
            f.name for f in sorted(again.path.iterdir())
        ]
        for file in source.glob("*.safetensors"):
            assert file.read_bytes() == (again.path / file.name).read_bytes()
