"""Normalize a video to 25 fps, 16 kHz audio, and a cropped and scaled frame size.

Frame k of the output grid is at time start + k / 25 s, where its 640 audio samples begin.  It shows
the source frame nearest in time, so that video and audio are offset by at most half a source frame,
also for variable frame rates and late starts.
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
FROZEN_SECONDS = 0.2  # a frame without a source frame within this time counts as missing
HEAD_SCALE = 2.0  # side of the head crop / larger side of the union of a clip's face boxes

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in source pixels


class Grid(NamedTuple):
    """The output frames of one file."""

    start: float  # seconds on the file's clock
    indices: NDArray[np.int64]  # [K] index of the source frame of each output frame
    missing: NDArray[np.bool_]  # [K] whether no source frame is close enough in time
    damaged: NDArray[np.bool_]  # [K] whether the source is damaged at this time

    def seconds(self, frame: int) -> float:
        """Return the start time of output frame `frame` on the file's clock."""
        return self.start + frame / FPS


class Crop(NamedTuple):
    """The region of a frame to crop, and its output size in pixels."""

    box: Box
    width: int
    height: int


def make_grid(probe: Probe) -> Grid:
    """Return the output frames of a probed file."""
    start = float(probe.times[0])
    count = max(1, round((probe.end - start) * FPS))
    times = start + np.arange(count) / FPS

    # Find the nearest source frame; in a tie, the earlier one.
    later = np.searchsorted(probe.times, times).clip(1, max(1, len(probe.times) - 1))
    later = np.minimum(later, len(probe.times) - 1)
    earlier = np.maximum(later - 1, 0)
    is_earlier = np.abs(probe.times[earlier] - times) <= np.abs(probe.times[later] - times)
    indices = np.where(is_earlier, earlier, later)

    # Extend damage by half a frame before, since the nearest source frame may be a later one.
    missing = np.abs(probe.times[indices] - times) > FROZEN_SECONDS
    damaged = np.zeros(count, bool)
    for first, last in probe.damaged:
        damaged |= (times >= first - 0.5 / FPS) & (times <= last)
    return Grid(start, indices, missing, damaged)


def audio_of(audio: AudioTrack, grid: Grid, first: int, last: int) -> NDArray[np.float32]:
    """Return the samples [640 (last - first)] of output frames [first, last)."""
    # Indices count the track's samples; the result is silent outside the track.
    begin = round((grid.seconds(first) - audio.start_seconds) * RATE_HZ)
    end = begin + (last - first) * SAMPLES_PER_FRAME
    samples = np.zeros(end - begin, np.float32)
    inside = audio.samples[max(begin, 0) : max(end, 0)]
    offset = max(-begin, 0)
    samples[offset : offset + len(inside)] = inside
    return samples


def has_audio(audio: AudioTrack, grid: Grid) -> NDArray[np.bool_]:
    """Return [K] whether each frame has decoded audio; partly, at the ends of the track."""
    begin = (grid.start - audio.start_seconds) * RATE_HZ
    begins = begin + np.arange(len(grid.indices)) * SAMPLES_PER_FRAME
    covered = (begins > -SAMPLES_PER_FRAME) & (begins < len(audio.samples))
    times = grid.start + np.arange(len(grid.indices)) / FPS
    for first, last in audio.damaged:
        covered &= (times + 1 / FPS <= first) | (times >= last)
    return np.asarray(covered, bool)


def crop_head(faces: NDArray[np.float32], width: int, height: int, size: int) -> Crop:
    """Return a square crop around the head, scaled to `size`, for a clip's face boxes [T, 4]."""
    # A square of twice the face size, shifted to lie within the frame.
    left, top = faces[:, :2].min(0)
    right, bottom = faces[:, 2:].max(0)
    side = min(HEAD_SCALE * max(right - left, bottom - top), width, height)
    x = min(max((left + right - side) / 2, 0), width - side)
    y = min(max((top + bottom - side) / 2, 0), height - side)
    return Crop((float(x), float(y), float(x + side), float(y + side)), size, size)


def crop_full(width: int, height: int, size: int) -> Crop:
    """Return nearly the full frame, with its aspect ratio and about the area of size x size."""
    scale = size / (width * height) ** 0.5
    multiple = WAN.token_pixels
    columns, rows = (max(1, round(side * scale / multiple)) for side in (width, height))
    aspect = columns / rows
    kept_width, kept_height = min(width, height * aspect), min(height, width / aspect)
    x, y = (width - kept_width) / 2, (height - kept_height) / 2
    box = (x, y, x + kept_width, y + kept_height)
    return Crop(box, columns * multiple, rows * multiple)


def crop_frame(frame: Image, crop: Crop) -> Image:
    """Return the cropped region of a frame, scaled to the output size."""
    x0, y0, x1, y1 = crop.box
    scale = crop.width / (x1 - x0)

    # Downscale by area averaging, to avoid aliasing.
    if scale < 1:
        left, top, right, bottom = (round(v) for v in crop.box)
        part = frame[top : max(bottom, top + 1), left : max(right, left + 1)]
        size = (crop.width, crop.height)
        return np.asarray(cv2.resize(part, size, interpolation=cv2.INTER_AREA), np.uint8)

    # Offset by half a pixel, so that pixel centers are aligned as in cv2.resize.
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
    """Convert source boxes [T, 4] to pixels of the crop, clipped at its edges."""
    x0, y0, x1, y1 = crop.box
    scale = np.array([crop.width / (x1 - x0), crop.height / (y1 - y0)] * 2, np.float32)
    moved = (boxes - np.array([x0, y0, x0, y0], np.float32)) * scale
    edges = np.array([crop.width, crop.height] * 2, np.float32)
    return np.clip(moved, 0, edges).astype(np.float32)
