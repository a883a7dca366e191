"""Activation checkpointing and compiling change when values are computed, never the values."""

import copy
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from typing import Any

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
    offload_activations,
    speed_up,
)
from echolab.training.engine.machine import Machine, conflict
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


def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let trl's class take the CPU for the accelerator; return the contexts that are made."""
    from trl.models import activation_offloading

    made: list[Any] = []
    original = activation_offloading.get_act_offloading_ctx_manager

    def unpinned(net: torch.nn.Module) -> Any:
        made.append(original(net, use_pin_memory=False, use_streams=False))
        return made[-1]

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(activation_offloading, "get_act_offloading_ctx_manager", unpinned)
    return made


def test_offloaded_activations_come_back_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two forward passes of one loss, twice, as a preference with two micro-batches."""
    made = on_the_cpu(monkeypatch)
    plain = tiny.net(trained=True)
    net = copy.deepcopy(plain)
    offloading = offload_activations(net)
    for seed in (5, 6):
        for one, context in ((plain, nullcontext()), (net, offloading)):
            with context:
                first = one(tiny.latents(seed=seed), TIMESTEPS, tiny.conditions())
                second = one(tiny.latents(seed=seed + 10), TIMESTEPS, tiny.conditions())
                loss = (first * second).sum()
            if one is net:  # what was saved has left, except weights and what is small
                moved = [saved for saved in made[0].tracker.values() if saved[1]]
                weights = {parameter.data_ptr() for parameter in net.parameters()}
                assert len(moved) > 40
                assert not {saved[0].data_ptr() for saved in moved} & weights
            loss.backward()
    assert not made[0].tracker
    for (name, expected), parameter in zip(plain.named_parameters(), net.parameters(), strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, expected.grad), name


def test_a_module_offloads_every_forward_pass_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    made = on_the_cpu(monkeypatch)
    module = DiffusionModule(
        tiny.net(), {}, optim=Optim(), seed=0, shift=5.0, offloads=True, heartbeat=Heartbeat(None)
    )
    assert not made  # only once the weights are on their device
    assert module._forward_context() is module._forward_context() is made[0]


def test_offloading_is_refused_where_nothing_can_be_moved() -> None:
    said = conflict(Machine(activation_checkpointing="offload"))
    assert said and said.endswith("use none, selective or full, or trainer.accelerator=gpu")
    said = conflict(Machine("zero3", accelerator="gpu", activation_checkpointing="offload"))
    assert said and "use strategy zero2, or selective" in said
    assert conflict(Machine(accelerator="gpu", activation_checkpointing="offload")) is None


def test_trl_is_imported_only_for_offloading() -> None:
    code = "import sys, echolab.training.fit; print('trl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


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
