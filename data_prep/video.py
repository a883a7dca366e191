"""Pictures of a video by frame number: upright, with square pixels, at any size.

decord decodes; PyAV steps in where decord cannot open a file, counts other frames than the probe,
or where the picture is damaged or turned (it goes by time stamps, so a lost frame shifts nothing).
"""

from collections.abc import Iterator
from typing import Any

import av
import cv2
import decord
import numpy as np
from numpy.typing import NDArray

from data_prep.probe import Probe
from echolab.errors import MediaError

CHUNK_BYTES = 64 * 1024**2  # decoded pictures held at once
DECORD_WIDTH = 74  # decord 0.6 cannot batch some narrower pictures

Picture = NDArray[np.uint8]


class VideoReader:
    """Reads frames of one probed file, scaled to width x height."""

    def __init__(self, probe: Probe, width: int, height: int) -> None:
        self.probe, self.width, self.height = probe, width, height
        self.reader = _open_decord(probe, width, height)

    @property
    def decoder(self) -> str:
        """Which of the two decodes this file."""
        return "decord" if self.reader is not None else "PyAV"

    def read(self, numbers: NDArray[np.int64]) -> Iterator[Picture]:
        """Pictures [Y, X, 3] of ascending frame numbers; a number may come twice."""
        if self.reader is None:
            yield from self._read_av(numbers)
            return
        chunk = max(1, CHUNK_BYTES // (3 * self.width * self.height))
        for start in range(0, len(numbers), chunk):
            wanted = numbers[start : start + chunk]
            try:
                yield from self.reader.get_batch(wanted.tolist()).asnumpy()
            except (decord.DECORDError, RuntimeError) as error:
                first = self.probe.times[wanted[0]]
                raise MediaError(f"damaged: cannot be decoded from {first:.2f} s on") from error

    def _read_av(self, numbers: NDArray[np.int64]) -> Iterator[Picture]:
        times, given = self.probe.times, 0
        with av.open(str(self.probe.path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if len(numbers) and numbers[0] > 0:
                container.seek(int(times[numbers[0]] / stream.time_base), stream=stream)
            for frame in _frames(container, stream):
                time = float(frame.pts * frame.time_base) if frame.pts is not None else times[0]
                number = int(np.argmin(np.abs(times - time)))
                while given < len(numbers) and numbers[given] <= number:
                    yield self._upright(frame)
                    given += 1
                if given == len(numbers):
                    return
        if given < len(numbers):
            raise MediaError(f"damaged: {len(numbers) - given} frames cannot be decoded again")

    def _upright(self, frame: Any) -> Picture:
        picture = np.rot90(frame.to_ndarray(format="rgb24"), self.probe.rotation)
        size = (self.width, self.height)
        resized = cv2.resize(np.ascontiguousarray(picture), size, interpolation=cv2.INTER_AREA)
        return np.asarray(resized, np.uint8)


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Decoded frames, stepping over packets that cannot be decoded."""
    try:
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except av.FFmpegError:
                continue
    except av.FFmpegError:
        return


def _open_decord(probe: Probe, width: int, height: int) -> Any:
    if probe.damaged or probe.rotation or width < DECORD_WIDTH:
        return None
    try:
        reader = decord.VideoReader(
            str(probe.path), ctx=decord.cpu(0), num_threads=1, width=width, height=height
        )
        return reader if len(reader) == len(probe.times) else None
    except (decord.DECORDError, RuntimeError, ValueError):
        return None  # AV1 for one; PyAV reads it
