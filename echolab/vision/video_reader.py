"""Pictures of a video by frame number: upright, with square pixels, at any size.

PyAV decodes the file in one pass that keeps one picture at a time.  decord is for the short clips
of shards (`echolab.data.media.decode_mp4`): in MPEG streams it numbers frames from the second group
of pictures on, and while nobody asks it decodes ahead without a bound.
"""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from echolab.data.decoding import Advance, decoded, ignore, opened, picture_stream
from echolab.errors import MediaError
from echolab.vision.probe import Probe

Picture = NDArray[np.uint8]


class VideoReader:
    """Reads frames of one probed file, scaled to width x height.

    Numbers that ascend, over several calls too, take one pass over the file; a smaller number
    begins another.
    """

    def __init__(self, probe: Probe, width: int, height: int, advance: Advance = ignore) -> None:
        self.probe, self.width, self.height, self.advance = probe, width, height, advance
        self._restart()

    def read(self, numbers: NDArray[np.int64]) -> Iterator[Picture]:
        """Pictures [Y, X, 3] of frame numbers; a number may come twice.

        Raises MediaError if the file does not decode as it did in the probe, OSError if it cannot
        be read, and MemoryError.
        """
        for number in numbers.tolist():
            yield self._picture(number).copy()

    def _restart(self) -> None:
        self._frames = self._numbered()
        self._first = self._number = -1  # the frame at hand stands for these numbers and between
        self._shown: Picture | None = None

    def _picture(self, number: int) -> Picture:
        if number < self._first:
            self._restart()
        while self._number < number:
            try:
                following, frame = next(self._frames)
            except StopIteration:
                raise MediaError(f"damaged: frame {number} cannot be decoded again") from None
            self._first, self._number = self._number + 1, following
            self._shown = self._upright(frame) if following >= number else None
        assert self._shown is not None
        return self._shown

    def _numbered(self) -> Iterator[tuple[int, Any]]:
        """Yield frames with their numbers in the probe, known by their times."""
        times = self.probe.times
        with opened(self.probe.path) as container:
            stream = picture_stream(container)
            graph = _deinterlacer(stream) if self.probe.interlaced else None
            for time, frame in decoded(container, stream, self.advance):
                number = int(np.searchsorted(times, time))
                if frame is None or number == len(times) or times[number] != time:
                    continue
                if graph is None:
                    yield number, frame
                else:
                    yield from _filtered(graph, number, frame)
            if graph is not None:
                yield from _filtered(graph, 0, None)

    def _upright(self, frame: Any) -> Picture:
        picture = np.rot90(frame.to_ndarray(format="rgb24"), self.probe.rotation)
        size = (self.width, self.height)
        resized = cv2.resize(np.ascontiguousarray(picture), size, interpolation=cv2.INTER_AREA)
        return np.asarray(resized, np.uint8)


def _deinterlacer(stream: Any) -> Any:
    """Return a filter graph that makes one full picture of each interlaced frame."""
    graph = av.filter.Graph()
    source = graph.add_buffer(template=stream, time_base=Fraction(1, 1))
    graph.link_nodes(source, graph.add("yadif", "deint=interlaced"), graph.add("buffersink"))
    graph.configure()
    return graph


def _filtered(graph: Any, number: int, frame: Any) -> Iterator[tuple[int, Any]]:
    """Push a frame, or None for the end, and yield what comes out with its number.

    The number goes through the filter as the time stamp: the filter needs the next frame, so a
    frame comes out one later.
    """
    if frame is not None:
        frame.pts, frame.time_base = number, Fraction(1, 1)
    graph.push(frame)
    while True:
        try:
            done = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        yield int(done.pts * done.time_base), done
