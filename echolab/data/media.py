"""Encode and decode video, audio, images and face tracks.

Shapes: T frames, Y, X pixels, n audio samples.  Frames are RGB uint8, audio is mono float32 in
[-1, 1].  An unusable file raises a MediaError that names the file and the remedy.
"""

import ctypes
import io
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import decord
import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image, ImageOps

from echolab.atomic_io import write_atomic
from echolab.data.decoding import (
    BACK_SECONDS,
    Advance,
    decode_frames,
    decode_packet,
    ignore_progress,
    open_media,
    read_packets,
    rotate_upright,
    video_stream,
)
from echolab.data.samples import MAX_PIXELS, MemberError, read_arrays, read_flac
from echolab.errors import MediaError

FPS = 25
RATE_HZ = 16000
KEYFRAME_INTERVAL = 12  # frames; short, so that random access is fast
LONGEST_GAP_SECONDS = 3600.0
GAP_SECONDS = 0.02  # a larger jump of the time stamps is a gap in the audio
MAX_DIFFERENCE = 2.0  # mean absolute difference, of 255, between the frames of two decoders
RATES_HZ = (1000, 1_000_000)  # lowest and highest allowed sample rate of a file
BLOCK_SECONDS = 10  # seconds of audio per block
BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")  # valid first boxes of an mp4
MAX_VIDEO_BYTES = 2**31  # maximum size of the decoded frames of one sample
M_PERTURB, FILLING = -6, 1  # option of mallopt(3), and its value: any byte except 0 works
AUDIO_FRAME = 1024  # samples per frame passed to an encoder

Frames = NDArray[np.uint8]
Samples = NDArray[np.float32]
Boxes = NDArray[np.float32]

decord.logging.set_level(decord.logging.QUIET)


class AudioTrack(NamedTuple):
    """An audio track, with times on the clock of its container."""

    samples: Samples  # [n] mono
    start_seconds: float  # time of the first sample
    rate: int
    damaged: list[tuple[float, float]]  # undecodable spans in seconds, which are silent


class Tracks(NamedTuple):
    """Boxes (x0, y0, x1, y1) for every frame, in pixels."""

    face: Boxes  # [T, 4]
    lips: Boxes  # [T, 4]
    person: Boxes | None  # [T, 4]
    extra: dict[str, NDArray[Any]]  # further values per frame, such as visemes


def encode_mp4(frames: Frames, fps: int = FPS, crf: int = 12) -> bytes:
    """Return an H.264 mp4 of frames [T, Y, X, 3]; the same frames yield the same bytes."""
    return _mux(frames, None, fps, RATE_HZ, {"crf": str(crf), "preset": "medium"})


def decode_mp4(data: bytes) -> Frames:
    """Return frames [T, Y, X, 3] of a video in memory, decoded by decord if PyAV agrees, else PyAV.

    Compare the number of frames and the first, middle and last frame: decord returns wrong frames
    for edit lists and open groups of pictures, which `encode_mp4` does not write.
    """
    if data[4:8] not in BOXES:  # decord would follow a playlist
        raise MediaError(f"a video of {len(data)} bytes cannot be decoded: it is no mp4")
    # Decode by PyAV first, since damaged bytes crash decord.
    try:
        av_frames = _av_frames(data)
    except (av.FFmpegError, OSError, ValueError, MediaError) as error:
        raise MediaError(
            f"a video of {len(data)} bytes cannot be decoded: {_first_line(error)}"
        ) from error
    try:
        frames = _decord_frames(data)
    except (decord.DECORDError, RuntimeError):
        frames = np.zeros((0, 0, 0, 3), np.uint8)
    if _is_same_video(frames, av_frames):
        return frames
    return np.stack([rotate_upright(frame) for frame in av_frames])


def _av_frames(data: bytes) -> list[Any]:
    """Decode a video in memory by PyAV; raise MediaError if a frame is damaged."""
    frames: list[Any] = []
    with open_media(io.BytesIO(data)) as container:
        for time, frame in decode_frames(container, video_stream(container), ignore_progress):
            if frame is None or frame.is_corrupt:
                raise MediaError(f"a frame is damaged at {time:.2f} s")
            frames.append(frame)
            _check_size(len(frames), frame.height, frame.width)
    if not frames:
        raise MediaError("not one frame can be decoded")
    return frames


