"""The live engine is read, counted and measured: nothing is believed because it was set."""

from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from forked import ForkServer
from torch import Tensor

from echolab.errors import EcholabError
from echolab.training.engine import ClippedNorm, check_clipped

CASES: list[dict[str, Any]] = [
    {"strategy": "ddp"},
    {"strategy": "zero1"},
    {"strategy": "zero2"},
    {"strategy": "zero3"},
    {"strategy": "zero1", "offload": "optimizer"},
    {"strategy": "zero2", "offload": "optimizer"},
    {"strategy": "zero3", "offload": "optimizer"},
]
ACCUMULATIONS = [1, 3, 5]


def by_hand(micro_batches: int) -> list[dict[str, Tensor]]:
    """AdamW with clipping in float64, from its definition: Loshchilov and Hutter 2019."""
    net = engines.Pulled().double()
    direction = net.direction.double()
    o, weights = engines.CLIP, torch.ones(38, dtype=torch.float64)
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    states = []
    for at, step in enumerate(engines.pulls(micro_batches), 1):
        gradient = direction * sum(pull * share for pull, share in step) / micro_batches
        gradient = gradient * min(1.0, o.clip / float(gradient.norm()))
        first = o.betas[0] * first + (1 - o.betas[0]) * gradient
        second = o.betas[1] * second + (1 - o.betas[1]) * gradient**2
        root = (second / (1 - o.betas[1] ** at)).sqrt()
        weights = weights - engines.RATE * first / (1 - o.betas[0] ** at) / (root + o.eps)
        parts = {"master": weights, "exp_avg": first, "exp_avg_sq": second}
        states.append(
            {f"{p}/weight": t[:35].view(5, 7) for p, t in parts.items()}
            | {f"{p}/bias": t[35:] for p, t in parts.items()}
        )
    return states


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_strategy_clips_and_accumulates_as_by_hand(
    fork_server: ForkServer, tmp_path: Path, world: int
) -> None:
    """Gradients of norm 10, 0.5, 30 and 10 at a limit of 1; no number of ranks divides the net."""
    cases = [{"strategy": "single"}, *CASES[1:]] if world == 1 else CASES
    fork_server.run(
        "engines:clip",
        world=world,
        seconds=300,
        arguments={
            "cases": cases,
            "accumulations": ACCUMULATIONS,
            "world": world,
            "to": str(tmp_path),
        },
    )
    for case in cases:
        for accumulation in ACCUMULATIONS:
            found, norms = engines.measured(tmp_path, engines.name_of(case, accumulation))
            assert norms == pytest.approx([1, 0.5, 1, 1], rel=1e-5), case
            for step, state in enumerate(by_hand(world * accumulation)):
                for name, tensor in state.items():
                    error = (found[f"{step}/{name}"].double() - tensor).abs()
                    assert (error <= 2e-6 * tensor.abs() + 1e-9).all(), (case, step, name)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: case["strategy"])
def test_a_rank_that_does_not_clip_is_found_out(
    fork_server: ForkServer, case: dict[str, Any]
) -> None:
    fork_server.run("engines:sabotage", world=2, arguments={"case": case, "world": 2})


def test_the_norm_is_of_what_the_optimizer_was_given() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.AdamW(weights, fused=True)
    norm = ClippedNorm(optimizer)
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    optimizer.step()
    assert float(norm.take()) == 25 and float(norm.take()) == 0
    assert check_clipped(25.0, 5.0, 1) == 5
    with pytest.raises(EcholabError, match="step 7: .* is 5, over optim.clip=4.99"):
        check_clipped(25.0, 4.99, 7)
