"""Put a video on one clock and one size: 25 frames and 16 000 samples a second, cropped, scaled.

Frame k of the grid is shown at start + k / 25 s, and its 640 audio samples begin there.  The source
frame nearest in time is shown, so that video and audio differ by half a source frame at most, at a
variable rate and after a late start too.
"""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from echolab.data.media import FPS, RATE_HZ, AudioTrack
from echolab.geometry import WAN
from echolab.vision.faces import Image
from echolab.vision.video_reader import Probe

SAMPLES_PER_FRAME = RATE_HZ // FPS
FROZEN_SECONDS = 0.2  # a source frame farther away than this counts as missing
HEAD_SCALE = 2.0  # side of the head crop, in the larger side of all face boxes of a clip

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in source pixels


class Grid(NamedTuple):
    """The output clock of one file."""

    start: float  # seconds on the file's clock
    indices: NDArray[np.int64]  # [K] source frame of each output frame
    missing: NDArray[np.bool_]  # [K] no source frame is near
    damaged: NDArray[np.bool_]  # [K]

    def seconds(self, frame: int) -> float:
        """Return the time on the file's clock at which output frame `frame` begins."""
        return self.start + frame / FPS


class Crop(NamedTuple):
    """The part of a frame that is kept, and its new size in pixels."""

    box: Box
    width: int
    height: int


def make_grid(probe: Probe) -> Grid:
    """Return the output frames of a probed file."""
    start = float(probe.times[0])
    count = max(1, round((probe.end - start) * FPS))
    times = start + np.arange(count) / FPS

    # The nearest source frame; of two equally near ones the earlier.
    later = np.searchsorted(probe.times, times).clip(1, max(1, len(probe.times) - 1))
    later = np.minimum(later, len(probe.times) - 1)
    earlier = np.maximum(later - 1, 0)
    is_earlier = np.abs(probe.times[earlier] - times) <= np.abs(probe.times[later] - times)
    indices = np.where(is_earlier, earlier, later)

    # Half a frame of margin before damage: its first frame may show an earlier moment.
    missing = np.abs(probe.times[indices] - times) > FROZEN_SECONDS
    damaged = np.zeros(count, bool)
    for first, last in probe.damaged:
        damaged |= (times >= first - 0.5 / FPS) & (times <= last)
    return Grid(start, indices, missing, damaged)


def audio_of(audio: AudioTrack, grid: Grid, first: int, last: int) -> NDArray[np.float32]:
    """Return samples [640 (last - first)] of output frames first to last; silence if none."""
    # Counted in the track's own samples; what lies outside the track stays silent.
    begin = round((grid.seconds(first) - audio.start_seconds) * RATE_HZ)
    end = begin + (last - first) * SAMPLES_PER_FRAME
    samples = np.zeros(end - begin, np.float32)
    inside = audio.samples[max(begin, 0) : max(end, 0)]
    offset = max(-begin, 0)
    samples[offset : offset + len(inside)] = inside
    return samples


def has_audio(audio: AudioTrack, grid: Grid) -> NDArray[np.bool_]:
    """Return [K] whether audio was decoded for each frame; at the track's ends a part is enough."""
    begin = (grid.start - audio.start_seconds) * RATE_HZ
    begins = begin + np.arange(len(grid.indices)) * SAMPLES_PER_FRAME
    covered = (begins > -SAMPLES_PER_FRAME) & (begins < len(audio.samples))
    times = grid.start + np.arange(len(grid.indices)) / FPS
    for first, last in audio.damaged:
        covered &= (times + 1 / FPS <= first) | (times >= last)
    return np.asarray(covered, bool)


def crop_head(faces: NDArray[np.float32], width: int, height: int, size: int) -> Crop:
    """Return a square of `size` pixels around the head, for face boxes [T, 4] of one clip."""
    # A square of twice the face, which stays within the frame.
    left, top = faces[:, :2].min(0)
    right, bottom = faces[:, 2:].max(0)
    side = min(HEAD_SCALE * max(right - left, bottom - top), width, height)
    x = min(max((left + right - side) / 2, 0), width - side)
    y = min(max((top + bottom - side) / 2, 0), height - side)
    return Crop((float(x), float(y), float(x + side), float(y + side)), size, size)


def crop_full(width: int, height: int, size: int) -> Crop:
    """Return nearly the full frame in its own aspect ratio, with the area of size x size pixels."""
    scale = size / (width * height) ** 0.5
    multiple = WAN.token_pixels
    columns, rows = (max(1, round(side * scale / multiple)) for side in (width, height))
    aspect = columns / rows
    kept_width, kept_height = min(width, height * aspect), min(height, width / aspect)
    x, y = (width - kept_width) / 2, (height - kept_height) / 2
    box = (x, y, x + kept_width, y + kept_height)
    return Crop(box, columns * multiple, rows * multiple)


def crop_frame(frame: Image, crop: Crop) -> Image:
    """Return the cropped part of a frame at its new size."""
    x0, y0, x1, y1 = crop.box
    scale = crop.width / (x1 - x0)

    # Shrink by averaging: fine patterns would alias to moire.
    if scale < 1:
        left, top, right, bottom = (round(v) for v in crop.box)
        part = frame[top : max(bottom, top + 1), left : max(right, left + 1)]
        size = (crop.width, crop.height)
        return np.asarray(cv2.resize(part, size, interpolation=cv2.INTER_AREA), np.uint8)

    # Half a pixel: the centers of the corner pixels map onto each other, as in cv2.resize.
    to_source = np.array(
        [[1 / scale, 0, x0 + 0.5 / scale - 0.5], [0, 1 / scale, y0 + 0.5 / scale - 0.5]]
    )
    enlarged = cv2.warpAffine(
        frame,
        to_source,
        (crop.width, crop.height),
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return np.asarray(enlarged, np.uint8)


def boxes_in_crop(boxes: NDArray[np.float32], crop: Crop) -> NDArray[np.float32]:
    """Return source boxes [T, 4] in pixels of the clip, clipped at its edges."""
    x0, y0, x1, y1 = crop.box
    scale = np.array([crop.width / (x1 - x0), crop.height / (y1 - y0)] * 2, np.float32)
    moved = (boxes - np.array([x0, y0, x0, y0], np.float32)) * scale
    edges = np.array([crop.width, crop.height] * 2, np.float32)
    return np.clip(moved, 0, edges).astype(np.float32)
