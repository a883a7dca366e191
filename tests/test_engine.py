"""The live engine is inspected, counted and measured: no setting is trusted without a check."""

import math
from pathlib import Path
from typing import Any

import engines
import pytest
import pytorch_lightning as pl
import torch
from forked import ForkServer
from torch import Tensor

from echolab.errors import ConfigError, EcholabError
from echolab.training.engine.engine_report import (
    ClippedNorm,
    Plan,
    check,
    check_clipped,
    check_hooks,
    expected_plan,
)
from echolab.training.engine.strategies import Machine

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


def by_hand(
    micro_batches: int, limit: float = engines.CLIP.max_grad_norm
) -> list[dict[str, Tensor]]:
    """Compute AdamW with clipping in float64, from its definition: Loshchilov and Hutter 2019."""
    net = engines.Pulled().double()
    direction = net.direction.double()
    o, weights = engines.CLIP, torch.ones(38, dtype=torch.float64)
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    states = []
    for at, step in enumerate(engines.pulls(micro_batches), 1):
        gradient = direction * sum(pull * share for pull, share in step) / micro_batches
        gradient = gradient * min(1.0, limit / float(gradient.norm()))
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
@pytest.mark.parametrize(
    ("world", "accumulations", "limit"),
    [(1, ACCUMULATIONS, 1.0), (2, ACCUMULATIONS, 1.0), (3, ACCUMULATIONS, 1.0),
     (1, [1], math.inf), (2, [1], math.inf)],
)  # fmt: skip
def test_every_strategy_clips_and_accumulates_as_by_hand(
    fork_server: ForkServer, tmp_path: Path, world: int, accumulations: list[int], limit: float
) -> None:
    """Gradients of norm 10, 0.5, 30 and 10 are clipped at 1, or not at all
    (optim.max_grad_norm=.inf). No number of ranks divides the network's sizes.
    """
    cases = [{"strategy": "single"}, *CASES[1:]] if world == 1 else CASES
    fork_server.run(
        "engines:clip",
        world=world,
        seconds=300,
        arguments={
            "cases": cases,
            "accumulations": accumulations,
            "world": world,
            "to": str(tmp_path),
            "limit": limit,
        },
    )
    for case in cases:
        for accumulation in accumulations:
            result, norms = engines.measured(tmp_path, engines.name_of(case, accumulation))
            clipped = [min(norm, limit) for norm in (10, 0.5, 30, 10)]
            assert norms == pytest.approx(clipped, rel=1e-5), case
            for step, state in enumerate(by_hand(world * accumulation, limit)):
                for name, tensor in state.items():
                    error = (result[f"{step}/{name}"].double() - tensor).abs()
                    assert (error <= 2e-6 * tensor.abs() + 1e-9).all(), (case, step, name)


@pytest.mark.slow
def test_tied_weights_train_as_one_and_frozen_weights_stay(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    """The weights equal those of torch's own AdamW in one process."""
    plain = engines.Tied()
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    o = engines.CLIP
    optimizer = torch.optim.AdamW(trained.values(), engines.RATE, o.betas, o.eps, weight_decay=0.0)
    for step in range(1, 5):
        optimizer.zero_grad()
        plain(torch.tensor(0.5 * step)).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), o.max_grad_norm)
        optimizer.step()
    report = {"cases": CASES, "world": 2, "to": str(tmp_path)}
    fork_server.run("engines:tied", world=2, arguments=report)
    for case in CASES:
        result, _ = engines.measured(tmp_path, engines.name_of(case))
        assert {name.partition("/")[2] for name in result} == {
            f"{part}/{name}" for part in ("master", "exp_avg", "exp_avg_sq") for name in trained
        }
        for name, parameter in trained.items():
            expected = parameter.detach()
            torch.testing.assert_close(result[f"3/master/{name}"], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: case["strategy"])
def test_a_rank_that_does_not_clip_is_detected(
    fork_server: ForkServer, case: dict[str, Any]
) -> None:
    fork_server.run("engines:unclipped", world=2, arguments={"case": case, "world": 2})


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[1:4], ids=lambda case: case["strategy"])
def test_lost_accumulation_is_detected(fork_server: ForkServer, case: dict[str, Any]) -> None:
    fork_server.run("engines:unaccumulated", world=2, arguments={"case": case, "world": 2})


def test_the_logged_norm_is_that_of_the_optimizers_gradient() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.AdamW(weights, fused=True)
    norm = ClippedNorm(optimizer)
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    optimizer.step()
    assert float(norm.take()) == 25 and float(norm.take()) == 0
    assert check_clipped(25.0, 5.0, 1) == 5
    with pytest.raises(EcholabError, match="step 7: .* is 5, over optim.max_grad_norm=4.99"):
        check_clipped(25.0, 4.99, 7)


PLAN = Plan(
    strategy="zero2", world=4, data_parallel=2, sequence_parallel=2, accumulation=3, clip=1.0,
    optimizer="AdamW", batches="float32", compute="bfloat16", parameters="bfloat16",
    masters="float32", moments="float32", gradients="bfloat16", average="float32",
    offload="none", trained=7, frozen=0, blocks=2, checkpointed=2, compiled=0, attention="sdpa",
)  # fmt: skip
MACHINE = Machine(
    "zero2", 4, precision="bf16-mixed", activation_checkpointing="selective", sequence_parallel=2
)


def test_the_engines_plan_is_compared_with_the_settings() -> None:
    asked = expected_plan(MACHINE, accumulation=3, clip=1.0, blocks=2)
    check(PLAN, asked)
    wrong = {
        "strategy": "zero1", "world": 2, "data_parallel": 4, "sequence_parallel": 1,
        "accumulation": 1, "clip": 0.0, "batches": "bfloat16", "compute": "float32",
        "parameters": "float16", "masters": "bfloat16", "moments": "bfloat16",
        "gradients": "float16", "average": "bfloat16",
        "offload": "optimizer", "checkpointed": 0, "compiled": 2,
    }  # fmt: skip
    assert wrong.keys() == asked.keys()
    for name, value in wrong.items():
        with pytest.raises(EcholabError, match=f"not as set: {name} is {value}, asked for"):
            check(PLAN._replace(**{name: value}), asked)
    assert "masters            float32" in PLAN.lines()


class Hooked(pl.LightningModule):
    """A module with two hooks that are called everywhere."""

    def on_train_start(self) -> None: ...

    def configure_optimizers(self) -> None: ...


def test_a_hook_that_is_never_called_is_an_error() -> None:
    check_hooks(Hooked(), MACHINE)

    class Mistyped(Hooked):
        def on_before_optimzer_step(self) -> None: ...

    class Clipping(Hooked):
        def configure_gradient_clipping(self, *given: Any, **keywords: Any) -> None: ...

    class Saving(Hooked):
        def on_save_checkpoint(self, checkpoint: Any) -> None: ...

    check_hooks(Clipping(), Machine("ddp"))
    for module, machine in (
        (Mistyped(), MACHINE), (Clipping(), MACHINE), (Saving(), MACHINE), (Saving(), Machine()),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{type(module).__name__}.* never called"):
            check_hooks(module, machine)
