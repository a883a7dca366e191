"""Frozen networks are used, never trained, never registered as submodules."""

import torch
from torch import nn

from echolab.models.frozen import Frozen


def test_a_module_does_not_register_a_frozen_network() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(2, 2)
            self.judge = Frozen(nn.Linear(2, 2))

    holder = Holder()
    assert set(holder.state_dict()) == {"own.weight", "own.bias"}
    holder.double()
    assert holder.judge.net.weight.dtype == torch.float32


def test_a_frozen_network_is_in_eval_mode_and_outside_the_graph() -> None:
    frozen = Frozen(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9)))
    inputs = torch.ones(1, 2, requires_grad=True)
    assert torch.equal(frozen(inputs), frozen(inputs))
    assert not frozen(inputs).requires_grad
    assert not any(parameter.requires_grad for parameter in frozen.net.parameters())


def test_a_frozen_network_moves_to_a_device_on_request() -> None:
    assert Frozen(nn.Linear(2, 2)).to("meta").net.weight.is_meta
