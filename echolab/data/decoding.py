"""Decode the frames of a media file in order with PyAV, each with its time.

Files are read sequentially from the first packet, without seeking: in some containers a seek lands
before or after the requested frame (MPEG program and transport streams, open groups of pictures),
while sequential reading always returns the same frames.
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

THREADS = 4  # threads per decoder
DEFAULT_STEP = 0.04  # seconds between frames if the file states no frame rate
MEMORY_PROBE_BYTES = 2**28
BACK_SECONDS = 0.5  # time stamps that decrease by more indicate another recording

# Allow containers and raw streams only.  FFmpeg also reads playlists (hls, concat, dash, sdp), so
# an untrusted `clip.mp4` could make it open any file or address.
FORMATS = ",".join((
    "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "mpegvideo", "m4v", "h264",
    "hevc", "vvc", "av1", "obu", "ivf", "flv", "live_flv", "asf", "ogg", "rm", "mxf", "gxf", "dv",
    "nut", "wtv", "swf", "nsv", "pva", "ty", "yuv4mpegpipe", "mjpeg", "mpjpeg", "gif", "apng",
    "vc1", "dirac", "cavsvideo", "wav", "w64", "aiff", "au", "caf", "flac", "mp3", "aac", "ac3",
    "eac3", "dts", "dtshd", "amr", "amrnb", "amrwb", "ape", "tta", "wv", "mpc", "mpc8", "oma",
    "voc", "truehd", "mlp", "loas", "latm", "qcp", "gsm", "dsf", "tak", "xwma",
    "png_pipe", "jpeg_pipe", "bmp_pipe", "webp_pipe", "tiff_pipe",
))  # fmt: skip

Advance = Callable[[float], None]  # called with the fraction of the file that has been read


@contextmanager
def open_media(source: Path | BinaryIO) -> Iterator[Any]:
    """Open a file as a PyAV container; accept tags in any text encoding.

    Raise ValueError for a file that is not a container, such as a playlist, and for absurd sizes.
    """
    with ExitStack() as stack:
        # Use an absolute path, so that FFmpeg does not interpret a name as an address.
        file: Any = source
        if isinstance(source, Path):
            file = os.path.abspath(source)
            if not file.isprintable():  # FFmpeg accepts only UTF-8 names
                file = stack.enter_context(source.open("rb"))
        container = stack.enter_context(_open(file))
        # A damaged header may state a size that would fill memory: refuse it before decoding.
        for stream in container.streams.video:
            coded = stream.codec_context  # None if no decoder is known
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
    """Return whether memory is really short, as opposed to an absurd size in a damaged file."""
    try:
        bytearray(MEMORY_PROBE_BYTES)
    except MemoryError:
        return True
    return False


def video_stream(container: Any) -> Any:
    """Return the first video stream that is not cover art; raise MediaError if there is none."""
    streams = [s for s in container.streams.video if not _is_cover(s)]
    if not streams:
        raise MediaError("no video: the file holds no video track")
    # Use frame and slice threads, but few, since each thread holds some frames in memory.
    if streams[0].codec_context is None:
        raise MediaError("no video: no decoder is known for the video track")
    streams[0].thread_type = "AUTO"
    streams[0].codec_context.thread_count = THREADS
    return streams[0]


def decode_frames(container: Any, stream: Any, advance: Advance) -> Iterator[tuple[float, Any]]:
    """Yield (seconds, frame) with ascending times; the frame is None for a damaged packet.

    The time of a frame without a time stamp is that of the previous frame plus its duration; frames
    with a repeated time stamp are skipped.  Raise MediaError if the time stamps restart, OSError if
    the file itself cannot be read, and MemoryError.
    """
    step = _frame_seconds(stream)
    last: float | None = None
    # Yield only ascending times, since readers select frames by time.
    for time, frame in _stamp_frames(container, stream, advance):
        if frame is None:
            yield (0.0 if last is None else last), None
            continue
        if time is None:
            time = 0.0 if last is None else last + _frame_duration(frame, step)
        if last is not None and time < last - BACK_SECONDS:
            raise MediaError(
                f"time stamps: they go back from {last:.2f} s to {time:.2f} s, as in recordings "
                "that were joined; give each as a file of its own"
            )
        if last is None or time > last:
            last = time
            yield time, frame


def _stamp_frames(
    container: Any, stream: Any, advance: Advance
) -> Iterator[tuple[float | None, Any]]:
    """Yield (seconds or None, frame or None) with the container's time stamps.

    AVI stores only the order of its packets, one per tick, and PyAV guesses the times of reordered
    frames; so the n-th decoded frame gets the time of the n-th packet.
    """
    is_avi = container.format.name == "avi"
    ticks: deque[float] = deque()
    for packet in read_packets(container, stream, advance):
        if is_avi and packet is not None and packet.size and packet.dts is not None:
            ticks.append(float(packet.dts * packet.time_base))
        for frame in decode_packet(packet) if packet is not None else [None]:
            # A damaged packet yields no frame: remove its tick, the last one added.
            if not is_avi:
                yield _frame_time(frame), frame
            elif frame is None:
                yield (ticks.pop() if ticks else None), None
            else:
                yield (ticks.popleft() if ticks else None), frame


def read_packets(container: Any, stream: Any, advance: Advance) -> Iterator[Any]:
    """Yield the packets of a stream; end with None at a packet that cannot be read.

    Raise OSError if the file itself cannot be read, and MemoryError.
    """
    size = container.size
    try:
        # Only the position in the file measures progress in every container.
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
    """Return a frame as RGB [Y, X, 3], rotated by the angle in the file's metadata."""
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
    return np.ascontiguousarray(pixels)


def _frame_time(frame: Any) -> float | None:
    if frame is None or frame.pts is None or frame.time_base is None:
        return None
    return float(frame.pts * frame.time_base)


def _frame_duration(frame: Any, step: float) -> float:
    # Ignore implausible durations, which would shift all later frames.
    duration = float(frame.duration * frame.time_base) if frame.duration else 0.0
    return duration if 0.001 < duration < 10 else step


def _frame_seconds(stream: Any) -> float:
    """Return the seconds between two frames according to the file's frame rate."""
    for rate in (stream.average_rate, stream.guessed_rate):
        if rate and 1 <= rate <= 1000:
            return float(1 / rate)
    return DEFAULT_STEP


def _is_cover(stream: Any) -> bool:
    """Return whether a video track is the cover art of a music file, a single image."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)
