"""The average of the weights: its arithmetic, and that reading it changes nothing."""

import pytest
import tiny
import torch

from echolab.errors import ConfigError
from echolab.training.engine.ema import Ema
from echolab.training.engine.master_weights import masters_of


def test_constant_weights_are_a_fixed_point() -> None:
    net = tiny.net(trained=True)
    masters = masters_of(net, torch.optim.AdamW(net.parameters()))
    ema = Ema(0.9)
    ema.start(masters)
    before = [tensor.clone() for tensor in masters.local]
    for _ in range(5):
        ema.update(masters)
    assert all(torch.equal(a, b) for a, b in zip(before, ema.flats["ema"], strict=True))


def test_the_average_follows_the_recursion_of_its_docstring() -> None:
    net = torch.nn.Linear(1, 1, bias=False)
    masters = masters_of(net, torch.optim.AdamW(net.parameters()))
    ema, expected, longer = Ema(0.3, more=(0.9,)), 1.0, 1.0
    torch.nn.init.constant_(net.weight, 1.0)
    ema.start(masters)
    for count in range(6):
        torch.nn.init.constant_(net.weight, float(count))
        ema.update(masters)
        decay = min(0.3, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * count
        decay = min(0.9, (1 + count) / (10 + count))
        longer = decay * longer + (1 - decay) * count
    for part, average in (("ema", expected), ("ema-0.9", longer)):
        with ema.applied(masters, part):
            assert net.weight.item() == pytest.approx(average)
    assert net.weight.item() == 5.0 and ema.updates == 6


def test_weights_are_restored_bit_for_bit_even_after_an_error() -> None:
    net = tiny.net(trained=True)
    masters = masters_of(net, torch.optim.AdamW(net.parameters()))
    ema = Ema(0.9)
    ema.start(masters)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(RuntimeError), ema.applied(masters):
        assert not torch.equal(net.state_dict()["head.head.weight"], before["head.head.weight"])
        raise RuntimeError
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_an_impossible_decay_is_refused() -> None:
    with pytest.raises(ConfigError, match="ema_decay=1"):
        Ema(1.0)
    with pytest.raises(ConfigError, match="given twice"):
        Ema(0.9, more=(0.99, 0.99))
