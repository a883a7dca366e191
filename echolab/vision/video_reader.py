"""Probe a video file, and read its frames by index: upright, with square pixels, at any size.

The probe decodes every frame once, without color conversion: headers are wrong in truncated files
(length) and for variable frame rates (nominal rate), and damage appears only in decoding.

PyAV decodes the file in one pass and holds one frame at a time.  decord is used only for the short
clips in shards (`echolab.data.media.decode_mp4`): in MPEG streams it misses the frames of the first
group of pictures, and it decodes ahead of its reader without a bound.
"""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from echolab.data.decoding import Advance, decode_frames, ignore_progress, open_media, video_stream
from echolab.errors import MediaError
from echolab.vision.faces import Image

LONGEST_SECONDS = 24 * 3600.0
MISSING_SECONDS = 0.5  # a file that ends earlier than its header states, by more, is truncated


class Probe(NamedTuple):
    """The video track of one file.  Times are on the file's clock."""

    path: Path
    times: NDArray[np.float64]  # [N] seconds at which each decoded frame begins, ascending
    end: float  # seconds at which the last frame ends
    width: int  # display size: square pixels, upright
    height: int
    rotation: int  # counterclockwise rotation of the coded frame, in units of 90 degrees
    interlaced: bool  # whether any frame is interlaced
    damaged: list[tuple[float, float]]  # unusable spans in seconds
    has_audio: bool


class _Reading(NamedTuple):
    times: list[float]
    damaged: list[tuple[float, float]]
    size: tuple[int, int]  # coded pixels
    rotation: int  # degrees, of the first frame
    interlaced: bool


def probe(path: Path, advance: Advance = ignore_progress) -> Probe:
    """Decode the video track of `path` once; raise MediaError if there is no usable one.

    Raise OSError if the file cannot be read, and MemoryError.
    """
    try:
        with open_media(path) as container:
            stream = video_stream(container)
            reading = _decode_all(container, stream, advance)
            has_audio = bool(container.streams.audio)
            aspect = _pixel_aspect(stream)
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            stated_end = _stated_end(stream)
    except (MemoryError, OSError):
        raise
    except (av.FFmpegError, ValueError) as error:
        raise MediaError(f"damaged: cannot be opened as a video ({_first_line(error)})") from error
    # Compute the end of the last frame, and compare it with the header.
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

    # Display size: make pixels square without shrinking a side; encoders need even sides.
    quarters = round(reading.rotation / 90) % 4
    width = reading.size[0] * max(aspect, 1)
    height = reading.size[1] / min(aspect, 1)
    upright = (height, width) if quarters % 2 else (width, height)
    even = [max(2, round(side / 2) * 2) for side in upright]
    return Probe(
        path, times, end, even[0], even[1], quarters, reading.interlaced, damaged, has_audio
    )


def _decode_all(container: Any, stream: Any, advance: Advance) -> _Reading:
    """Decode all frames; raise MediaError if their size changes."""
    # Damage extends to the next intact key frame: frames in between may decode wrongly.
    times: list[float] = []
    damaged: list[tuple[float, float]] = []
    size, rotation, interlaced = (0, 0), 0, False
    fault: float | None = None  # seconds at which damage began
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
    """Return the end of the video track in seconds according to the header; 0 if unknown."""
    if stream.duration is not None:
        return float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    return 0.0


def _pixel_aspect(stream: Any) -> float:
    # Ignore absurd values such as 0 or thousands, which some encoders write.
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if 0.1 < aspect < 10 else 1.0


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__


# Reading frames


class VideoReader:
    """Reads frames of one probed file, scaled to width x height.

    Ascending indices, also across calls, need one pass over the file; a smaller index starts
    another pass.
    """

    def __init__(
        self, probe: Probe, width: int, height: int, advance: Advance = ignore_progress
    ) -> None:
        self.probe, self.width, self.height, self.advance = probe, width, height, advance
        self._restart()

    def read(self, indices: NDArray[np.int64]) -> Iterator[Image]:
        """Yield the image [Y, X, 3] of each frame index; an index may repeat.

        Raise MediaError if the file decodes differently than in the probe, OSError if it cannot be
        read, and MemoryError.
        """
        for index in indices.tolist():
            yield self._image(index).copy()

    def _restart(self) -> None:
        self._frames = self._indexed_frames()
        self._first = self._last = -1  # range of indices for which the current frame is used
        self._current: Image | None = None

    def _image(self, index: int) -> Image:
        """Decode up to frame `index` and return it."""
        if index < self._first:
            self._restart()
        # The decoder may skip frames: use the next decoded frame for skipped indices.
        while self._last < index:
            try:
                following, frame = next(self._frames)
            except StopIteration:
                raise MediaError(f"damaged: frame {index} cannot be decoded again") from None
            self._first, self._last = self._last + 1, following
            self._current = self._upright(frame) if following >= index else None
        assert self._current is not None
        return self._current

    def _indexed_frames(self) -> Iterator[tuple[int, Any]]:
        """Yield (index in the probe, frame)."""
        # Identify frames by time; skip frames that are not in the probe.
        times = self.probe.times
        with open_media(self.probe.path) as container:
            stream = video_stream(container)
            # A filter graph buffers the previous frame, so every pass needs a new graph.
            graph = _deinterlacer(stream) if self.probe.interlaced else None
            for time, frame in decode_frames(container, stream, self.advance):
                index = int(np.searchsorted(times, time))
                if frame is None or index == len(times) or times[index] != time:
                    continue
                if graph is None:
                    yield index, frame
                else:
                    yield from _filter_frame(graph, index, frame)
            if graph is not None:
                yield from _filter_frame(graph, 0, None)

    def _upright(self, frame: Any) -> Image:
        # Rotate the decoded frame upright, then scale it by area averaging.
        image = np.rot90(frame.to_ndarray(format="rgb24"), self.probe.rotation)
        size = (self.width, self.height)
        resized = cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_AREA)
        return np.asarray(resized, np.uint8)


def _deinterlacer(stream: Any) -> Any:
    """Return a filter graph that converts each interlaced frame to one progressive frame."""
    graph = av.filter.Graph()
    source = graph.add_buffer(template=stream, time_base=Fraction(1, 1))
    graph.link_nodes(source, graph.add("yadif", "deint=interlaced"), graph.add("buffersink"))
    graph.configure()
    return graph


def _filter_frame(graph: Any, index: int, frame: Any) -> Iterator[tuple[int, Any]]:
    """Push a frame, or None at the end, and yield (index, output frame).

    The index passes through the filter as the time stamp, since the output lags by one frame.
    """
    if frame is not None:
        frame.pts, frame.time_base = index, Fraction(1, 1)
    # After the end the filter yields its buffered frames, then raises EOFError.
    graph.push(frame)
    while True:
        try:
            done = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        yield int(done.pts * done.time_base), done
