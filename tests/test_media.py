"""Media: encoding and decoding are inverse; damaged files never pass as complete."""

import io
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from echolab.data.media import (
    decode_flac,
    decode_mp4,
    decode_tracks,
    encode_flac,
    encode_mp4,
    encode_tracks,
    read_audio,
    read_audio_track,
    read_image,
    write_video,
)
from echolab.errors import DiskFullError, MediaError


def ramp(frames: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    """Return smooth moving frames, which a codec keeps well."""
    y, x = np.mgrid[:height, :width]
    time = np.arange(frames)[:, None, None]
    gray = 127 + 80 * np.sin(x / 9 + time / 5) * np.cos(y / 11)
    return np.repeat(gray[..., None], 3, -1).astype(np.uint8)


def chirp(samples: int = 16000) -> np.ndarray:
    time = np.arange(samples) / 16000
    return (0.5 * np.sin(2 * np.pi * (200 + 600 * time) * time)).astype(np.float32)


def write_wav(path: Path, samples: np.ndarray, rate: int) -> None:
    """Write `samples` [n, channels] as 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setparams((samples.shape[1], 2, rate, 0, "NONE", ""))
        file.writeframes((samples * 32767).astype("<i2").tobytes())


def test_a_video_is_decoded_as_it_was_encoded() -> None:
    frames = ramp()
    back = decode_mp4(encode_mp4(frames))
    assert back.shape == frames.shape and back.dtype == np.uint8
    error = ((back.astype(float) - frames) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > 36


def test_the_same_frames_give_the_same_bytes() -> None:
    """The clip is encoded often: what an encoder reads from fresh memory differs from call to
    call.
    """
    assert len({encode_mp4(ramp()) for _ in range(300)}) == 1


def test_every_frame_is_decoded_at_its_index() -> None:
    frames = np.zeros((30, 16, 16, 3), np.uint8) + np.arange(30, dtype=np.uint8)[
        :, None, None, None
    ] * np.uint8(8)
    back = decode_mp4(encode_mp4(frames)).astype(float).mean((1, 2, 3))
    assert np.abs(back - frames.mean((1, 2, 3))).max() < 3


@pytest.mark.parametrize("shape", [(3, 15, 16, 3), (3, 16, 15, 3), (0, 16, 16, 3), (3, 16, 16)])
def test_frames_that_cannot_be_a_video_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MediaError):
        encode_mp4(np.zeros(shape, np.uint8))


def test_audio_is_decoded_to_half_a_quantization_step() -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, 5000).astype(np.float32)
    samples[:2] = 1, -1
    back = decode_flac(encode_flac(samples))
    assert np.abs(back - samples).max() <= 1 / 32768
    assert np.array_equal(decode_flac(encode_flac(back)), back)


@pytest.mark.parametrize("samples", [np.zeros(0), np.array([np.nan]), np.zeros((2, 5))])
def test_invalid_audio_is_refused(samples: np.ndarray) -> None:
    with pytest.raises(MediaError):
        encode_flac(samples.astype(np.float32))


def test_a_written_video_keeps_its_audio_in_sync(tmp_path: Path) -> None:
    samples = chirp(25 * 640)
    write_video(tmp_path / "a.mp4", ramp(25), samples)
    audio = read_audio_track(tmp_path / "a.mp4")
    decoded = audio.samples[: len(samples)]
    lag = np.correlate(decoded[4000:8000], samples[3900:8100], "valid").argmax() - 100
    assert abs(audio.start_seconds + lag / 16000) < 0.002
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 25


def test_any_audio_becomes_16_khz_mono(tmp_path: Path) -> None:
    time = np.arange(44100) / 44100
    tone = 0.5 * np.sin(2 * np.pi * 1000 * time)
    write_wav(tmp_path / "a.wav", np.stack([tone, tone], 1), 44100)
    samples = read_audio(tmp_path / "a.wav")
    assert abs(len(samples) - 16000) <= 2
    spectrum = np.abs(np.fft.rfft(samples[:16000]))
    assert spectrum.argmax() == 1000
    assert abs(np.abs(samples[1000:-1000]).max() - 0.5) < 0.02


def test_a_gap_in_the_audio_becomes_silence(tmp_path: Path) -> None:
    """Later audio stays at its time stamps, with any gap before it."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for start in (0, 16000):  # half a second each, from 0 s and from 1 s
            block = np.full((1, 8000), 8000, np.int16)
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    samples = read_audio(tmp_path / "a.mkv")
    assert abs(len(samples) - 24000) < 20
    assert np.abs(samples[8100:15900]).max() == 0
    assert samples[16100:23900].min() > 0.2 and samples[100:7900].min() > 0.2


def test_files_without_audio_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("not a sound")
    write_video(tmp_path / "mute.mp4", ramp(), None)
    for name, problem in (("text.wav", "damaged"), ("mute.mp4", "no audio"), ("no", "not there")):
        with pytest.raises(MediaError, match=problem) as caught:
            read_audio(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_bytes_are_reported() -> None:
    video, audio = encode_mp4(ramp()), encode_flac(chirp(800))
    tracks = encode_tracks(np.zeros((3, 4)), np.zeros((3, 4)))
    for decode, data in ((decode_mp4, video), (decode_flac, audio), (decode_tracks, tracks)):
        for damaged in (b"", data[:40]):
            with pytest.raises(MediaError) as caught:
                decode(damaged)
            assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    (tmp_path / "a.mp4.partial").symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match=r"a\.mp4.*No space left") as caught:
        write_video(path, ramp(), None)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"] and path.read_bytes() == b"old"


def test_an_image_is_rotated_upright(tmp_path: Path) -> None:
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:5] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # turn a quarter to the right to see it
    image.save(tmp_path / "a.png", exif=exif)
    seen = read_image(tmp_path / "a.png")
    assert seen.shape == (30, 20, 3) and np.array_equal(seen, np.rot90(pixels, -1))


def test_transparency_is_blended_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == 255).all()


def test_files_that_are_not_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    for name in ("a.png", "missing.png"):
        with pytest.raises(MediaError, match=name):
            read_image(tmp_path / name)


def test_tracks_are_decoded_as_they_were_encoded() -> None:
    face = np.random.default_rng(0).uniform(0, 99, (7, 4)).astype(np.float32)
    tracks = decode_tracks(encode_tracks(face, face + 1, None, {"opening": np.arange(7)}))
    assert np.array_equal(tracks.face, face) and np.array_equal(tracks.lips, face + 1)
    assert tracks.person is None and np.array_equal(tracks.extra["opening"], np.arange(7))
    assert decode_tracks(encode_tracks(face, face, face)).person is not None


def test_tracks_of_other_shapes_are_refused() -> None:
    with pytest.raises(MediaError, match="lips"):
        encode_tracks(np.zeros((7, 4)), np.zeros((6, 4)))
    with pytest.raises(MediaError, match="face"):
        encode_tracks(np.full((7, 4), np.nan), np.zeros((7, 4)))


def test_nothing_is_unpickled() -> None:
    buffer = io.BytesIO()
    np.savez(buffer, face=np.array([object()]), lips=np.zeros((1, 4)))
    with pytest.raises(MediaError):
        decode_tracks(buffer.getvalue())
