"""Videos whose frames carry their index, burnt in as a row of blocks.

From frame `flash` on the lower half is white and a tone sounds, so that the alignment of frames and
audio can be measured in any container, at any first time stamp.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 176, 144  # a size that every codec takes
BITS = 8
BLOCK = WIDTH // BITS


def image_of(number: int, flash: int) -> NDArray[np.uint8]:
    """Draw [HEIGHT, WIDTH, 3]: the bits of `number` above, white below from frame `flash` on."""
    image = np.full((HEIGHT, WIDTH, 3), 16, np.uint8)
    for bit in range(BITS):
        if number >> bit & 1:
            image[: HEIGHT // 2, bit * BLOCK : (bit + 1) * BLOCK] = 235
    if number >= flash:
        image[HEIGHT // 2 :] = 235
    return image


def number_of(image: NDArray[np.uint8]) -> int:
    """Return the number drawn on an image."""
    row = image[HEIGHT // 4 - 12 : HEIGHT // 4 + 12].mean((0, 2))
    middles = [row[bit * BLOCK + 6 : (bit + 1) * BLOCK - 6].mean() for bit in range(BITS)]
    return sum(1 << bit for bit, value in enumerate(middles) if value > 127)


def flashes(image: NDArray[np.uint8]) -> bool:
    """Return whether the lower half is white."""
    return bool(image[3 * HEIGHT // 4].mean() > 127)


def write_coded(
    path: Path,
    codec: str,
    times: Sequence[float],
    *,
    audio: str | None = "aac",
    flash: int = 20,
    audio_from: float = 0.0,
    audio_until: float | None = None,
    gop: int = 12,
    b_frames: int = 0,
    fps: Fraction = Fraction(25),
    options: dict[str, str] | None = None,
    mux: dict[str, str] | None = None,
    layout: str = "mono",
    rate: int = 48000,
    format: str | None = None,
    combed: bool = False,
) -> None:
    """Write a video with frames at `times` in seconds and a tone from the time of `flash` on.

    With `combed` every frame holds two moments, in alternate rows. Unless all times are multiples
    of 1 / `fps`, the encoder counts in 1/90000 s.
    """
    with av.open(str(path), "w", format=format, options=mux or {}) as container:
        video = container.add_stream(codec, rate=fps, options=options or {})
        video.width, video.height = WIDTH, HEIGHT
        video.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        video.gop_size, video.codec_context.max_b_frames = gop, b_frames
        video.bit_rate = 2_000_000
        even = all(abs(time * fps - round(time * fps)) < 1e-6 for time in times)
        base = 1 / fps if even else Fraction(1, 90000)
        video.codec_context.time_base = base
        sound = container.add_stream(audio, rate=rate, layout=layout) if audio else None
        packets: list[Any] = []
        for number, time in enumerate(times):
            image = image_of(number, flash)
            if combed:  # the second field is of a moment in which the lower half is half as bright
                image[HEIGHT // 2 + 1 :: 2] //= 2
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(time / base), base
            packets += video.encode(frame)
        packets += video.encode(None)
        if sound is not None:
            until = times[-1] + 0.2 if audio_until is None else audio_until
            packets += _tone(sound, times[flash], audio_from, until)
        for packet in sorted(packets, key=lambda p: float(p.dts * p.time_base)):
            container.mux(packet)


def _tone(stream: Any, onset: float, start: float, until: float) -> list[Any]:
    """Yield packets of silence from `start` on and of a 1 kHz tone from `onset` on, in seconds."""
    rate, packets = stream.rate, []
    at = start + np.arange(round((until - start) * rate)) / rate
    tone = (np.sin(2 * np.pi * 1000 * at) * (at >= onset) * 16000).astype(np.int16)
    stream.codec_context.open()
    size = stream.codec_context.frame_size or 1024
    resampler = av.AudioResampler(stream.format.name, stream.layout, rate)
    for first in range(0, len(tone), size):
        samples = np.repeat(tone[None, first : first + size], stream.channels, 1)
        piece = av.AudioFrame.from_ndarray(samples, "s16", stream.layout.name)
        piece.sample_rate, piece.time_base = rate, Fraction(1, rate)
        for frame in resampler.resample(piece):
            frame.pts, frame.time_base = round(start * rate) + first, Fraction(1, rate)
            packets += stream.encode(frame)
    return packets + stream.encode(None)
