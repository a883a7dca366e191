"""Activation checkpointing and compiling change when values are computed, never the values."""

import copy
from collections import Counter

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from echolab.errors import ConfigError
from echolab.heartbeat import Heartbeat
from echolab.models.attention import sdpa
from echolab.training.engine import activation_checkpointing
from echolab.training.engine.activation_checkpointing import (
    ATTENTION,
    checkpoint_blocks,
    compile_blocks,
    speed_up,
)
from echolab.training.module import DiffusionModule, Optim

TIMESTEPS = torch.tensor([123.0, 987.0])


def step(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    result = net(tiny.latents(), TIMESTEPS, tiny.conditions())
    (result * tiny.latents(seed=5)).sum().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


class Calls(TorchDispatchMode):
    """Counts the calls of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count[str(operator)] += 1
        return operator(*args, **(kwargs or {}))


def calls_of_operators(net: torch.nn.Module) -> Counter[str]:
    with Calls() as calls:
        step(net)
    return calls.count


@pytest.mark.parametrize("keep", [(), ATTENTION], ids=["full", "selective"])
def test_gradients_and_names_are_the_same_bit_for_bit(keep: tuple[str, ...]) -> None:
    net = tiny.net(trained=True)
    expected, names = step(copy.deepcopy(net)), list(net.state_dict())
    checkpoint_blocks(net, keep)
    result = step(net)
    assert list(net.state_dict()) == names and list(result) == names
    for name, gradient in expected.items():
        assert torch.equal(result[name], gradient), name


def test_each_choice_recomputes_its_part() -> None:
    """The full forward is recomputed; or all but the attention; or every second block."""
    plain, full, selective, half = (tiny.net(trained=True) for _ in range(4))
    checkpoint_blocks(full)
    checkpoint_blocks(selective, ATTENTION)
    checkpoint_blocks(half, every=2)
    counts = [calls_of_operators(net) for net in (plain, full, selective, half)]
    attention = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    usual, recomputed, kept, halved = (count[attention] for count in counts)
    assert usual == 4 * 2  # tokens, text, image, sound; two blocks
    assert recomputed == 2 * usual and kept == usual and 2 * halved == 3 * usual
    linear = [count["aten.addmm.default"] for count in counts]
    assert linear[0] < linear[1] == linear[2]


def test_activations_take_less_memory() -> None:
    def saved(net: torch.nn.Module) -> int:
        sizes = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = net(tiny.latents(), TIMESTEPS, tiny.conditions())
        assert out.requires_grad
        return sum(sizes.values())

    plain, full = tiny.net(num_layers=6), tiny.net(num_layers=6)
    checkpoint_blocks(full)
    assert saved(full) < 0.5 * saved(plain)


def test_a_copy_of_a_checkpointed_network_is_independent() -> None:
    net = tiny.net(trained=True)
    checkpoint_blocks(net)
    expected, other = step(copy.deepcopy(net)), copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert all(torch.equal(result, expected[name]) for name, result in step(other).items())


def test_the_fused_optimizer_is_adamw() -> None:
    """The training module's optimizer equals torch's plain loop over parameters."""
    nets = tiny.net(trained=True), tiny.net(trained=True)
    module = DiffusionModule(
        nets[0], {}, optim=Optim(), seed=0, shift=5.0, heartbeat=Heartbeat(None)
    )
    fused = module.configure_optimizers()
    groups = [
        {"params": [p for p in nets[1].parameters() if p.ndim >= 2]},
        {"params": [p for p in nets[1].parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.01, foreach=False, fused=False)
    assert all(group["fused"] for group in fused.param_groups)
    for optimizer, net in zip((fused, plain), nets, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        for _ in range(3):
            optimizer.zero_grad()
            step(net)
            optimizer.step()
    for (name, one), other in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


def test_settings_are_chosen_by_name() -> None:
    net = tiny.net()
    usual = {"device": "cpu", "attention": "auto", "checkpointing": "none", "compiled": False}
    speed_up(net, **usual)
    assert "forward" not in vars(net.blocks[0]) and net.blocks[0].self_attn.attend is sdpa
    speed_up(net, **{**usual, "checkpointing": "selective"})
    assert all("forward" in vars(block) for block in net.blocks)
    with pytest.raises(ConfigError, match="checkpointing=half: unknown; one of none, full, sel"):
        speed_up(net, **{**usual, "checkpointing": "half"})


def test_a_missing_compiler_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_checkpointing.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"compile=true: no C\+\+ compiler .*; install one"):
        compile_blocks(tiny.net())


@pytest.mark.parametrize("keep", [None, (), ATTENTION], ids=["kept", "full", "selective"])
def test_compiled_blocks_compute_the_same(keep: tuple[str, ...] | None) -> None:
    """Code is not generated: that takes a minute here, and torch tests it itself."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net = tiny.net(trained=True)
    expected = step(copy.deepcopy(net))
    if keep is not None:
        checkpoint_blocks(net, keep)
    compile_blocks(net, backend="aot_eager")
    for name, gradient in step(net).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1, "one graph serves all blocks"
    assert not counters["graph_break"]