def _decord_frames(data: bytes) -> Frames:
    # Use one thread, since many workers decode in parallel.
    reader = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1)
    return np.stack([_without_padding(reader.next().asnumpy()) for _ in range(len(reader))])


def _check_size(count: int, height: int, width: int) -> None:
    """Raise MediaError for a video that is too large; a few bytes can decode to hours of video."""
    if 3 * count * height * width > MAX_VIDEO_BYTES:
        raise MediaError(
            f"a video of {count} or more frames of {height} x {width} is too large for a sample; "
            "cut it into shorter clips"
        )


def _is_same_video(frames: Frames, av_frames: list[Any]) -> bool:
    """Return whether the numbers of frames agree, and the first, middle and last are similar."""
    count = len(av_frames)
    if len(frames) != count:
        return False
    # Wrong edit lists and groups of pictures shift all frames, so three frames suffice.
    pairs = [(frames[n], rotate_upright(av_frames[n])) for n in (0, count // 2, count - 1)]
    return all(a.shape == b.shape and _mean_difference(a, b) <= MAX_DIFFERENCE for a, b in pairs)


def _mean_difference(a: Frames, b: Frames) -> float:
    return float(np.abs(a.astype(np.int16) - b).mean())


def _without_padding(frame: Frames) -> Frames:
    """Remove the row padding that decord's frames include at some widths below 74: [Y, X, 3].

    decord then returns (padded bytes of a row / width) as the number of channels.
    """
    height, width = frame.shape[:2]
    return frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


def write_video(
    path: Path, frames: Frames, samples: Samples | None, fps: int = FPS, rate: int = RATE_HZ
) -> None:
    """Write an mp4 that plays everywhere, with audio [n] as AAC, atomically."""
    data = _mux(frames, samples, fps, rate, {"crf": "18", "preset": "medium"})
    write_atomic(Path(path), data)


def _mux(
    frames: Frames, samples: Samples | None, fps: int, rate: int, options: dict[str, str]
) -> bytes:
    # Check shapes here, since the encoder reports only error numbers.
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise MediaError(f"frames are {frames.dtype} {frames.shape}; need uint8 [T, Y, X, 3]")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise MediaError(f"a video of {width}x{height} pixels: H.264 needs even sides; crop by one")
    buffer = io.BytesIO()
    with _filled_memory(), av.open(buffer, "w", format="mp4") as container:
        # One thread: bytes do not depend on the machine.  No B frames: frame 0 is at time 0.
        video = container.add_stream(
            "libx264", rate=fps, options={**options, "threads": "1", "bf": "0"}
        )
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.gop_size = KEYFRAME_INTERVAL
        audio = None
        if samples is not None:
            audio = container.add_stream("aac", rate=rate, layout="mono")
        # Encode all video, then all audio; None flushes an encoder.
        for frame in frames:
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(video.encode(image))
        container.mux(video.encode(None))
        if audio is not None and samples is not None:
            for piece in _audio_frames(_check_samples(samples), rate):
                container.mux(audio.encode(piece))
            container.mux(audio.encode(None))
    return buffer.getvalue()


@contextmanager
def _filled_memory() -> Iterator[None]:
    """Make glibc fill all memory that it allocates inside the block.

    Without B frames, x264's macroblock tree reads uninitialized memory: up to 8 of 800 encodings
    of the same frames had different bytes.
    """
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_PERTURB, FILLING)
    try:
        yield
    finally:
        mallopt(M_PERTURB, 0)


def _audio_frames(samples: Samples, rate: int) -> Iterator[av.AudioFrame]:
    for start in range(0, len(samples), AUDIO_FRAME):
        piece = np.ascontiguousarray(samples[None, start : start + AUDIO_FRAME])
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        yield frame


def _check_samples(samples: Samples) -> Samples:
    samples = np.asarray(samples, np.float32)
    if samples.ndim != 1 or not len(samples) or not np.isfinite(samples).all():
        raise MediaError(f"audio of shape {samples.shape}: need finite samples [n], n > 0")
    return np.clip(samples, -1, 1)


def encode_flac(samples: Samples, rate: int = RATE_HZ) -> bytes:
    """Return lossless 16-bit FLAC of audio [n]; values beyond [-1, 1] are clipped."""
    # 1.0 exceeds the 16-bit range: clip it to the largest value.
    integers = np.clip(np.rint(_check_samples(samples) * 32768), -32768, 32767).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, integers, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def decode_flac(data: bytes) -> Samples:
    """Return samples [n] of mono FLAC in memory; raise MediaError."""
    try:
        samples = read_flac(data)
    except MemberError as error:
        raise MediaError(f"audio of {len(data)} bytes cannot be decoded: {error}") from error
    if samples.ndim != 1:
        raise MediaError(
            f"audio of {samples.shape[1]} channels; shards hold mono: make the sample again"
        )
    return np.asarray(samples, np.float32)


def read_audio(path: Path, rate: int = RATE_HZ, since: float | None = None) -> Samples:
    """Return the first audio track of any file, mono [n] at `rate`.

    The result begins at the first sample of the track, or at `since` seconds on the file's clock,
    with silence up to the first sample.
    """
    # A damaged packet at the end of the track causes no gap.
    track = read_audio_track(path, rate)
    end = track.start_seconds + len(track.samples) / rate
    holes = [first for first, last in track.damaged if first < last and first < end - GAP_SECONDS]
    if holes:
        raise MediaError(f"{path}: the audio is damaged at {holes[0]:.2f} s; repair it")
    # Cut the audio before `since`, or prepend silence if the audio begins later.
    begin = 0 if since is None else round((since - track.start_seconds) * rate)
    return np.concatenate([np.zeros(max(-begin, 0), np.float32), track.samples[max(begin, 0) :]])


def read_audio_track(
    path: Path, rate: int = RATE_HZ, advance: Advance = ignore_progress
) -> AudioTrack:
    """Return the first audio track and the time of its first sample; fill gaps with silence.

    Undecodable packets are listed.  Raise MediaError if there is no usable audio, OSError if the
    file cannot be read, and MemoryError.
    """
    # Decode blocks of audio, each with its time.
    damaged: list[tuple[float, float]] = []
    try:
        with open_media(path) as container:
            if not container.streams.audio:
                raise MediaError(f"{path}: has no audio track; give a file with audio")
            blocks = deque(_decode_blocks(container, rate, damaged, advance))
    except FileNotFoundError as error:
        raise MediaError(f"{path}: not there; check the name") from error
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, OSError | MemoryError):
            raise
        raise MediaError(
            f"{path}: the audio is damaged ({_first_line(error)}); repair it"
        ) from error
    if not blocks:
        what = "none of its packets can be decoded" if damaged else "it has no packet"
        raise MediaError(f"{path}: the audio track is empty ({what}); give a file with audio")
    # Damaged time stamps must not allocate hours of silence.
    start = blocks[0][0]
    ends = [round((time - start) * rate) + offset + len(block) for time, offset, block in blocks]
    decoded = sum(len(block) for _, _, block in blocks)
    if max(ends) > decoded + LONGEST_GAP_SECONDS * rate:
        raise MediaError(f"{path}: the time stamps of the audio jump by hours; repair it")
    # Free each block after it is copied, so that the audio is in memory only once.
    samples = np.zeros(max(ends), np.float32)
    while blocks:
        time, offset, block = blocks.popleft()
        first = max(0, round((time - start) * rate) + offset)
        samples[first : first + len(block)] = block[: len(samples) - first]
    return AudioTrack(samples, start, rate, damaged)


