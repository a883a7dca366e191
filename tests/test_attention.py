"""The choice of attention kernels, which all compute the same."""

import sys
from types import ModuleType

import pytest
import tiny
import torch
import torch.nn.functional as F

from echolab.errors import ConfigError
from echolab.models import attention
from echolab.models.attention import attention_from, attention_modules, cudnn, sdpa, use_attention
from echolab.models.layers import RMSNorm, modulate

TIMESTEPS = torch.tensor([123.0, 987.0])


def heads(tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, tokens, 3, 8).to(dtype)


@pytest.fixture
def flash3(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Install a package of that name, which attends by torch's kernel and records its inputs."""
    seen = []

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple:
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        seen.append(q.shape)
        mixed = F.scaled_dot_product_attention(*(x.transpose(1, 2).float() for x in (q, k, v)))
        return mixed.transpose(1, 2).type_as(q), None

    package = ModuleType("flash_attn_interface")
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    return seen


def test_a_flash_package_gets_heads_in_the_networks_layout(flash3: list[torch.Size]) -> None:
    q, k, v = (heads(n, torch.bfloat16) for n in (5, 7, 7))
    actual = attention_from("flash3", "cuda")(q.float(), k.float(), v)
    assert flash3 == [q.shape] and actual.shape == q.shape
    torch.testing.assert_close(actual, sdpa(q, k, v), rtol=0.02, atol=0.02)


def test_fp32_is_refused_by_kernels_without_fp32(flash3: list[torch.Size]) -> None:
    with pytest.raises(ConfigError, match="flash3: computes in bf16 or fp16, not torch.float32"):
        attention_from("flash3", "cuda")(heads(5), heads(5), heads(5))
    assert not flash3


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [((8, 0), True, "sdpa"), ((9, 0), False, "cudnn"), ((9, 0), True, "flash3")],
)
def test_auto_picks_the_fastest_kernel_of_the_machine(
    capability: tuple[int, int],
    installed: bool,
    expected: str,
    flash3: list[torch.Size],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if not installed:
        monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    actual = attention_from("auto", "cuda")
    q = heads(5, torch.bfloat16)
    if expected == "flash3":
        actual(q, q, q)
        assert flash3 == [q.shape]
    else:
        assert actual is {"sdpa": sdpa, "cudnn": cudnn}[expected]
    assert attention_from("auto", "cpu") is sdpa


def test_an_unavailable_kernel_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ConfigError, match="flash2: the package flash_attn is not installed; pip"):
        attention_from("flash2", "cuda")
    with pytest.raises(ConfigError, match="flash2: needs a GPU, not cpu"):
        attention_from("flash2", "cpu")
    with pytest.raises(ConfigError, match="flash4: unknown; one of auto, sdpa, cudnn, flash2, fl"):
        attention_from("flash4")


def test_every_attention_of_the_network_uses_the_chosen_kernel() -> None:
    net, conditions, calls = tiny.net(trained=True), tiny.conditions(), []

    def counted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append(k.shape[1])
        return sdpa(q, k, v)

    expected = net(tiny.latents(), TIMESTEPS, conditions)
    use_attention(net, counted)
    torch.testing.assert_close(net(tiny.latents(), TIMESTEPS, conditions), expected)
    assert calls == [18, 5, 3, 17] * len(net.blocks), "tokens, text, image, a window of sound"
    assert len(list(attention_modules(net))) == 2 * len(net.blocks)


@pytest.mark.parametrize("tokens", [attention.SHORT_SEQUENCE - 1, attention.SHORT_SEQUENCE])
def test_half_precision_on_cpus_is_close_at_every_length(tokens: int) -> None:
    q, k, v = (torch.randn(1, tokens, 2, 16, requires_grad=True) for _ in range(3))
    halves = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    actual, expected = sdpa(*halves), sdpa(q, k, v)
    assert actual.dtype == torch.bfloat16
    actual.float().square().sum().backward()
    expected.square().sum().backward()
    for half, full in zip(halves, (q, k, v), strict=True):
        assert (half.grad - full.grad).norm() < 0.02 * full.grad.norm()


def test_rms_norm_has_the_gradients_of_its_definition() -> None:
    norm, values = RMSNorm(8, 1e-2).double(), torch.randn(2, 3, 8, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    one, other = (values.clone().requires_grad_() for _ in range(2))
    weight = norm.weight.detach().clone().requires_grad_()
    direction = torch.randn(2, 3, 8)
    (norm(one) * direction).sum().backward()
    (F.rms_norm(other, (8,), weight, 1e-2) * direction).sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.weight.grad, weight.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clips", [1, 3])
def test_modulation_is_a_norm_then_scale_and_shift(clips: int) -> None:
    tokens, shift, scale = torch.randn(clips, 5, 8), *torch.randn(2, clips, 1, 8)
    expected = F.layer_norm(tokens, (8,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(modulate(tokens, shift, scale, 1e-6), expected)
    assert modulate(tokens.bfloat16(), shift, scale, 1e-6).dtype == torch.bfloat16
