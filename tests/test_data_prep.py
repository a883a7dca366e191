"""Preparation: one clock, 4n+1 frames, every second in a clip or refused; no file stops a run."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import unruly_jobs

from data_prep.__main__ import main
from data_prep.draw import draw_dataset
from data_prep.filter import (
    find_subject,
    frame_reasons,
    is_audible,
    silence_reason,
    still_lips_reason,
)
from data_prep.options import DrawOptions, RunOptions, is_clip_length
from data_prep.run import prepare, read_refused
from data_prep.source import Models, Source, cut_span, read_source
from data_prep.workers import Clock, Failed, Finished, Progressed, Unfinished, work
from echolab.atomic_io import lock_folder
from echolab.data.media import read_audio_track
from echolab.encoders.demo import CausalAutoencoder
from echolab.errors import (
    ConfigError,
    DataError,
    EcholabError,
    MediaError,
    RetryableError,
    WeightsError,
)
from echolab.fitting import save_net
from echolab.vision.face_models import YUNET, find_face_model
from echolab.vision.faces import SceneCuts, Tracker, boxes
from echolab.vision.normalize import (
    audio_of,
    boxes_in_crop,
    crop_frame,
    crop_full,
    crop_head,
    has_audio,
    make_grid,
)
from echolab.vision.video_reader import VideoReader, probe

FLASH = 7  # number of the source frame that is white and sounds


def write_flashing(
    path: Path, times: Sequence[float], *, flash: int = FLASH, sound_from: float = 0.0,
    sound_seconds: float = 2.0, size: int = 128,
) -> float:  # fmt: skip
    """Write black video with frames at `times`, white with a tone from frame `flash` on."""
    rate = 16000
    start = times[flash]
    faststart = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=faststart) as container:
        video = container.add_stream("libx264", rate=1000, options={"bf": "0"})
        video.width = video.height = size
        video.pix_fmt, video.time_base = "yuv420p", Fraction(1, 1000)
        video.codec_context.time_base = Fraction(1, 1000)
        audio = container.add_stream("pcm_s16le" if path.suffix == ".mkv" else "aac", rate=rate)
        for number, time in enumerate(times):
            image = np.full((size, size, 3), 255 * (number >= flash), np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        at = sound_from + np.arange(round(sound_seconds * rate)) / rate
        tone = (np.sin(2 * np.pi * 440 * at) * (at >= start) * 20000).astype(np.int16)
        for first in range(0, len(tone), 1024):
            piece = av.AudioFrame.from_ndarray(tone[None, first : first + 1024], "s16", "mono")
            piece.sample_rate, piece.time_base = rate, Fraction(1, rate)
            piece.pts = first + round(sound_from * rate)
            container.mux(audio.encode(piece))
        container.mux(audio.encode(None))
    return start


def even(fps: float, first: float = 0.0, count: int = 40) -> list[float]:
    return [first + k / fps for k in range(count)]


@pytest.mark.parametrize(
    ("times", "sound_from"),
    [
        (even(25), 0.0),
        (even(30), 0.0),
        (even(60, count=80), 0.0),
        (even(12), 0.0),
        (even(25, first=0.4), 0.0),
        (even(25), 0.2),
        (list(np.cumsum([0.033, 0.067, 0.033, 0.033] * 10)), 0.0),
    ],
    ids=["25", "30", "60", "12", "late picture", "late sound", "variable"],
)
def test_flash_and_tone_stay_in_sync(tmp_path: Path, times: list[float], sound_from: float) -> None:
    path = tmp_path / "a.mkv"
    start = write_flashing(path, times, sound_from=sound_from)
    probed = probe(path)
    grid = make_grid(probed)
    audio = audio_of(read_audio_track(path), grid, 0, len(grid.indices))
    images = np.stack(list(VideoReader(probed, 128, 128).read(grid.indices)))
    flash = int(np.argmax(images.mean((1, 2, 3)) > 128)) / 25
    tone = int(np.argmax(np.abs(audio) > 0.1)) / 16000
    # The nearest frame is shown: half a source frame early, or one output frame late, at most.
    assert -max(np.diff(times)) / 2 - 0.003 <= flash - tone <= 0.04 + 0.003
    assert abs(grid.seconds(0) + tone - start) < 0.003


def test_every_source_frame_at_25_fps_is_kept_once(tmp_path: Path) -> None:
    write_flashing(tmp_path / "a.mkv", even(25, first=0.4))
    assert make_grid(probe(tmp_path / "a.mkv")).indices.tolist() == list(range(40))


def test_frames_are_the_same_in_one_pass_or_several(tmp_path: Path) -> None:
    write_flashing(tmp_path / "a.mp4", even(30))
    probed = probe(tmp_path / "a.mp4")
    complete = np.stack(list(VideoReader(probed, 128, 128).read(np.arange(40))))
    reader = VideoReader(probed, 128, 128)
    for numbers in ([0, 1, 2], [2, 3, 3, 9], [20, 31, 39], [5, 39], []):
        images = list(reader.read(np.array(numbers, np.int64)))
        assert len(images) == len(numbers)
        assert all(np.array_equal(p, complete[n]) for p, n in zip(images, numbers, strict=True))


def test_frames_without_audio_are_refused(tmp_path: Path) -> None:
    write_flashing(tmp_path / "a.mkv", even(25), sound_seconds=1.0)
    grid = make_grid(probe(tmp_path / "a.mkv"))
    covered = has_audio(read_audio_track(tmp_path / "a.mkv"), grid)
    assert covered[:25].all() and not covered[26:].any()
    reasons = frame_reasons(grid, covered, find_subject([], len(covered)), 96)
    assert reasons[0].startswith("no face") and reasons[-1].startswith("no audio")


def test_a_truncated_file_is_refused_at_its_end(tmp_path: Path) -> None:
    complete, cut = tmp_path / "complete.mp4", tmp_path / "cut.mp4"
    write_flashing(complete, even(25, count=75), size=256)
    cut.write_bytes(complete.read_bytes()[: complete.stat().st_size * 2 // 3])
    assert not probe(complete).damaged
    probed = probe(cut)
    assert 20 < len(probed.times) < 75
    ((first, last),) = [span for span in probed.damaged if span[1] > probed.end]
    assert first <= probed.end + 0.05 and abs(last - 3) < 0.1
    unused = Models(tmp_path, None)  # type: ignore[arg-type]
    options = RunOptions(cut, tmp_path, size=64)
    parts = read_source(Source(cut, cut.name, "0" * 64, ""), options, unused, lambda _: None)
    assert next(parts).reason.startswith("damaged: the file ends before")  # type: ignore[union-attr]
    for size in (0, 10, 300):
        cut.write_bytes(complete.read_bytes()[:size])
        with pytest.raises(MediaError, match="damaged|no video"):
            probe(cut)


@pytest.mark.parametrize("frames", [5, 13, 81])
def test_clips_partition_the_start_of_a_span(frames: int) -> None:
    for length in range(1, 200):
        for least in {5, frames}:
            clips, end = cut_span(100, 100 + length, frames, least)
            lengths = [last - first for first, last in clips]
            assert all(is_clip_length(n) and least <= n <= frames for n in lengths)
            assert end == 100 + sum(lengths) and end <= 100 + length
            assert [first for first, _ in clips] == [
                100 + sum(lengths[:i]) for i in range(len(clips))
            ]
            assert 100 + length - end < max(least, 4)


def face(x: float, y: float = 50, score: float = 0.95, size: float = 40) -> np.ndarray:
    row = np.zeros(15, np.float32)
    row[:4], row[14] = (x, y, size, size), score
    return row


def test_a_track_starts_at_a_high_score_and_continues_at_a_lower_one() -> None:
    tracker = Tracker()
    for k in range(0, 20, 2):
        tracker.add(k, np.stack([face(10 + k, score=0.95 if k == 4 else 0.75)]))
    (track,) = tracker.finish(20, 2)
    assert (track.first, track.last) == (4, 20)
    # Between two looks the box is where a steady motion puts it.
    assert np.allclose(boxes(track.rows)[:15, 0], 10 + np.arange(4, 19))


def test_a_track_survives_a_short_gap_but_not_a_cut() -> None:
    tracker = Tracker()
    for k in [*range(10), *range(13, 20)]:
        tracker.add(k, np.stack([face(10)]))
    tracker.cut(20)
    for k in range(20, 30):
        tracker.add(k, np.stack([face(10)]))
    assert [(t.first, t.last) for t in tracker.finish(30, 1)] == [(0, 20), (20, 30)]


def test_two_faces_make_two_tracks_and_are_refused() -> None:
    tracker = Tracker()
    for k in range(10):
        tracker.add(k, np.stack([face(10 + k), face(200 - k, size=30), face(400, size=10)]))
    tracks = tracker.finish(10, 1)
    subject = find_subject(tracks, 12)
    assert subject.faces.tolist() == [3] * 10 + [0] * 2
    assert np.allclose(subject.second[:10], 0.75) and (subject.height[:10] == 40).all()
    assert len(set(subject.track[:10])) == 1 and (subject.track[10:] == -1).all()


def test_cuts_are_detected_and_motion_is_not_one() -> None:
    rng = np.random.default_rng(0)
    scenes = [rng.integers(0, 256, (1, 4, 3)).astype(np.uint8).repeat(72, 0).repeat(32, 1)
              for _ in range(3)]  # fmt: skip
    cuts = SceneCuts()
    begins = [cuts.begins(np.roll(scene, shift, 1)) for scene in scenes for shift in range(4)]
    assert begins == [True, False, False, False] * 3


def test_silence_is_distinguished_from_pauses() -> None:
    tone = (0.1 * np.sin(np.arange(640 * 50) / 5)).astype(np.float32)
    paused = tone * (np.arange(len(tone)) < 0.3 * len(tone))
    assert silence_reason(tone) == "" and silence_reason(paused) == ""
    assert silence_reason(tone * 1e-3).startswith("silence:") and not is_audible(tone * 1e-3)
    assert silence_reason(tone * (np.arange(len(tone)) < 0.1 * len(tone))).startswith("silence:")


def test_still_lips_do_not_count_as_talking() -> None:
    sure = np.ones(50)
    moving = 0.05 + 0.03 * np.sin(np.arange(50))
    assert still_lips_reason(moving, sure) == ""
    assert still_lips_reason(np.full(50, 0.05), sure).startswith("not talking:")
    assert still_lips_reason(moving, sure * 0.1).startswith("no face:")


@pytest.mark.parametrize(("width", "height"), [(640, 480), (1080, 1920), (410, 412), (200, 200)])
def test_the_crop_stays_inside_and_boxes_follow(width: int, height: int) -> None:
    faces = np.array([[50, 30, 130, 150], [70, 30, 150, 150]], np.float32)
    for framing in (crop_head(faces, width, height, 128), crop_full(width, height, 128)):
        x0, y0, x1, y1 = framing.box
        assert 0 <= x0 < x1 <= width + 1e-3 and 0 <= y0 < y1 <= height + 1e-3
        assert framing.width % 16 == 0 == framing.height % 16
        scale = framing.width / (x1 - x0)
        assert np.isclose(scale, framing.height / (y1 - y0))
        inside = boxes_in_crop(faces, framing)
        assert np.allclose(inside[1, 0] - inside[0, 0], 20 * scale, atol=1e-3)
        image = np.zeros((height, width, 3), np.uint8)
        image[30:150, 50:130] = 255
        cropped = crop_frame(image, framing)
        assert cropped.shape == (framing.height, framing.width, 3)
        ys, xs = np.nonzero(cropped[..., 0] > 127)
        probed = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert np.abs(inside[0] - probed).max() <= 1 + scale / 2


@pytest.mark.parametrize(
    "bad", ["frames=80", "frames=1", "size=100", "min_frames=85", "detect_every=9", "crop=x"]
)
def test_options_out_of_range_are_refused(bad: str, tmp_path: Path) -> None:
    from data_prep.__main__ import run as run_step

    with pytest.raises(ConfigError, match=bad.partition("=")[0]):
        run_step([str(tmp_path), str(tmp_path / "out"), bad])


def test_a_model_file_must_have_the_pinned_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("echolab.model_files.CACHE", tmp_path / "cache")
    monkeypatch.setattr("echolab.model_files.urllib.request.urlopen", offline)
    monkeypatch.chdir(tmp_path)  # away from weights/ and ../shared/weights
    with pytest.raises(WeightsError, match=r"yunet.*cannot be used.*face_models=FOLDER"):
        find_face_model(YUNET, tmp_path)
    (tmp_path / YUNET.name).write_bytes(b"another")
    with pytest.raises(WeightsError, match=rf"{YUNET.name}: sha256.*need {YUNET.sha256[:16]}"):
        find_face_model(YUNET, tmp_path)
    with pytest.raises(WeightsError, match="no such folder"):
        find_face_model(YUNET, tmp_path / "none")


def offline(*_: object, **__: object) -> None:
    raise OSError("no network")


@pytest.mark.slow
def test_no_failing_job_ends_the_run(tmp_path: Path) -> None:
    once = f"crash once in {tmp_path}"
    jobs = ["one", "crash", "raise", "hang", "killed", "exit", once, "memory", "stale", "slow"]
    reports = [r for r in work(unruly_jobs.setup, jobs, 2, 3.0) if not isinstance(r, Progressed)]
    assert {r.job: r.result for r in reports if isinstance(r, Finished)} == {
        "one": "ONE",
        "slow": "SLOW",  # for twice as long as a worker may be silent
        once: once.upper(),
    }
    failed = {r.job: r.reason for r in reports if isinstance(r, Failed)}
    assert set(failed) == {"crash", "raise", "hang"} and len(reports) == len(jobs)
    assert "twice (signal 11)" in failed["crash"] and "hangs" in failed["hang"]
    assert failed["raise"].startswith("unreadable: ValueError")
    stopped = {r.job: r.reason for r in reports if isinstance(r, Unfinished)}
    assert stopped["killed"].startswith("killed: ") and "signal 9" in stopped["killed"]
    assert "exit code 3" in stopped["exit"] and stopped["memory"].startswith("memory:")
    assert stopped["stale"] == "cannot be read: Stale file handle"
    assert not any("damaged" in what for what in (*stopped.values(), failed["hang"]))
    with pytest.raises(DataError, match="disk: full"):
        list(work(unruly_jobs.setup, ["disk"], 1, 9.0))
    with pytest.raises(EcholabError, match="cannot start"):
        list(work(unruly_jobs.broken_setup, ["one"], 1, 9.0))


@pytest.mark.slow
def test_a_stopped_worker_does_not_hang_the_run(tmp_path: Path) -> None:
    def resume() -> None:
        while not (tmp_path / "pid").exists():
            time.sleep(0.1)
        time.sleep(7)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGCONT)

    thread = threading.Thread(target=resume)
    thread.start()
    reports = list(work(unruly_jobs.setup, [f"stop in {tmp_path}"], 1, 5.0))
    thread.join()
    assert isinstance(reports[-1], Finished)


def test_suspended_time_does_not_count_towards_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.5, 1.0, 4000.0, 4000.5])
    monkeypatch.setattr("data_prep.workers.time.monotonic", lambda: next(now))
    clock = Clock()
    for _ in range(4):
        clock.tick()
    assert 1.5 <= clock.seconds <= 4


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a source of three files that no model needs to process."""
    monkeypatch.setattr("data_prep.run.find_face_model", lambda *_: tmp_path)
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (source / name).write_bytes(name.encode())
    return source


