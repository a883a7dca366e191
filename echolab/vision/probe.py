"""What a video file holds: every frame's time, the damage, and how it is meant to be seen.

All of it is decoded once, without converting a picture: headers lie (a cut file keeps its length,
a variable rate its nominal one), and damage shows itself only here.
"""

from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from echolab.data.decoding import Advance, decoded, ignore, opened, picture_stream
from echolab.errors import MediaError

LONGEST_SECONDS = 24 * 3600.0
MISSING_SECONDS = 0.5  # a file that ends this much before its header says is cut


class Probe(NamedTuple):
    """The picture track of one file.  Times are on the file's own clock."""

    path: Path
    times: NDArray[np.float64]  # [N] seconds at which each decoded frame begins, ascending
    end: float  # seconds at which the last frame ends
    width: int  # as seen: square pixels, turned upright
    height: int
    rotation: int  # quarter turns to the left that set the coded picture upright
    interlaced: bool  # some frames hold two moments, in alternate rows
    damaged: list[tuple[float, float]]  # seconds that cannot be trusted
    has_sound: bool


class _Reading(NamedTuple):
    times: list[float]
    damaged: list[tuple[float, float]]
    size: tuple[int, int]  # coded pixels
    rotation: int  # degrees, of the first frame
    interlaced: bool


def probe(path: Path, advance: Advance = ignore) -> Probe:
    """Decode the picture track of `path` once; raise MediaError if there is none to use.

    Raises OSError if the file cannot be read, and MemoryError.
    """
    try:
        with opened(path) as container:
            stream = picture_stream(container)
            reading = _read(container, stream, advance)
            has_sound = bool(container.streams.audio)
            aspect = _pixel_aspect(stream)
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            length = _stated_end(stream)
    except (MemoryError, OSError):
        raise
    except (av.FFmpegError, ValueError) as error:
        raise MediaError(f"damaged: cannot be opened as a video ({_line(error)})") from error
    if not reading.times:
        raise MediaError("damaged: not one frame can be decoded")
    times = np.array(reading.times)
    if times[-1] - times[0] > LONGEST_SECONDS:
        raise MediaError(f"damaged: the time stamps span {(times[-1] - times[0]) / 3600:.0f} hours")
    step = float(np.median(np.diff(times))) if len(times) > 1 else 1 / rate
    end = float(times[-1]) + step
    damaged = list(reading.damaged)
    if length - end > MISSING_SECONDS:
        damaged.append((end, length))
    turns = round(reading.rotation / 90) % 4
    # Widen narrow pixels and never shrink a side; even sides are what the coders want.
    width = reading.size[0] * max(aspect, 1)
    height = reading.size[1] / min(aspect, 1)
    seen = (height, width) if turns % 2 else (width, height)
    even = [max(2, round(side / 2) * 2) for side in seen]
    interlaced = reading.interlaced
    return Probe(path, times, end, even[0], even[1], turns, interlaced, damaged, has_sound)


def _read(container: Any, stream: Any, advance: Advance) -> _Reading:
    times: list[float] = []
    damaged: list[tuple[float, float]] = []
    size, rotation, interlaced = (0, 0), 0, False
    fault: float | None = None  # since when the picture cannot be trusted: until a key frame
    for time, frame in decoded(container, stream, advance):
        if frame is None:
            fault = time if fault is None else fault
            continue
        if not times:
            size, rotation = (frame.width, frame.height), int(frame.rotation)
        if (frame.width, frame.height) != size:
            raise MediaError(
                f"picture size: it changes from {size[0]}x{size[1]} to "
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
    """Return where the header says that the picture ends, in seconds."""
    if stream.duration is not None:
        return float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    return 0.0


def _pixel_aspect(stream: Any) -> float:
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if 0.1 < aspect < 10 else 1.0


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__