def _decode_blocks(
    container: Any, rate: int, damaged: list[tuple[float, float]], advance: Advance
) -> Iterator[tuple[float, int, Samples]]:
    """Yield blocks of audio: (start time of its continuous stretch, offset in it, samples)."""
    # Concatenate pieces of a stretch, since a resampler returns a few samples per frame.
    start, offset, pieces = 0.0, 0, list[Samples]()
    for stretch_start, piece in _resample_stretches(container, rate, damaged, advance):
        # A block ends at the end of its stretch, or when it is long enough.
        if pieces and (stretch_start != start or sum(map(len, pieces)) > BLOCK_SECONDS * rate):
            block = np.concatenate(pieces)
            yield start, offset, block
            offset, pieces = offset + len(block), []
        if stretch_start != start:
            start, offset = stretch_start, 0
        if len(piece):
            pieces.append(piece)
    if pieces:
        yield start, offset, np.concatenate(pieces)


def _resample_stretches(
    container: Any, rate: int, damaged: list[tuple[float, float]], advance: Advance
) -> Iterator[tuple[float, Samples]]:
    """Yield (start time of the continuous stretch, next samples of it) for each frame."""
    stream = container.streams.audio[0]
    resampler: Any = None
    start = end = 0.0
    layout: tuple[Any, ...] = ()  # sample format, channels and rate of the last frame
    for packet in read_packets(container, stream, advance):
        for frame in decode_packet(packet) if packet is not None else [None]:
            if frame is None or not _is_finite(frame):
                damaged.append(_packet_span(packet, end))
                continue
            if not RATES_HZ[0] <= frame.sample_rate <= RATES_HZ[1]:
                raise ValueError(f"{frame.sample_rate} samples a second")
            time = end if frame.time is None else float(frame.time)
            if resampler is not None and time < end - BACK_SECONDS:
                raise MediaError(
                    f"{container.name}: the time stamps of the audio go back from {end:.2f} s to "
                    f"{time:.2f} s; give each recording as a file of its own"
                )
            # A gap or a change of format begins a new stretch with a new resampler.
            before, layout = layout, (frame.format.name, frame.layout.name, frame.sample_rate)
            if resampler is None or layout != before or abs(time - end) > GAP_SECONDS:
                if resampler is not None:
                    yield start, _join_frames(resampler.resample(None))
                resampler, start, end = av.AudioResampler("s32", "mono", rate), time, time
            frame.pts = None  # the stretch is continuous, so counting samples is exact
            end += frame.samples / frame.sample_rate
            yield start, _join_frames(resampler.resample(frame))
    if resampler is not None:
        yield start, _join_frames(resampler.resample(None))


