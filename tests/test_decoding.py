"""Frames and audio are in sync in every container, and decord agrees with PyAV."""

import math
import os
import struct
import wave
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import coded
import numpy as np
import pytest
from coded import flashes, number_of, write_coded

from data_prep.filter import Refusal
from data_prep.options import RunOptions
from data_prep.source import Models, Source, read_source
from echolab.data.decoding import decode_frames, ignore_progress, open_media, video_stream
from echolab.data.media import decode_mp4, encode_mp4, read_audio, read_audio_track
from echolab.errors import MediaError
from echolab.inference.generate import read_speech
from echolab.inference.generate_arguments import GenerateArguments
from echolab.inference.inputs import to_frames, video_footage
from echolab.vision.normalize import audio_of, has_audio, make_grid
from echolab.vision.video_reader import VideoReader, probe

EVEN = [k / 25 for k in range(40)]
NTSC = [k * 1001 / 30000 for k in range(45)]
UNEVEN = list(np.cumsum([0.033, 0.067, 0.033, 0.033] * 10))
OPEN = {"bf": "3", "x264-params": "open-gop=1"}
QUIET = {"x265-params": "log-level=none:pools=1:open-gop=1"}


class Case(NamedTuple):
    """How one file is written."""

    name: str  # of the file
    codec: str
    times: list[float] = EVEN
    more: dict[str, Any] = {}


CASES = [
    Case("h264.mp4", "libx264"),
    Case("b_frames.mp4", "libx264", EVEN, {"b_frames": 3}),
    Case("no_edit_list.mp4", "libx264", EVEN, {"b_frames": 3, "mux": {"use_editlist": "0"}}),
    Case("fragments.mp4", "libx264", EVEN,
         {"b_frames": 2, "mux": {"movflags": "frag_keyframe+empty_moov+default_base_moof"}}),
    Case("one_group.mp4", "libx264", EVEN, {"b_frames": 3, "gop": 300}),
    Case("before_zero.mp4", "libx264", [t - 0.2 for t in EVEN], {"audio_from": -0.2}),
    Case("late_audio.mp4", "libx264", EVEN, {"b_frames": 2, "audio_from": 0.4}),
    Case("late_picture.mp4", "libx264", [t + 0.6 for t in EVEN], {"b_frames": 2}),
    Case("uneven.mp4", "libx264", UNEVEN, {"b_frames": 2}),
    Case("ntsc.mp4", "libx264", NTSC, {"b_frames": 2, "fps": Fraction(30000, 1001)}),
    Case("hevc.mp4", "libx265", EVEN, {"b_frames": 3, "options": QUIET}),
    Case("vp9.mp4", "libvpx-vp9"),
    Case("asp.mp4", "mpeg4", EVEN, {"b_frames": 2}),
    Case("h264.mov", "libx264", EVEN, {"b_frames": 3}),
    Case("jpeg.mov", "mjpeg", EVEN, {"audio": "pcm_s16le"}),
    Case("open.mkv", "libx264", EVEN, {"b_frames": 3, "options": OPEN}),
    Case("hevc.mkv", "libx265", EVEN, {"b_frames": 3, "options": QUIET}),
    Case("from_100_s.mkv", "libx264", [t + 100 for t in EVEN], {"audio_from": 100.0}),
    Case("before_zero.mkv", "libx264", [t - 0.2 for t in EVEN], {"audio_from": -0.2}),
    Case("ffv1.mkv", "ffv1", EVEN, {"audio": "flac"}),
    Case("vp8.webm", "libvpx", EVEN, {"audio": "libopus"}),
    Case("uneven.webm", "libvpx-vp9", UNEVEN, {"audio": "libopus"}),
    Case("mpeg1.mpg", "mpeg1video", EVEN, {"audio": "mp2", "b_frames": 2}),
    Case("mpeg2.mpg", "mpeg2video", EVEN, {"audio": "mp2", "b_frames": 2}),
    Case("late_audio.mpg", "mpeg2video", EVEN, {"audio": "mp2", "b_frames": 2, "audio_from": 0.4}),
    Case("ntsc.mpg", "mpeg2video", NTSC,
         {"audio": "mp2", "b_frames": 2, "fps": Fraction(30000, 1001)}),
    Case("mpeg2.vob", "mpeg2video", EVEN, {"audio": "ac3", "b_frames": 2}),
    Case("h264.mpg", "libx264", EVEN, {"audio": "mp2", "b_frames": 2}),
    Case("mpeg2.ts", "mpeg2video", EVEN, {"audio": "mp2", "b_frames": 2}),
    Case("open.ts", "libx264", EVEN, {"b_frames": 3, "options": OPEN}),
    Case("hevc.ts", "libx265", EVEN, {"b_frames": 3, "options": QUIET}),
    Case("late_audio.ts", "libx264", EVEN, {"b_frames": 2, "audio_from": 0.4}),
    Case("from_100_s.ts", "libx264", [t + 100 for t in EVEN], {"audio_from": 100.0}),
    Case("h264.m2ts", "libx264", EVEN, {"b_frames": 3, "mux": {"mpegts_m2ts_mode": "1"}}),
    Case("h264.flv", "libx264", EVEN, {"b_frames": 2}),
    Case("sorenson.flv", "flv", EVEN, {"audio": "libmp3lame", "rate": 44100}),
    Case("h264.avi", "libx264", EVEN, {"audio": "pcm_s16le", "b_frames": 2}),
    Case("asp.avi", "mpeg4", EVEN, {"audio": "pcm_s16le", "b_frames": 2}),
    Case("jpeg.avi", "mjpeg", EVEN, {"audio": "pcm_s16le"}),
    Case("vp8.ogv", "libvpx", EVEN, {"audio": "libopus"}),
    Case("h263.3gp", "h263"),
    Case("asp.3gp", "mpeg4"),
    Case("surround.mkv", "libx264", EVEN, {"audio": "ac3", "layout": "5.1"}),
    Case("telephone.mkv", "libx264", EVEN, {"audio": "pcm_s16le", "rate": 8000}),
]  # fmt: skip