def test_a_killed_worker_loses_no_file(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, options = tmp_path / "complete", RunOptions(three, tmp_path / "out")
    monkeypatch.setattr("data_prep.run.work", unruly_jobs.stand_in(()))
    prepare(RunOptions(three, complete))
    monkeypatch.setattr("data_prep.run.work", unruly_jobs.stand_in({"b.mp4"}))
    with pytest.raises(RetryableError, match=r"b\.mp4: killed: .*1 of 3 files.*same command again"):
        prepare(options)
    assert not (options.out / "dataset.json").exists()
    monkeypatch.setattr("data_prep.run.work", unruly_jobs.stand_in(()))
    assert prepare(options)["clips"] == 3
    for path in complete.iterdir():
        assert path.read_bytes() == (options.out / path.name).read_bytes()


@pytest.mark.parametrize("step", ["run", "draw", "encode"])
def test_a_folder_in_use_is_not_written_to(
    three: Path, tmp_path: Path, step: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, video = tmp_path / "out", tmp_path / "video.safetensors"
    out.mkdir()
    save_net(video, CausalAutoencoder(width=8), {"width": 8})
    draw_dataset(DrawOptions(tmp_path / "raw", num_clips=1, frames=5, size=32), lambda _: None)
    words = {
        "run": ["run", str(three), str(out)],
        "draw": ["draw", str(out), "num_clips=1"],
        "encode": ["encode", str(tmp_path / "raw"), str(out), f"vae={video}"],
    }[step]
    with lock_folder(out), ThreadPoolExecutor(1) as pool:
        assert pool.submit(main, words).result() == 77
        assert [path.name for path in out.iterdir()] == [".lock"]
    assert f"out: process {os.getpid()} on" in capsys.readouterr().err


def test_a_file_that_fails_in_every_run_is_refused(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RunOptions(three, tmp_path / "out")
    monkeypatch.setattr("data_prep.run.work", unruly_jobs.stand_in({"b.mp4"}))
    for _ in range(2):
        with pytest.raises(RetryableError):
            prepare(options)
    assert prepare(options)["clips"] == 2
    (row,) = read_refused(options.out / "refused.jsonl")
    assert row["source"] == "b.mp4" and row["reason"].startswith("killed: ")
    assert row["reason"].endswith("in 3 runs")


def run(*words: str | Path, **more: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "data_prep", *map(str, words)]
    folder = Path(__file__).resolve().parent.parent
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, **more)  # type: ignore[call-overload, no-any-return]


def test_bad_input_gives_one_line(tmp_path: Path) -> None:
    assert run("--help").returncode == 0 and "run" in run("--help").stdout
    for words, said in (
        (["run", tmp_path / "none.mp4", tmp_path / "out"], "none.mp4: not there"),
        (["run", tmp_path, tmp_path / "out", "frame=9"], "frames"),
        (["walk"], "walk: no such action; use run, draw, encode"),
        (["encod"], "encod: no such action; did you mean encode?"),
    ):
        done = run(*words)
        assert done.returncode != 0 and said in done.stderr and done.stdout == ""
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


MISTAKES = [
    ("drw", "drw: no such action; did you mean draw?"),
    ("run", "give source=... out=..."),
    ("run TYPO out", "TYPO: not there; give a video or a folder of videos"),
    ("run TYPO out crop=hed", "did you mean head?"),
    ("run TYPO out frames=50", "frames=50: give 4n+1"),
    ("draw out num_clip=3", "did you mean num_clips=...?"),
    ("draw out size=40", "size=40: must be a multiple of 16"),
    ("encode TYPO out vae=x", "TYPO/dataset.json: not there"),
    ("encode raw out", "vae: needed with encoders=demo; give vae=PATH"),
    ("encode raw out vae=TYPO", "TYPO: not there; fit it with `echolab fit`"),
    ("encode raw out encoders=relesed", "did you mean released?"),
    ("encode raw out encoders=released wav2vec=x", "encoder_dir: needed with encoders=released"),
    ("encode raw out vae=raw encoded=TYPO", "TYPO/dataset.json: not there"),
]


def test_a_mistake_is_answered_in_one_line_before_numpy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/dataset.json").touch()
    program = (
        "import sys\nfrom data_prep.__main__ import main\n"
        "for line in sys.argv[1:]:\n    assert main(line.split()) == 1\n"
        "assert {'numpy', 'torch'}.isdisjoint(sys.modules)\n"
    )
    command = [sys.executable, "-c", program, *(words for words, _ in MISTAKES)]
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(MISTAKES)
    for (words, message), line in zip(MISTAKES, lines, strict=True):
        assert line.startswith("data_prep: error: ") and message in line, f"{words}: {line}"
