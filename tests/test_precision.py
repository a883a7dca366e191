"""A weight of 1 under a gradient of 0.01 moves as in fp32: rounding loses no small update."""

from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from forked import ForkServer

from echolab.errors import ConfigError
from echolab.training.engine.machine import PRECISIONS, STRATEGIES, Machine
from echolab.training.engine.strategies import strategy_of

CASES: list[dict[str, Any]] = [
    {"strategy": strategy, "precision": precision, "offload": offload}
    for strategy in STRATEGIES
    for precision in PRECISIONS
    for offload in ("none", "optimizer")
    if offload == "none" or strategy.startswith("zero")
]


def moved(dtype: torch.dtype) -> float:
    """Return the value to which plain AdamW brings the weight in 100 steps."""
    weight = torch.nn.Parameter(torch.ones(1, dtype=dtype))
    o = engines.LAW
    optimizer = torch.optim.AdamW([weight], engines.RATE, o.betas, o.eps, weight_decay=0.0)
    for _ in range(100):
        weight.grad = torch.full_like(weight, 0.01)
        optimizer.step()
    return float(weight.detach())


def test_the_law_distinguishes_precisions() -> None:
    """A weight alone in bf16 does not move: neighboring values are 1/256 away, a step is 1/1000."""
    assert moved(torch.float64) == pytest.approx(0.9, abs=1e-6)
    assert moved(torch.float32) == pytest.approx(moved(torch.float64), abs=2e-6)
    assert moved(torch.bfloat16) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_small_gradient_moves_a_weight_as_in_fp32(
    fork_server: ForkServer, tmp_path: Path, world: int
) -> None:
    """The weight starts from a value that bf16 may lack. 100 roundings near 1 are at most 6e-6."""
    cases = [case for case in CASES if (case["strategy"] == "single") == (world == 1)]
    fork_server.run(
        "engines:precision",
        world=world,
        seconds=300,
        arguments={"cases": cases, "world": world, "to": str(tmp_path)},
    )
    for case in cases:
        result, _ = engines.measured(tmp_path, engines.name_of(case))
        fallen = engines.Even().weight.double() - result["99/master/weight"].double()
        error = (fallen - (1 - moved(torch.float64))).abs().max()
        assert error < 6e-6, (case, float(error))


@pytest.mark.parametrize(
    ("precision", "why"),
    [
        ("bf16-true", "lose updates"),
        ("16-true", "lose updates"),
        ("16-mixed", "pure fp16"),
        ("64-true", "unknown"),
    ],
)
def test_a_precision_that_loses_updates_is_refused(precision: str, why: str) -> None:
    for strategy in STRATEGIES:
        with pytest.raises(ConfigError, match=f"trainer.precision={precision}: .*{why}"):
            strategy_of(Machine(strategy, precision=precision))
