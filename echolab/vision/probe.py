"""Probe a video file: the time of each frame, damaged spans, size, rotation and interlacing.

Decode every frame once, without converting it: headers are wrong in cut files (their length) and
at variable rates (their nominal rate), and damage appears only in decoding.
"""

from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from echolab.data.decoding import Advance, decode_frames, ignore_progress, open_media, video_stream
from echolab.errors import MediaError

LONGEST_SECONDS = 24 * 3600.0
MISSING_SECONDS = 0.5  # a file that ends this long before the end in its header is cut


class Probe(NamedTuple):
    """The video track of one file.  Times are on the file's own clock."""

    path: Path
    times: NDArray[np.float64]  # [N] seconds at which each decoded frame begins, ascending
    end: float  # seconds at which the last frame ends
    width: int  # as displayed: square pixels, upright
    height: int
    rotation: int  # quarter turns counterclockwise from the coded frame to upright
    interlaced: bool  # some frames hold two moments, in alternate rows
    damaged: list[tuple[float, float]]  # spans in seconds that cannot be used
    has_audio: bool


class _Reading(NamedTuple):
    times: list[float]
    damaged: list[tuple[float, float]]
    size: tuple[int, int]  # coded pixels
    rotation: int  # degrees, of the first frame
    interlaced: bool


def probe(path: Path, advance: Advance = ignore_progress) -> Probe:
    """Decode the video track of `path` once; raise MediaError if there is none to use.

    Raise OSError if the file cannot be read, and MemoryError.
    """
    try:
        with open_media(path) as container:
            stream = video_stream(container)
            reading = _read(container, stream, advance)
            has_audio = bool(container.streams.audio)
            aspect = _pixel_aspect(stream)
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            stated_end = _stated_end(stream)
    except (MemoryError, OSError):
        raise
    except (av.FFmpegError, ValueError) as error:
        raise MediaError(f"damaged: cannot be opened as a video ({_line(error)})") from error
    # Derive the end of the last frame, and compare it with the header.
    if not reading.times:
        raise MediaError("damaged: not one frame can be decoded")
    times = np.array(reading.times)
    if times[-1] - times[0] > LONGEST_SECONDS:
        raise MediaError(f"damaged: the time stamps span {(times[-1] - times[0]) / 3600:.0f} hours")
    step = float(np.median(np.diff(times))) if len(times) > 1 else 1 / rate
    end = float(times[-1]) + step
    damaged = list(reading.damaged)
    if stated_end - end > MISSING_SECONDS:
        damaged.append((end, stated_end))

    # Display size: widen narrow pixels and never shrink a side; encoders want even sides.
    quarters = round(reading.rotation / 90) % 4
    width = reading.size[0] * max(aspect, 1)
    height = reading.size[1] / min(aspect, 1)
    upright = (height, width) if quarters % 2 else (width, height)
    even = [max(2, round(side / 2) * 2) for side in upright]
    interlaced = reading.interlaced
    return Probe(path, times, end, even[0], even[1], quarters, interlaced, damaged, has_audio)


def _read(container: Any, stream: Any, advance: Advance) -> _Reading:
    """Decode all frames; raise MediaError if their size changes."""
    times: list[float] = []
    damaged: list[tuple[float, float]] = []
    size, rotation, interlaced = (0, 0), 0, False
    fault: float | None = None  # where damage began; it ends at the next intact key frame
    for time, frame in decode_frames(container, stream, advance):
        if frame is None:
            fault = time if fault is None else fault
            continue
        if not times:
            size, rotation = (frame.width, frame.height), int(frame.rotation)
        if (frame.width, frame.height) != size:
            raise MediaError(
                f"frame size: it changes from {size[0]}x{size[1]} to "
                f"{frame.width}x{frame.height} at {time:.2f} s; cut the file there"
            )
        if frame.is_corrupt and fault is None:
            fault = time
        elif fault is not None and frame.key_frame and not frame.is_corrupt:
            damaged.append((fault, time))
            fault = None
        interlaced |= frame.interlaced_frame
        times.append(time)
    if fault is not None:
        damaged.append((fault, times[-1] + 0.04 if times else fault))
    return _Reading(times, damaged, size, rotation, interlaced)


def _stated_end(stream: Any) -> float:
    """Return the end of the video track by its header, in seconds; 0 if unknown."""
    if stream.duration is not None:
        return float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    return 0.0


def _pixel_aspect(stream: Any) -> float:
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if 0.1 < aspect < 10 else 1.0


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__
