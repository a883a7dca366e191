"""Decode the frames of a media file in order with PyAV, each with its time.

Frames are numbered by reading from the first packet on, without a seek: depending on the container
a seek lands before, on or after the requested frame (MPEG program and transport streams, open
groups of pictures), while a sequence that is read twice is the same twice.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from numpy.typing import NDArray

from echolab.data.samples import MAX_PIXELS
from echolab.errors import MediaError

THREADS = 4  # of one decoder
DEFAULT_STEP = 0.04  # seconds between frames of a file that states no rate
MEMORY_PROBE_BYTES = 2**28
BACK_SECONDS = 0.5  # a time stamp that goes back by more begins another recording

# Containers and plain streams.  FFmpeg reads playlists too (hls, concat, dash, sdp): a stranger's
# `clip.mp4` could name any file or address.
FORMATS = ",".join((
    "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "mpegvideo", "m4v", "h264",
    "hevc", "vvc", "av1", "obu", "ivf", "flv", "live_flv", "asf", "ogg", "rm", "mxf", "gxf", "dv",
    "nut", "wtv", "swf", "nsv", "pva", "ty", "yuv4mpegpipe", "mjpeg", "mpjpeg", "gif", "apng",
    "vc1", "dirac", "cavsvideo", "wav", "w64", "aiff", "au", "caf", "flac", "mp3", "aac", "ac3",
    "eac3", "dts", "dtshd", "amr", "amrnb", "amrwb", "ape", "tta", "wv", "mpc", "mpc8", "oma",
    "voc", "truehd", "mlp", "loas", "latm", "qcp", "gsm", "dsf", "tak", "xwma",
    "png_pipe", "jpeg_pipe", "bmp_pipe", "webp_pipe", "tiff_pipe",
))  # fmt: skip

Advance = Callable[[float], None]  # fraction of the file that is read


@contextmanager
def open_media(source: Path | BinaryIO) -> Iterator[Any]:
    """Open a file as a PyAV container; tags in any text encoding are no damage.

    Raises ValueError for what is no container, such as a playlist, and for absurd sizes.
    """
    with ExitStack() as stack:
        # No name is taken for an address, and no playlist is followed.
        file: Any = source
        if isinstance(source, Path):
            file = os.path.abspath(source)
            if not file.isprintable():  # FFmpeg takes UTF-8 alone
                file = stack.enter_context(source.open("rb"))
        container = stack.enter_context(_open(file))
        # A few bytes can state a size that would fill memory: refuse before a frame is decoded.
        for stream in container.streams.video:
            coded = stream.codec_context  # none if no decoder is known
            if coded is not None and coded.width * coded.height > MAX_PIXELS:
                raise ValueError(f"frames of {coded.width} x {coded.height} pixels")
        yield container


def _open(file: Any) -> Any:
    try:
        return av.open(file, metadata_errors="replace", options={"format_whitelist": FORMATS})
    except av.ArgumentError:
        raise ValueError("a container format that is not supported") from None
    except MemoryError:
        if _is_memory_short():
            raise
        raise ValueError("it states sizes beyond any memory") from None


def _is_memory_short() -> bool:
    """Return if memory is short, and not asked for by a damaged size beyond any machine."""
    try:
        bytearray(MEMORY_PROBE_BYTES)
    except MemoryError:
        return True
    return False


def video_stream(container: Any) -> Any:
    """Return the first video stream that is no cover; raise MediaError if there is none."""
    streams = [s for s in container.streams.video if not _is_cover(s)]
    if not streams:
        raise MediaError("no video: the file holds no video track")
    # Frame and slice threads, but few: each keeps some frames in memory.
    if streams[0].codec_context is None:
        raise MediaError("no video: no decoder is known for the video track")
    streams[0].thread_type = "AUTO"
    streams[0].codec_context.thread_count = THREADS
    return streams[0]


def decode_frames(container: Any, stream: Any, advance: Advance) -> Iterator[tuple[float, Any]]:
    """Yield (seconds, frame) with ascending times; the frame is None for a packet that is damaged.

    A frame without a time stamp follows the one before it by its duration, and one with the stamp
    of another is left out.  Raises MediaError if the time stamps begin again, MemoryError and, if
    the file itself cannot be read, OSError.
    """
    step = _step(stream)
    last: float | None = None
    # Yield only times that ascend: a reader looks frames up by their time.
    for time, frame in _stamped(container, stream, advance):
        if frame is None:
            yield (0.0 if last is None else last), None
            continue
        if time is None:
            time = 0.0 if last is None else last + _duration(frame, step)
        if last is not None and time < last - BACK_SECONDS:
            raise MediaError(
                f"time stamps: they go back from {last:.2f} s to {time:.2f} s, as in recordings "
                "that were joined; give each as a file of its own"
            )
        if last is None or time > last:
            last = time
            yield time, frame


def _stamped(container: Any, stream: Any, advance: Advance) -> Iterator[tuple[float | None, Any]]:
    """Yield (seconds or None, frame or None) with the container's time stamps.

    AVI stores the order of its packets alone, one each tick, and PyAV's times of reordered frames
    are a guess: the n-th decoded frame gets the time of the n-th packet.
    """
    is_avi = container.format.name == "avi"
    ticks: deque[float] = deque()
    for packet in read_packets(container, stream, advance):
        if is_avi and packet is not None and packet.size and packet.dts is not None:
            ticks.append(float(packet.dts * packet.time_base))
        for frame in decode_packet(packet) if packet is not None else [None]:
            # A damaged packet yields no frame, so its tick is the last one added.
            if not is_avi:
                yield _time(frame), frame
            elif frame is None:
                yield (ticks.pop() if ticks else None), None
            else:
                yield (ticks.popleft() if ticks else None), frame


def read_packets(container: Any, stream: Any, advance: Advance) -> Iterator[Any]:
    """Yield the packets of a stream; None, at the end, for one that cannot be read.

    Raises OSError if the file itself cannot be read, and MemoryError.
    """
    size = container.size
    try:
        # The position in the file is the only progress that every container has.
        for packet in container.demux(stream):
            if size and packet.pos:
                advance(min(1.0, packet.pos / size))
            yield packet
    except MemoryError:
        if _is_memory_short():
            raise
        yield None
    except OSError:
        raise
    except (av.FFmpegError, ValueError, IndexError):
        yield None


def ignore_progress(fraction: float) -> None:
    """Ignore progress."""


def decode_packet(packet: Any) -> list[Any]:
    """Return the frames that a packet completes; [None] if it cannot be decoded."""
    try:
        return list(packet.decode())
    except MemoryError:
        if _is_memory_short():
            raise
        return [None]
    except (av.FFmpegError, ValueError, IndexError):
        return [None]


def rotate_upright(frame: Any) -> NDArray[np.uint8]:
    """Return a frame as [Y, X, 3], rotated as the file asks."""
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
    return np.ascontiguousarray(pixels)


def _time(frame: Any) -> float | None:
    if frame is None or frame.pts is None or frame.time_base is None:
        return None
    return float(frame.pts * frame.time_base)


def _duration(frame: Any, step: float) -> float:
    # A wrong duration would shift all frames after it.
    duration = float(frame.duration * frame.time_base) if frame.duration else 0.0
    return duration if 0.001 < duration < 10 else step


def _step(stream: Any) -> float:
    """Return the seconds between two frames as the file states them."""
    for rate in (stream.average_rate, stream.guessed_rate):
        if rate and 1 <= rate <= 1000:
            return float(1 / rate)
    return DEFAULT_STEP


def _is_cover(stream: Any) -> bool:
    """Return if a video track is the cover of a music file: a single image."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)
