"""Drawn talkers that the tests of encoders, metrics and preference share."""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.draw import Talker, draw_talker
from echolab.types import Clips

SEED = 41


@cache
def talkers(count: int = 16, *, first: int = 0, frames: int = 25, size: int = 64) -> list[Talker]:
    """Return talkers of one dataset, from `first` on."""
    numbers = range(first, first + count)
    return [draw_talker(SEED, number, frames=frames, size=size) for number in numbers]


@cache
def clips(count: int = 16, *, first: int = 0, frames: int = 25, size: int = 64) -> Clips:
    """Return the talkers as one stack, not encoded."""
    drawn = talkers(count, first=first, frames=frames, size=size)

    def stacked(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(talker, name) for talker in drawn]))

    return Clips(
        keys=[f"talker_{number}" for number in range(first, first + count)],
        pixels=stacked("frames").permute(0, 4, 1, 2, 3).contiguous(),
        samples=stacked("samples"),
        face=stacked("face"),
        lips=stacked("lips"),
        visemes=torch.stack([stacked("opening"), stacked("width")], -1),
        metadata=[{"caption": talker.look.caption()} for talker in drawn],
    )


def loudness(talker: Talker) -> NDArray[np.float32]:
    """Return the root mean square of each frame's 640 samples, [T]."""
    return np.sqrt((talker.samples.reshape(-1, 640) ** 2).mean(1))
