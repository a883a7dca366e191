"""Noise levels (sigmas), sampling schedules, and the random draws of a training step.

The draws of a step are a pure function of (seed, epoch, sample key, draw index): a clip gets the
same noise and sigma on any rank, in any batch, before and after a resume.
"""

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor

from echolab.errors import ConfigError
from echolab.types import Draws

TRAIN_LEVELS = 1000  # training noise levels, as in Wan's scheduler


def shift_sigmas(u: Tensor, shift: float) -> Tensor:
    """Shift uniform levels towards noise: s u / (1 + (s - 1) u), preserving 0, 1 and the order.

    With shift 5 half of all draws have sigma above 0.83.
    """
    # The flow shift of Wan and SD3: more draws and steps at high noise levels for large latents.
    return shift * u / (1 + (shift - 1) * u)


def _shifted(levels: Tensor, shift: float) -> Tensor:
    """Shift levels [steps] and append 0: fp32 [steps + 1]."""
    return torch.cat([shift_sigmas(levels, shift), levels.new_zeros(1)]).float()


def _even(top: float, bottom: float, steps: int, points: int) -> Tensor:
    """Return evenly spaced levels in fp64; raise ConfigError if `steps` is below 1."""
    if steps < 1:
        raise ConfigError(f"steps={steps}: sampling needs at least one step; set steps=1 or more")
    return torch.linspace(top, bottom, points, dtype=torch.float64)


def sampling_sigmas(steps: int, shift: float) -> Tensor:
    """Return shifted levels that are evenly spaced from 1 to 0 before the shift.  [steps + 1]."""
    return shift_sigmas(_even(1, 0, steps, steps + 1), shift).float()


def wan_sigmas(steps: int, shift: float) -> Tensor:
    """Return the levels of Wan's UniPC and DPM++: evenly spaced from 0.999 before the shift.

    Wan's `fm_solvers*.py` constructs both with shift 1 and passes shifted levels.  EchoMimicV3's
    preview scripts construct DPM++ with shift 5 and pass shifted levels too, which results in a
    shift of 25; this error is not reproduced.
    """
    # Drop the last of the steps + 1 levels, 0, which is appended after the shift.
    return _shifted(_even(1 - 1 / TRAIN_LEVELS, 0, steps, steps + 1)[:-1], shift)


def flow_match_sigmas(steps: int, shift: float) -> Tensor:
    """Return the levels of diffusers' `FlowMatchEulerDiscreteScheduler`, as in the preview model.

    The levels are evenly spaced from 1 to the shifted lowest training level, and then shifted.
    """
    # diffusers shifts its lowest level at construction, and all levels again later.
    lowest = float(shift_sigmas(torch.tensor(1 / TRAIN_LEVELS, dtype=torch.float64), shift))
    return _shifted(_even(1, lowest, steps, steps), shift)


SIGMA_SCHEDULES: dict[str, Callable[[int, float], Tensor]] = {
    "even": sampling_sigmas,
    "wan": wan_sigmas,
    "flow_match": flow_match_sigmas,
}


def _generator(seed: int, epoch: int, key: str, draw_index: int) -> torch.Generator:
    """Return a generator seeded by the arguments alone."""
    digest = blake2b(f"{seed}/{epoch}/{draw_index}/{key}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_noise(
    keys: list[str],
    shape: tuple[int, ...],
    *,
    seed: int,
    epoch: int,
    draw_index: int = 0,
    shift: float = 5.0,
) -> Draws:
    """Draw noise, sigmas and uniforms for the clips named by `keys`, on the CPU in fp32.

    `shape` is (C, F, H, W) of one clip.  Sigma is uniform over the shifted grid of 1000 levels
    (VideoX-Fun `train.py`, `--uniform_sampling`), so it lies in (0, 1].  Sigma and uniforms are
    drawn before the noise, so that a clip's sigma does not depend on its size.
    """
    levels, uniforms, noise = [], [], []
    for key in keys:
        generator = _generator(seed, epoch, key, draw_index)
        # Keep the order of these three draws: results for a seed depend on it.
        levels.append(torch.randint(1, TRAIN_LEVELS + 1, (), generator=generator))
        uniforms.append(torch.rand(2, generator=generator))
        noise.append(torch.randn(shape, generator=generator))
    # Shift the uniform levels in fp32.
    sigmas = shift_sigmas(torch.stack(levels).float() / TRAIN_LEVELS, shift)
    return Draws(torch.stack(noise), sigmas, torch.stack(uniforms))