def _is_finite(frame: Any) -> bool:
    """Return whether all samples of an audio frame are finite."""
    is_float = frame.format.name.startswith(("flt", "dbl"))
    return not is_float or bool(np.isfinite(frame.to_ndarray()).all())


def _packet_span(packet: Any, end: float) -> tuple[float, float]:
    """Return the time span of an undecodable packet; without a time stamp it starts at `end`."""
    if packet is None or packet.pts is None:
        return end, end
    first = float(packet.pts * packet.time_base)
    return first, first + float((packet.duration or 0) * packet.time_base)


def _join_frames(frames: list[Any]) -> Samples:
    # Use integers: only for integers does the downmix of channels not raise the level.
    arrays = [np.zeros(0, np.int32), *(frame.to_ndarray()[0] for frame in frames)]
    return (np.concatenate(arrays) / 2**31).astype(np.float32)


def read_image(path: Path) -> Frames:
    """Return an image [Y, X, 3], upright by its EXIF tag; transparent pixels lie over white."""
    try:
        with Image.open(path) as stored:
            # Check the size before decoding: a few bytes can state any size.
            if stored.width * stored.height > MAX_PIXELS:
                raise ValueError(f"{stored.width} x {stored.height} pixels")
            image = ImageOps.exif_transpose(stored)
            if image.mode in ("RGBA", "LA", "PA", "P"):
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return np.array(image.convert("RGB"))
    except FileNotFoundError as error:
        raise MediaError(f"{path}: not there; check the name") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(
            f"{path}: not a readable image ({_first_line(error)}); give another file"
        ) from error


def encode_tracks(
    face: Boxes,
    lips: Boxes,
    person: Boxes | None = None,
    extra: dict[str, NDArray[Any]] | None = None,
) -> bytes:
    """Return an npz of the boxes [T, 4] of one clip, and of further arrays with a row per frame."""
    # Boxes must be finite: a wrong box would weight the wrong pixels in training.
    arrays = {"face": np.asarray(face, np.float32), "lips": np.asarray(lips, np.float32)}
    if person is not None:
        arrays["person"] = np.asarray(person, np.float32)
    frames = len(face)
    for name, boxes in arrays.items():
        if boxes.shape != (frames, 4) or not np.isfinite(boxes).all():
            raise MediaError(f"tracks: {name} is {boxes.shape}, need finite [{frames}, 4]")
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays, **(extra or {}))
    return buffer.getvalue()


def decode_tracks(data: bytes) -> Tracks:
    """Return the tracks in an npz of `encode_tracks`; nothing is unpickled."""
    try:
        arrays = read_arrays(data)
        face, lips = arrays.pop("face"), arrays.pop("lips")
    except (MemberError, KeyError) as error:
        raise MediaError(
            f"tracks of {len(data)} bytes cannot be read: {_first_line(error)}"
        ) from error
    return Tracks(face, lips, arrays.pop("person", None), arrays)


def _first_line(error: BaseException) -> str:
    """Return the first line of a library's error; those of decord contain a stack trace."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
