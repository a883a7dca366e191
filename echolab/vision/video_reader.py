"""Read frames of a video by index: upright, with square pixels, at any size.

PyAV decodes the file in one pass that keeps one frame at a time.  decord is for the short clips of
shards (`echolab.data.media.decode_mp4`): in MPEG streams it counts frames from the second group of
pictures on, and it decodes ahead of its reader without a bound.
"""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from echolab.data.decoding import Advance, decode_frames, ignore_progress, open_media, video_stream
from echolab.errors import MediaError
from echolab.vision.faces import Image
from echolab.vision.probe import Probe


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
        times = self.probe.times
        with open_media(self.probe.path) as container:
            stream = video_stream(container)
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
    graph.push(frame)
    while True:
        try:
            done = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        yield int(done.pts * done.time_base), done
