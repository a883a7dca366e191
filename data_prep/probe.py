"""What a video file holds: every frame's time, the damage, and how it is meant to be seen.

All of it is decoded once, without converting a picture: headers lie (a cut file keeps its length,
a variable rate its nominal one), and damage shows itself only here.
"""

from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

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
    damaged: list[tuple[float, float]]  # seconds that cannot be trusted
    has_sound: bool


class _Reading(NamedTuple):
    times: list[float]
    damaged: list[tuple[float, float]]
    rotation: int  # degrees, of the first frame
    aspect: float  # of a pixel, of the first frame


def probe(path: Path) -> Probe:
    """Decode the picture track of `path` once; raises MediaError where there is none to use."""
    try:
        with av.open(str(path)) as container:
            streams = [s for s in container.streams.video if not _is_cover(s)]
            if not streams:
                raise MediaError("no picture: the file holds no video track")
            stream = streams[0]
            stream.thread_type = "AUTO"
            reading = _read(container, stream)
            has_sound = bool(container.streams.audio)
            coded = stream.codec_context.width, stream.codec_context.height
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            length = _stated_end(container, stream)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"damaged: cannot be opened as a video ({_line(error)})") from error
    if not reading.times:
        raise MediaError("damaged: not one frame can be decoded")
    times = np.unique(np.array(reading.times))
    if times[-1] - times[0] > LONGEST_SECONDS:
        raise MediaError(f"damaged: the time stamps span {(times[-1] - times[0]) / 3600:.0f} hours")
    step = float(np.median(np.diff(times))) if len(times) > 1 else 1 / rate
    end = float(times[-1]) + step
    damaged = list(reading.damaged)
    if length - end > MISSING_SECONDS:
        damaged.append((end, length))
    turns = round(reading.rotation / 90) % 4
    # Widen narrow pixels and never shrink a side; even sides are what the coders want.
    width = coded[0] * max(reading.aspect, 1)
    height = coded[1] / min(reading.aspect, 1)
    seen = (height, width) if turns % 2 else (width, height)
    even = [max(2, round(side / 2) * 2) for side in seen]
    return Probe(path, times, end, even[0], even[1], turns, damaged, has_sound)


def _read(container: Any, stream: Any) -> _Reading:
    times: list[float] = []
    damaged: list[tuple[float, float]] = []
    rotation, aspect = 0, 1.0
    fault: float | None = None  # since when the picture cannot be trusted: until a key frame
    for packet in _packets(container, stream, damaged):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            fault = _time(packet, times) if fault is None else fault
            continue
        for frame in frames:
            if not times:
                rotation = int(frame.rotation)
                aspect = _pixel_aspect(frame, stream)
            time = _time(frame, times)
            if frame.is_corrupt and fault is None:
                fault = time
            elif fault is not None and frame.key_frame and not frame.is_corrupt:
                damaged.append((fault, time))
                fault = None
            times.append(time)
    if fault is not None:
        damaged.append((fault, times[-1] + 0.04 if times else fault))
    return _Reading(times, damaged, rotation, aspect)


def _packets(container: Any, stream: Any, damaged: list[tuple[float, float]]) -> Any:
    """The packets of a stream up to the first that cannot be read."""
    last = 0.0
    try:
        for packet in container.demux(stream):
            last = float(packet.pts * packet.time_base) if packet.pts is not None else last
            yield packet
    except av.FFmpegError:
        damaged.append((last, max(last, _stated_end(container, stream))))


def _time(stamped: Any, times: list[float]) -> float:
    """Time of a frame or packet; one without a stamp follows the last."""
    if stamped.pts is not None and stamped.time_base is not None:
        return float(stamped.pts * stamped.time_base)
    return times[-1] + 0.04 if times else 0.0


def _stated_end(container: Any, stream: Any) -> float:
    """Where the header says that the picture ends."""
    if stream.duration is not None:
        return float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    return 0.0


def _pixel_aspect(frame: Any, stream: Any) -> float:
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if 0.1 < aspect < 10 else 1.0


def _is_cover(stream: Any) -> bool:
    """Music files carry their cover as a video track of one picture."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__
