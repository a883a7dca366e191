"""One clock for picture and sound: 25 frames and 16 000 samples a second, by time stamps.

Frame k of the grid is seen at start + k / 25 s and sounds from there for 640 samples.  The source
frame nearest in time is shown, so that picture and sound differ by half a source frame at most,
at a variable rate and after a late start too.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from echolab.data.media import FPS, RATE_HZ, Sound
from echolab.vision.probe import Probe

SAMPLES_PER_FRAME = RATE_HZ // FPS
FROZEN_SECONDS = 0.2  # a picture farther away than this is not of this moment


class Grid(NamedTuple):
    """The output clock of one file."""

    start: float  # seconds on the file's clock
    numbers: NDArray[np.int64]  # [K] source frame of each output frame
    missing: NDArray[np.bool_]  # [K] no picture near
    damaged: NDArray[np.bool_]  # [K]

    def seconds(self, frame: int) -> float:
        """Time on the file's clock at which output frame `frame` begins."""
        return self.start + frame / FPS


def make_grid(probe: Probe) -> Grid:
    """The output frames of a probed file."""
    start = float(probe.times[0])
    count = max(1, round((probe.end - start) * FPS))
    at = start + np.arange(count) / FPS
    later = np.searchsorted(probe.times, at).clip(1, max(1, len(probe.times) - 1))
    later = np.minimum(later, len(probe.times) - 1)
    earlier = np.maximum(later - 1, 0)
    nearer = np.abs(probe.times[earlier] - at) <= np.abs(probe.times[later] - at)
    numbers = np.where(nearer, earlier, later)
    missing = np.abs(probe.times[numbers] - at) > FROZEN_SECONDS
    damaged = np.zeros(count, bool)
    for first, last in probe.damaged:
        damaged |= (at >= first - 0.5 / FPS) & (at <= last)
    return Grid(start, numbers, missing, damaged)


def sound_of(sound: Sound, grid: Grid, first: int, last: int) -> NDArray[np.float32]:
    """Samples [640 (last - first)] of output frames first to last; silence where there are none."""
    begin = round((grid.seconds(first) - sound.start_seconds) * RATE_HZ)
    end = begin + (last - first) * SAMPLES_PER_FRAME
    samples = np.zeros(end - begin, np.float32)
    inside = sound.samples[max(begin, 0) : max(end, 0)]
    offset = max(-begin, 0)
    samples[offset : offset + len(inside)] = inside
    return samples


def heard(sound: Sound, grid: Grid) -> NDArray[np.bool_]:
    """[K] where sound was decoded for the frame; at the track's edges one may be cut short."""
    begin = (grid.start - sound.start_seconds) * RATE_HZ
    begins = begin + np.arange(len(grid.numbers)) * SAMPLES_PER_FRAME
    covered = (begins > -SAMPLES_PER_FRAME) & (begins < len(sound.samples))
    at = grid.start + np.arange(len(grid.numbers)) / FPS
    for first, last in sound.damaged:
        covered &= (at + 1 / FPS <= first) | (at >= last)
    return np.asarray(covered, bool)
