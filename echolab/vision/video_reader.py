"""Probe a video file, and read its frames by index: upright, with square pixels, at any size.

A probe decodes every frame once, without converting it: headers are wrong in cut files (their
length) and at variable rates (their nominal rate), and damage appears only in decoding.

PyAV decodes the file in one pass that keeps one frame at a time.  decord is for the short clips of
shards (`echolab.data.media.decode_mp4`): in MPEG streams it counts frames from the second group of
pictures on, and it decodes ahead of its reader without a bound.
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
    return Probe(
        path, times, end, even[0], even[1], quarters, reading.interlaced, damaged, has_audio
    )


def _read(container: Any, stream: Any, advance: Advance) -> _Reading:
    """Decode all frames; raise MediaError if their size changes."""
    # Damage lasts to the next intact key frame: frames between may decode and be wrong.
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
    """Return the end of the video track by its header, in seconds; 0 if unknown."""
    if stream.duration is not None:
        return float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    return 0.0


def _pixel_aspect(stream: Any) -> float:
    # Some encoders write nonsense here, such as 0 or thousands.
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if 0.1 < aspect < 10 else 1.0


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__


# Reading frames


class VideoReader:
    """Reads frames of one probed file, scaled to width x height.

    Ascending indices, over several calls too, take one pass over the file; a smaller index begins
    another pass.
    """

    def __init__(
        self, probe: Probe, width: int, height: int, advance: Advance = ignore_progress
    ) -> None:
        self.probe, self.width, self.height, self.advance = probe, width, height, advance
        self._restart()

    def read(self, indices: NDArray[np.int64]) -> Iterator[Image]:
        """Yield images [Y, X, 3] of frame indices; an index may repeat.

        Raise MediaError if the file does not decode as it did in the probe, OSError if it cannot
        be read, and MemoryError.
        """
        for index in indices.tolist():
            yield self._image(index).copy()

    def _restart(self) -> None:
        self._frames = self._indexed()
        self._first = self._last = -1  # range of indices that the current frame stands for
        self._current: Image | None = None

    def _image(self, index: int) -> Image:
        """Return one frame, decoding up to it."""
        if index < self._first:
            self._restart()
        # A frame stands for all indices since the one before it: the decoder may leave frames out.
        while self._last < index:
            try:
                following, frame = next(self._frames)
            except StopIteration:
                raise MediaError(f"damaged: frame {index} cannot be decoded again") from None
            self._first, self._last = self._last + 1, following
            self._current = self._upright(frame) if following >= index else None
        assert self._current is not None
        return self._current

    def _indexed(self) -> Iterator[tuple[int, Any]]:
        """Yield frames with their indices in the probe, identified by their times."""
        # The probe's times identify a frame; one that it did not see is skipped.
        times = self.probe.times
        with open_media(self.probe.path) as container:
            stream = video_stream(container)
            # A filter graph keeps the frame before, so every pass needs one of its own.
            graph = _deinterlacer(stream) if self.probe.interlaced else None
            for time, frame in decode_frames(container, stream, self.advance):
                index = int(np.searchsorted(times, time))
                if frame is None or index == len(times) or times[index] != time:
                    continue
                if graph is None:
                    yield index, frame
                else:
                    yield from _filtered(graph, index, frame)
            if graph is not None:
                yield from _filtered(graph, 0, None)

    def _upright(self, frame: Any) -> Image:
        # The size of the decoded frame, turned upright, then scaled by area.
        image = np.rot90(frame.to_ndarray(format="rgb24"), self.probe.rotation)
        size = (self.width, self.height)
        resized = cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_AREA)
        return np.asarray(resized, np.uint8)


def _deinterlacer(stream: Any) -> Any:
    """Return a filter graph that makes one full frame of each interlaced one."""
    graph = av.filter.Graph()
    source = graph.add_buffer(template=stream, time_base=Fraction(1, 1))
    graph.link_nodes(source, graph.add("yadif", "deint=interlaced"), graph.add("buffersink"))
    graph.configure()
    return graph


def _filtered(graph: Any, index: int, frame: Any) -> Iterator[tuple[int, Any]]:
    """Push a frame, or None for the end, and yield the output with its index.

    The index passes through the filter as the time stamp: the filter needs the next frame, so the
    output lags by one.
    """
    if frame is not None:
        frame.pts, frame.time_base = index, Fraction(1, 1)
    # After the end the filter drains, and raises EOFError.
    graph.push(frame)
    while True:
        try:
            done = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        yield int(done.pts * done.time_base), done
