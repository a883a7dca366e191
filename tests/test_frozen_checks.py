"""The engine gets only the trained network, and a reference shares no memory with the policy."""

import copy
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from torch import nn

from echolab.errors import ConfigError
from echolab.models.frozen import Frozen
from echolab.training.engine.engine_report import check_alone, check_frozen_networks
from echolab.types import Loss


def test_only_a_copy_may_be_the_reference() -> None:
    net = tiny.net()
    check_frozen_networks(net, [("reference", Frozen(copy.deepcopy(net)))])
    with pytest.raises(ConfigError, match="nothing to train"):
        check_frozen_networks(net, [("reference", Frozen(net))])  # freezing it froze the policy
    net.requires_grad_(True)
    loose = Frozen(copy.deepcopy(net))
    loose.net.train()
    with pytest.raises(ConfigError, match="reference: must be in eval mode"):
        check_frozen_networks(net, [("reference", loose)])


def test_a_reference_that_shares_the_policys_storage_is_refused() -> None:
    """Parameters of other shapes over the same bytes are refused too."""
    net, other = tiny.net(), tiny.net()
    name, weight = next(iter(net.named_parameters()))
    dict(other.named_parameters())[name].data = weight.data.view(-1).view(weight.shape)
    with pytest.raises(ConfigError, match=f"reference: shares 1 tensors .* {name}"):
        check_frozen_networks(net, [("reference", Frozen(other))])


def test_a_frozen_network_in_the_module_tree_is_refused() -> None:
    module = nn.Module()
    module.net = tiny.net()
    check_alone(module, module.net)
    module.encoder = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="Module.encoder.weight: .* outside the module tree"):
        check_alone(module, module.net)


def test_policy_and_reference_start_equal_and_differ_after_a_step(tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    class Watched(runs.Preference):  # type: ignore[misc]
        def __call__(self, net: Any, pair: Any, draws: Any) -> Loss:
            loss = super().__call__(net, pair, draws)
            seen.append(loss.parts)
            return loss

    reference = Frozen(tiny.net())
    runs.train(
        tmp_path,
        runs.schedule(("dpo", 2)),
        reference=reference,
        objectives={
            "dpo": Watched(
                runs.PHASES, reference, 100.0, sft_weight=0.5, target_grad_factor=0.2,
            )
        },
    )  # fmt: skip
    for half in ("chosen", "rejected"):
        same = [torch.equal(p[f"error/{half}"], p[f"error/reference_{half}"]) for p in seen]
        assert same[0] and not same[-1]


def test_a_run_whose_reference_is_its_policy_does_not_start(tmp_path: Path) -> None:
    net = tiny.net(trained=True)
    alias = Frozen(tiny.net(trained=True))
    for own, other in zip(net.parameters(), alias.net.parameters(), strict=True):
        other.data = own.data
    with pytest.raises(ConfigError, match="reference: shares .* would follow it"):
        runs.train(tmp_path, runs.schedule(("dpo", 1)), net=net, reference=alias)
    assert not (tmp_path / "run/checkpoints").exists()
