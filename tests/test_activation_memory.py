"""The estimate of activation memory equals the peak of real steps."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from echolab.diffusion.objectives import velocity_error
from echolab.diffusion.phases import PHDA, ModalityDropout
from echolab.models.layers import rope_freqs
from echolab.models.transformer import EchoTransformer
from echolab.training.adapters.lora import Lora, add_adapters
from echolab.training.engine.activation_checkpointing import ATTENTION, checkpoint_blocks
from echolab.training.engine.activation_memory import Clip, Step, like_gpu, simulate
from echolab.types import Batch, Conditions, Draws

SMALL = {
    "dim": 96, "ffn_dim": 256, "num_heads": 4, "num_layers": 2, "freq_dim": 32,
    "in_channels": 36, "out_channels": 16, "text_dim": 32, "image_dim": 48, "audio_dim": 24,
}  # fmt: skip


def adapters(net: nn.Module) -> None:
    add_adapters(net, Lora(("blocks",), rank=4), seed=0)


def plain(net: nn.Module) -> None:
    """Leave the network as it is."""


def peak(prof: Any) -> int:
    """Return the most bytes at once that were allocated since the profile began."""
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.fixture(autouse=True)
def nothing_left_to_collect() -> Iterator[None]:
    """Collect garbage first, since memory that is freed amid a profile counts as less."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def measured(
    architecture: dict[str, Any], clip: Clip, autocast: bool, prepare: Callable[[nn.Module], None]
) -> tuple[int, int]:
    """Measure a real step on this CPU: the peak in bytes until the loss, and in total."""
    net = EchoTransformer(**architecture)
    prepare(net)
    grid = (clip.frames, clip.height, clip.width)
    audio = (2 * (4 * clip.frames - 3), architecture["audio_dim"])

    def forward() -> torch.Tensor:
        latents = torch.randn(clip.clips, 16, *grid)
        report = Conditions(
            torch.randn(clip.clips, clip.text, architecture["text_dim"]),
            torch.randn(clip.clips, clip.image, architecture["image_dim"]),
            torch.randn(clip.clips, *audio),
            torch.ones(clip.clips, clip.height * clip.width // 4),
            torch.zeros(clip.clips, 4, *grid),
            torch.randn(clip.clips, 16, *grid),
        )
        batch = Batch(latents, report, torch.ones(clip.clips, 1, *grid), [], [])
        draws = Draws(torch.randn_like(latents), *(torch.rand(clip.clips, *s) for s in ((), (2,))))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return velocity_error(net, batch, draws, ModalityDropout(PHDA)).mean()

    rope_freqs.cache_clear()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as first:
        loss = forward()
    del loss
    rope_freqs.cache_clear()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as second:
        forward().backward()
    return peak(first), peak(second)


@pytest.mark.parametrize(
    ("changes", "clip", "autocast", "prepare"),
    [
        ({}, Clip(2, 3, 8, 12, 16, 9), False, plain),
        ({}, Clip(2, 3, 8, 12, 16, 9), True, plain),
        ({"num_layers": 5}, Clip(1, 4, 16, 16, 32, 16), False, plain),
        ({"num_layers": 5}, Clip(1, 4, 16, 16, 32, 16), True, plain),
        ({"num_layers": 6}, Clip(2, 4, 16, 16, 32, 16), False, checkpoint_blocks),
        ({"num_layers": 6}, Clip(2, 4, 16, 16, 32, 16), True, checkpoint_blocks),
        ({"num_layers": 6}, Clip(2, 4, 16, 16), False, lambda n: checkpoint_blocks(n, ATTENTION)),
        ({"dim": 192, "ffn_dim": 320}, Clip(3, 2, 12, 20, 8, 4), True, plain),
        ({"num_layers": 3}, Clip(2, 3, 12, 12, 16, 9), False, adapters),
        ({"num_layers": 3}, Clip(2, 3, 12, 12, 16, 9), True, adapters),
    ],
)
def test_the_estimated_peaks_equal_those_of_a_real_step(
    changes: dict[str, int], clip: Clip, autocast: bool, prepare: Callable[[nn.Module], None]
) -> None:
    architecture = {**SMALL, **changes}
    step = simulate(architecture, clip, autocast=autocast, prepare=prepare)
    forward, together = measured(architecture, clip, autocast, prepare)
    assert step.forward == pytest.approx(forward, rel=0.05)
    assert step.together == pytest.approx(together, rel=0.05)


def test_a_gpu_never_stores_the_attention_matrix_and_needs_less_in_bf16() -> None:
    small, large = (Clip(1, 2, side, side, 8, 4) for side in (16, 32))

    def of(clip: Clip, **more: Any) -> Step:
        return simulate(SMALL, clip, kernels=like_gpu, **more)

    grown = [of(large, **more).activations / of(small, **more).activations
             for more in ({}, {"autocast": True}, {"weights": torch.bfloat16})]  # fmt: skip
    assert all(2.5 < ratio < 4.2 for ratio in grown)  # as the tokens, not as their square
    complete, mixed, half = (
        of(large, **more).activations
        for more in ({}, {"autocast": True}, {"weights": torch.bfloat16})
    )
    assert half < mixed < complete and half > 0.45 * complete


def test_offloaded_activations_are_in_host_memory_until_the_backward_pass() -> None:
    clip, architecture = Clip(2, 4, 16, 16), {**SMALL, "num_layers": 6}
    kept = simulate(architecture, clip, kernels=like_gpu)
    moved = simulate(architecture, clip, kernels=like_gpu, offload=True)
    full = simulate(architecture, clip, kernels=like_gpu, prepare=checkpoint_blocks)
    assert kept.offloaded == full.offloaded == 0
    # What is not on the GPU any more is on the host; only what the last tensors share stays.
    assert moved.activations < 0.6 * kept.activations
    assert moved.offloaded > kept.activations - moved.activations


def test_a_simulation_leaves_the_process_as_it_was() -> None:
    clip = Clip(2, tiny.LATENT_FRAMES, tiny.HEIGHT, tiny.WIDTH, 5, 3)
    simulate({**SMALL, "num_heads": 4}, clip, autocast=True)
    net = tiny.net(trained=True)
    with torch.no_grad():
        result = net(tiny.latents(), torch.tensor([200.0, 900.0]), tiny.conditions())
    assert type(result) is torch.Tensor and result.isfinite().all()
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


def test_a_simulation_is_repeatable_and_linear_in_depth() -> None:
    steps = [
        simulate({**SMALL, "num_layers": layers}, Clip(1, 3, 8, 8, 8, 4)).forward
        for layers in (2, 3, 4, 3)
    ]
    assert steps[1] == steps[3] and steps[2] - steps[1] == steps[1] - steps[0] > 0
