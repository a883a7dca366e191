"""Step caching: off at threshold 0, fewer block calls above it, a separate cache for each
branch.
"""

import pytest
import tiny
import torch

from echolab.diffusion.guidance import CFG_MODES, cfg_velocity
from echolab.diffusion.long_video import sample_windows
from echolab.diffusion.pipeline import DEMO, sampler_sigmas, sampler_timesteps
from echolab.diffusion.solvers import sample_euler
from echolab.diffusion.teacache import (
    IDENTITY,
    WAN_1B3,
    CachedBlocks,
    CachePlan,
    movement,
    step_cached,
)

STEPS = 12
RECIPE = DEMO._replace(
    num_steps=STEPS,
    guidance_scale=4.0,
    audio_guidance_scale=2.0,
    window=tiny.FRAMES,
    by_clip=False,
    overlap=1,
)
NET, CONDITIONS, NOISE = tiny.net(trained=True), tiny.conditions(1), tiny.latents(1)
NEGATIVE = torch.full_like(CONDITIONS.text, 0.3)
LENGTH = 5  # latent frames: two windows
LONG = CONDITIONS._replace(
    audio=torch.randn(1, 2 * (4 * LENGTH - 3), 6, generator=torch.Generator().manual_seed(1)),
    known=torch.zeros(1, 4, LENGTH, *tiny.SHAPE[2:]),
    known_latents=torch.zeros(1, tiny.CHANNELS, LENGTH, *tiny.SHAPE[2:]),
)
LONG_NOISE = torch.randn(
    1, tiny.CHANNELS, LENGTH, *tiny.SHAPE[2:], generator=torch.Generator().manual_seed(2)
)


class Counted:
    """Counts the calls of the first block."""

    def __init__(self) -> None:
        self.calls = 0
        self.handle = NET.blocks[0].register_forward_hook(self.add)

    def add(self, *_: object) -> None:
        self.calls += 1


def sampled(threshold: float | None, run: str = "sequential") -> tuple[torch.Tensor, int]:
    """Return latents of two windows, and the calls of a block; None uses no cache."""
    counted = Counted()
    with torch.no_grad():
        if threshold is None:
            made = sample_windows(NET, LONG, RECIPE, LONG_NOISE, negative=NEGATIVE, cfg=run)
        else:
            plan = CachePlan(threshold, sampler_timesteps(RECIPE), IDENTITY, first=2)
            with step_cached(NET, plan) as net:
                made = sample_windows(net, LONG, RECIPE, LONG_NOISE, negative=NEGATIVE, cfg=run)
    counted.handle.remove()
    return made, counted.calls


@pytest.mark.parametrize("run", CFG_MODES)
def test_threshold_0_equals_no_caching_bit_for_bit(run: str) -> None:
    plain, calls = sampled(None, run)
    cached, same = sampled(0.0, run)
    assert torch.equal(plain, cached) and calls == same
    assert calls == STEPS * 2 * (3 if run == "sequential" else 1)


def test_calls_fall_with_the_threshold_to_the_steps_that_always_run() -> None:
    counts = [sampled(threshold)[1] for threshold in (0.0, 0.15, 0.2, 0.4, 99.0)]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) >= 4
    assert counts[-1] == (2 + 1) * 2 * 3, "the first two and the last, in each window and branch"


def test_a_cached_video_stays_close_to_the_uncached_one() -> None:
    plain, near, far = (sampled(threshold)[0] for threshold in (None, 0.2, 99.0))
    assert 0 < (near - plain).norm() < (far - plain).norm()


def test_branches_do_not_share_a_cache() -> None:
    """Sequential equals batched guidance: each branch reuses its own steps."""
    torch.testing.assert_close(
        sampled(0.2, "sequential")[0], sampled(0.2, "batched")[0], rtol=1e-3, atol=1e-4
    )


def test_reuse_adds_the_last_residual_of_the_blocks() -> None:
    class Block(torch.nn.Module):
        def forward(self, tokens: torch.Tensor, steering: torch.Tensor) -> torch.Tensor:
            return tokens * 2 + steering.mean()

    plan = CachePlan(99.0, torch.tensor([900.0, 800.0, 700.0]), IDENTITY, first=1)
    blocks = CachedBlocks(torch.nn.ModuleList([Block(), Block()]), plan)
    tokens, steering = torch.randn(1, 5, 4), torch.ones(1, 6, 4)
    before = blocks(tokens, steering)
    torch.testing.assert_close(before, 4 * tokens + 3)
    blocks.step = 1
    torch.testing.assert_close(blocks(10 * tokens, 1.1 * steering), 10 * tokens + 3 * tokens + 3)
    blocks.step = 2  # the last is always computed
    torch.testing.assert_close(blocks(10 * tokens, steering), 40 * tokens + 3)


def test_the_network_is_restored_afterwards() -> None:
    names, blocks = list(NET.state_dict()), NET.blocks
    with pytest.raises(RuntimeError, match="stop"):
        with step_cached(NET, CachePlan(0.1, sampler_timesteps(RECIPE))):
            raise RuntimeError("stop")
    assert NET.blocks is blocks and list(NET.state_dict()) == names


def test_a_batch_of_another_size_is_not_cached() -> None:
    plan = CachePlan(99.0, sampler_timesteps(RECIPE), IDENTITY, first=0)
    counted = Counted()
    with step_cached(NET, plan) as net, torch.no_grad():
        for clips, calls in ((1, 1), (2, 2), (2, 2)):
            net(tiny.latents(clips), torch.full((clips,), 800.0), tiny.conditions(clips))
            assert counted.calls == calls
    counted.handle.remove()


def test_the_polynomial_is_the_published_one() -> None:
    before, now = torch.ones(1, 6, 4), torch.full((1, 6, 4), 1.02)
    x = 0.02
    by_hand = -52186.2437 * x**4 + 9230.41404 * x**3 - 528.275948 * x**2 + 13.6987616 * x
    assert movement(before, now, WAN_1B3) == pytest.approx(by_hand - 0.0499875664, abs=1e-4)
    assert movement(before, now, IDENTITY) == pytest.approx(0.02, abs=1e-6)


def test_caching_works_with_a_plain_sampler() -> None:
    with step_cached(NET, CachePlan(0.1, sampler_timesteps(RECIPE))) as net:
        actual = sample_euler(cfg_velocity(net, CONDITIONS), NOISE, sampler_sigmas(RECIPE))
    assert actual.shape == NOISE.shape and actual.isfinite().all()