def images_of(path: Path) -> tuple[np.ndarray, list[int]]:
    """Return the images of the 25 fps grid, and the numbers drawn on them."""
    probed = probe(path)
    grid = make_grid(probed)
    images = np.stack(list(VideoReader(probed, coded.WIDTH, coded.HEIGHT).read(grid.indices)))
    return images, [number_of(image) for image in images]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_frames_and_audio_keep_their_times(tmp_path: Path, case: Case) -> None:
    path = tmp_path / case.name
    write_coded(path, case.codec, case.times, **case.more)
    # What lies before the zero of an mp4 is cut off by its edit list.
    shown = [n for n, t in enumerate(case.times) if t >= 0 or path.suffix != ".mp4"]
    images, numbers = images_of(path)
    times = np.array(case.times) - case.times[shown[0]]
    step = max(np.diff(times))
    assert abs(len(numbers) - round((times[-1] + times[-1] - times[-2]) * 25)) <= 1
    for k, number in enumerate(numbers):
        assert abs(times[number] - k / 25) <= step / 2 + 0.002
    assert set(numbers) >= set(shown) if step >= 0.04 and case.times is EVEN else True
    probed = probe(path)
    grid = make_grid(probed)
    audio = audio_of(read_audio_track(path), grid, 0, len(grid.indices))
    flash = times[numbers[int(np.argmax([flashes(image) for image in images]))]]
    tone = int(np.argmax(np.abs(audio) > 0.1)) / 16000
    assert abs(tone - flash) <= 0.02


def test_the_reader_decodes_mpeg_files_by_index(media: Path) -> None:
    """Frame k of the reader is frame k, in the MPEG-1 program streams of a corpus."""
    for path in sorted((media / "video").glob("grid_*.mpg")):
        with open_media(path) as container:
            frames = [
                f for _, f in decode_frames(container, video_stream(container), ignore_progress)
            ]
            first = [frame.to_ndarray(format="rgb24") for frame in frames[:3]]
        probed = probe(path)
        decoded_images = list(VideoReader(probed, probed.width, probed.height).read(np.arange(3)))
        assert len(probed.times) == len(frames) == 75
        assert all(
            np.array_equal(one, other) for one, other in zip(first, decoded_images, strict=True)
        )


@pytest.mark.parametrize("name", ["mpeg2.ts", "late_audio.mpg", "hevc.ts", "late_picture.mp4"])
def test_generate_reads_the_same_frames_and_audio(tmp_path: Path, name: str) -> None:
    case, path = next(case for case in CASES if case.name == name), tmp_path / name
    write_coded(path, case.codec, case.times, **case.more)
    arguments = GenerateArguments(
        out=tmp_path / "out.mp4", task="lip_sync", source_video=path, audio=path,
        box=(40, 100, 100, 130), width=coded.WIDTH, height=coded.HEIGHT,
    )  # fmt: skip
    numbers = [number_of(image) for image in to_frames(video_footage(arguments, 33).pixels)]
    assert numbers == list(range(33))
    samples, _ = read_speech(arguments)
    assert samples is not None
    assert abs(int(np.argmax(np.abs(samples) > 0.1)) / 16000 - 20 / 25) <= 0.02


@pytest.mark.parametrize(
    "name", [case.name for case in CASES if case.name.endswith(".mp4") and case.times[1] < 1]
)
def test_clips_of_any_writer_are_decoded_in_order(tmp_path: Path, name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    write_coded(tmp_path / name, case.codec, case.times, **case.more)
    numbers = [number_of(image) for image in decode_mp4((tmp_path / name).read_bytes())]
    assert numbers == [n for n, t in enumerate(case.times) if t >= 0]


def test_pyav_is_preferred_if_decord_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_mp4(np.stack([coded.image_of(n, 20) for n in range(25)]))
    truth = decode_mp4(data)
    for wrong in (np.roll(truth, 1, 0), truth[:-1], truth[..., ::-1][:, ::-1], truth[:0]):
        monkeypatch.setattr("echolab.data.media._decord_frames", lambda _, wrong=wrong: wrong)
        assert np.abs(decode_mp4(data).astype(int) - truth).max() <= 2
    monkeypatch.undo()
    assert [number_of(image) for image in truth] == list(range(25))


def test_joined_recordings_are_refused(tmp_path: Path) -> None:
    write_coded(tmp_path / "one.mpg", "mpeg2video", EVEN, audio="mp2")
    (tmp_path / "two.mpg").write_bytes((tmp_path / "one.mpg").read_bytes() * 2)
    with pytest.raises(MediaError, match=r"time stamps: they go back from .* give each"):
        probe(tmp_path / "two.mpg")
    with pytest.raises(MediaError, match=r"time stamps of the audio go back"):
        read_audio_track(tmp_path / "two.mpg")


def test_undecodable_audio_is_not_replaced_by_silence(tmp_path: Path) -> None:
    """Clips in a span of damaged packets are refused, and so is reading their audio."""
    path = tmp_path / "a.mkv"
    write_coded(path, "libx264", EVEN, audio="ac3", flash=0)
    data = bytearray(path.read_bytes())
    with open_media(path) as container:
        packets = [bytes(p) for p in container.demux(audio=0) if p.size]
    for packet in packets[15:20]:  # 32 ms each
        at = data.index(packet)
        data[at : at + len(packet)] = bytes(len(packet))
    path.write_bytes(data)
    audio, grid = read_audio_track(path), make_grid(probe(path))
    first, last = min(audio.damaged)[0], max(audio.damaged)[1]
    assert abs(first - 15 * 0.032) < 0.04 and abs(last - 20 * 0.032) < 0.04
    covered = has_audio(audio, grid)
    assert not covered[math.ceil(first * 25) : math.floor(last * 25)].any()
    assert covered[:10].all() and covered[18:35].all()
    with pytest.raises(MediaError, match=r"a\.mkv: the audio is damaged at 0\.4"):
        read_audio(path)


def test_audio_may_change_its_layout(tmp_path: Path) -> None:
    """Two joined transport streams are read; broadcasts change from mono to stereo."""
    write_coded(tmp_path / "mono.ts", "mpeg2video", EVEN, audio="mp2", flash=0)
    later = [t + 1.6 for t in EVEN]
    write_coded(tmp_path / "stereo.ts", "mpeg2video", later, audio="mp2", flash=0,
                audio_from=1.8, layout="stereo")  # fmt: skip
    joined = b"".join((tmp_path / f"{name}.ts").read_bytes() for name in ("mono", "stereo"))
    (tmp_path / "both.ts").write_bytes(joined)
    audio = read_audio_track(tmp_path / "both.ts")
    assert abs(len(audio.samples) / 16000 - 3.36) < 0.1
    quiet = np.abs(audio.samples.reshape(-1, 16)[200:3000]).max(1) < 0.05
    assert quiet.mean() < 0.05


def test_tags_in_another_encoding_are_accepted(tmp_path: Path) -> None:
    write_coded(tmp_path / "a.mkv", "libx264", EVEN, audio="flac")
    data = (tmp_path / "a.mkv").read_bytes()
    at = data.index(b"Lavf")
    (tmp_path / "a.mkv").write_bytes(data[:at] + b"\xe9\xe8\xff\xfe" + data[at + 4 :])
    assert len(probe(tmp_path / "a.mkv").times) == 40
    assert len(read_audio(tmp_path / "a.mkv")) > 16000


def test_a_change_of_size_is_refused(tmp_path: Path) -> None:
    write_coded(tmp_path / "one.ts", "mpeg2video", EVEN, audio=None)
    with av.open(str(tmp_path / "two.ts"), "w") as container:
        video = container.add_stream("mpeg2video", rate=25)
        video.width, video.height, video.pix_fmt = 320, 240, "yuv420p"
        for k in range(10):
            frame = av.VideoFrame.from_ndarray(np.zeros((240, 320, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = 40 + k, Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    joined = (tmp_path / "one.ts").read_bytes() + (tmp_path / "two.ts").read_bytes()
    (tmp_path / "both.ts").write_bytes(joined)
    with pytest.raises(MediaError, match=r"frame size: it changes from 176x144 to 320x240"):
        probe(tmp_path / "both.ts")


def test_interlaced_frames_become_full_frames_at_their_indices(tmp_path: Path) -> None:
    """Deinterlaced rows of two moments leave no row pattern, and frames keep their indices."""
    path = tmp_path / "a.mpg"
    options = {"flags": "+ilme+ildct", "top": "1"}
    write_coded(path, "mpeg2video", EVEN, audio="mp2", options=options, combed=True)
    probed = probe(path)
    assert probed.interlaced
    images, numbers = images_of(path)
    assert numbers == list(range(40))
    reader = VideoReader(probed, coded.WIDTH, coded.HEIGHT)
    assert np.array_equal(next(reader.read(np.array([17]))), images[17])
    rows = images[10:30, coded.HEIGHT // 2 + 20 : -20].astype(float).mean((2, 3))
    assert np.abs(np.diff(rows, axis=1)).mean() < 8


@pytest.mark.parametrize("name", [b"\xe9.mp4", b"http:x.mp4", b"%03d.mp4", b"line\nbreak.mp4"])
def test_a_file_of_any_name_is_read(tmp_path: Path, name: bytes) -> None:
    write_coded(tmp_path / "a.mp4", "libx264", EVEN, b_frames=2)
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    (tmp_path / "a.mp4").rename(path)
    assert images_of(path)[1] == list(range(40))
    assert len(read_audio(path)) > 16000


def test_a_track_without_a_decoder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_coded(path, "libx264", EVEN)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"))
    with pytest.raises(MediaError, match="no video: no decoder is known"):
        probe(path)
    assert len(read_audio(path)) > 16000


def test_an_impossible_frame_rate_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 67_156_864, 0, "NONE", ""))
        file.writeframes(bytes(200_000))
    with pytest.raises(MediaError, match=r"a\.wav: the audio is damaged \(67156864 samples"):
        read_audio_track(path)


def test_an_empty_audio_track_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "a.mov"
    write_coded(path, "libx264", EVEN, audio="pcm_s16le", audio_until=0.0)
    options, unused = RunOptions(path, tmp_path), Models(tmp_path, None)  # type: ignore[arg-type]
    source = Source(path, path.name, "0" * 64, "")
    (row,) = read_source(source, options, unused, ignore_progress)
    assert isinstance(row, Refusal) and row.reason.startswith("no audio: ")


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_rotated_frame_is_upright(tmp_path: Path, turns: int) -> None:
    """The matrix of the track's header rotates frames, as phones write it."""
    path = tmp_path / "a.mp4"
    write_coded(path, "libx264", EVEN)
    a, b, c, d = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)][turns]
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 2**30)
    turned = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 2**30)
    data = path.read_bytes()
    at = data.index(matrix, data.index(b"tkhd"))  # the first track is the video
    path.write_bytes(data[:at] + turned + data[at + len(matrix) :])
    probed = probe(path)
    flat = (coded.WIDTH, coded.HEIGHT)
    assert (probed.width, probed.height) == (flat if turns % 2 == 0 else flat[::-1])
    for number, image in enumerate(VideoReader(probed, *flat[:: -1 if turns % 2 else 1]).read(
        np.arange(3)
    )):  # fmt: skip
        assert number_of(np.rot90(image, turns)) == number
    assert number_of(np.rot90(decode_mp4(path.read_bytes())[2], turns)) == 2
