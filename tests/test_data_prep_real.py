"""Preparation of the real sample videos: each is used, or refused for its own reason."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.filter import Refusal
from data_prep.listing import list_source
from data_prep.options import RunOptions, is_clip_length
from data_prep.run import prepare
from data_prep.source import Models, Source, read_source
from echolab.data.media import decode_flac, decode_mp4, decode_tracks
from echolab.data.shard_reader import open_dataset
from echolab.data.verify import verify
from echolab.errors import MediaError
from echolab.vision.face_models import YUNET, find_face_model
from echolab.vision.video_reader import VideoReader, probe

pytestmark = pytest.mark.media


def run(*words: str | Path, **more: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "data_prep", *map(str, words)]
    folder = Path(__file__).resolve().parent.parent
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, **more)  # type: ignore[call-overload, no-any-return]


def models(weights: Path) -> Models:
    from echolab.vision.face_models import LANDMARKER
    from echolab.vision.faces import FaceMesh

    return Models(find_face_model(YUNET, weights), FaceMesh(find_face_model(LANDMARKER, weights)))


def test_lips_are_detected_at_the_mouth(media: Path, weights: Path) -> None:
    """The mesh's lips contain the detector's mouth corners and lie in the lower face."""
    from echolab.vision.faces import FaceDetector

    probed = probe(media / "video" / "th_may5s.mp4")
    image = next(VideoReader(probed, probed.width, probed.height).read(np.array([30])))
    both = models(weights)
    row = FaceDetector(both.yunet, probed.width, probed.height).detect(image)[0]
    mesh = both.mesh.find(image, row)
    left, top, right, bottom = mesh.lips
    x, y, width, height = row[:4]
    assert mesh.presence > 0.9
    assert x < left < right < x + width and y + height / 2 < top < bottom < y + height
    corners = row[10:14].reshape(2, 2)
    assert np.abs(np.sort(corners[:, 0]) - [left, right]).max() < 0.1 * width
    assert (corners[:, 1] > top - 0.05 * height).all() and (corners[:, 1] < bottom).all()


def test_a_rotated_video_is_upright(media: Path) -> None:
    """PyAV's rotation equals decord's."""
    import decord

    path = media / "video" / "bad_rot90.mov"
    probed = probe(path)
    assert (probed.width, probed.height) == (320, 568)
    ours = list(VideoReader(probed, 320, 568).read(np.arange(3)))
    theirs = decord.VideoReader(str(path)).get_batch(range(3)).asnumpy()
    assert np.abs(np.stack(ours).astype(int) - theirs).mean() < 2


def test_every_second_is_in_a_clip_or_refused(media: Path, weights: Path) -> None:
    path = media / "video" / "offset_hamilton.mp4"
    options = RunOptions(path, path, frames=33, min_frames=17, size=64)
    both = models(weights)
    source = Source(path, path.name, "0" * 64, "")
    parts = list(read_source(source, options, both, lambda _: None))
    spans = []
    for part in parts:
        if isinstance(part, Refusal):
            spans.append((part.start_seconds, part.end_seconds))
            continue
        facts = json.loads(part.members["json"])
        spans.append((facts["start_seconds"], facts["end_seconds"]))
        frames = decode_mp4(part.members["mp4"])
        tracks = decode_tracks(part.members["tracks.npz"])
        assert len(frames) == facts["frames"] == len(tracks.face) == len(tracks.lips)
        assert is_clip_length(len(frames)) and frames.shape[1:] == (64, 64, 3)
        assert len(decode_flac(part.members["flac"])) == 640 * len(frames)
        assert (tracks.lips[:, 1] >= tracks.face[:, 1]).all() and tracks.face.max() <= 64
    spans.sort()
    ends = [0.852, *(end for _, end in spans[:-1])]
    assert np.allclose([start for start, _ in spans], ends, atol=0.002)
    assert abs(spans[-1][1] - 10.01) < 0.05


@pytest.fixture
def few(media: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ECHOLAB_WEIGHTS", str(weights))
    source = tmp_path / "source"
    (source / "deeper").mkdir(parents=True)
    for name in ("th_may5s.mp4", "noaudio_iplap129.mp4", "bad_corrupted.mp4"):
        (source / name).symlink_to(media / "video" / name)
    (source / "deeper" / "grid_bbaf2n.mpg").symlink_to(media / "video" / "grid_bbaf2n.mpg")
    (source / "deeper" / "grid_bbaf2n.txt").write_text("A man says: bin blue at f two now.\n")
    (source / "notes.md").write_text("no video")
    (source / "empty.mp4").write_bytes(b"")
    (source / ".hidden.mp4").write_bytes(b"")
    return source


SMALL = ("frames=33", "min_frames=33", "size=64", "samples_per_shard=2")


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_result(few: Path, tmp_path: Path) -> None:
    complete, killed = tmp_path / "complete", tmp_path / "killed"
    done = run("run", few, complete, *SMALL, "format=json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert verify(complete) == [] and figures["files"] == 6 and figures["files_used"] == 2
    command = [sys.executable, "-u", "-m", "data_prep", "run", str(few), str(killed), *SMALL]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path.cwd()) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.startswith("[3/6]"))
        process.kill()
    assert not (killed / "dataset.json").exists()
    again = run("run", few, killed, *SMALL)
    assert again.returncode == 0 and "were done by an earlier run" in again.stderr
    files = sorted(path.name for path in complete.iterdir())
    assert files == sorted(path.name for path in killed.iterdir())
    for name in files:
        assert (complete / name).read_bytes() == (killed / name).read_bytes()
    assert run("run", few, complete, *SMALL, "format=json").stdout == done.stdout
    other = run("run", few, complete, "frames=29")
    assert other.returncode == 1 and "other files or options" in other.stderr

    dataset = open_dataset(complete)
    facts = [json.loads(dataset.read(i)["json"]) for i in range(len(dataset))]
    captions = {fact["source"]: fact["caption"] for fact in facts}
    assert captions["deeper/grid_bbaf2n.mpg"] == "A man says: bin blue at f two now."
    refused = [json.loads(line) for line in (complete / "refused.jsonl").read_text().splitlines()]
    kinds = {row["source"]: row["reason"].partition(":")[0] for row in refused}
    assert kinds["noaudio_iplap129.mp4"] == "no audio"
    assert kinds["notes.md"] == kinds["empty.mp4"] == "damaged"
    assert {"source", "start_seconds", "end_seconds", "reason"} == set(refused[0])


@pytest.mark.slow
def test_a_full_disk_leaves_no_dataset(few: Path, tmp_path: Path) -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = run("run", few, tmp_path / "out", *SMALL, "crf=0", preexec_fn=limit)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert len(errors) == 1 and "could not be written" in errors[0]
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_source_without_a_clip_is_an_error(media: Path, weights: Path, tmp_path: Path) -> None:
    path = media / "video" / "bad_corrupted.mp4"
    with pytest.raises(MediaError, match=r"bad_corrupted\.mp4: no clip.*no audio.*refused\.jsonl"):
        prepare(RunOptions(path, tmp_path / "out", face_models=weights))
    assert (tmp_path / "out" / "refused.jsonl").exists()
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert list_source(path, tmp_path).files == [(path, path.name)]


# Kinds of refusals of each sample file; None: it gives clips, with any refusals.
EXPECTED = {
    "bad_corrupted.mp4": {"damaged", "no audio"},
    "bad_rot90.mov": {"no audio"},
    "hb_lp_s20_silent.mp4": {"silence"},
    "hb_lrs3_small.mp4": {"face too small"},
    "misc_pancake.mkv": {"no face"},
    "multi_crowd.mp4": {"several faces", "no face", "face too small"},
    "noaudio_iplap129.mp4": {"no audio"},
    "noaudio_lp_d13.mp4": {"no audio"},
    "noface_dog.mp4": {"no face"},
    "th_lp_d9_sar.mp4": {"silence", "too short"},
}


@pytest.mark.slow
def test_each_sample_video_is_used_or_refused_for_its_reason(
    media: Path, weights: Path, tmp_path: Path
) -> None:
    if len(list((media / "video").iterdir())) != 28:
        pytest.skip("the sample videos are not the 28 that this test knows")
    options = RunOptions(media / "video", tmp_path / "out", frames=49, min_frames=25, size=64,
                         face_models=weights, workers=os.cpu_count() or 1,
                         detect_every=4)  # fmt: skip
    figures = prepare(options)
    assert figures["files"] == 28 and figures["files_used"] == 18
    dataset = open_dataset(tmp_path / "out")
    used = {json.loads(dataset.read(i)["json"])["source"] for i in range(len(dataset))}
    refused: dict[str, set[str]] = {}
    for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines():
        row = json.loads(line)
        refused.setdefault(row["source"], set()).add(row["reason"].partition(":")[0])
    names = {path.name for path in (media / "video").iterdir()}
    assert used == names - set(EXPECTED)
    for name, kinds in EXPECTED.items():
        assert refused[name] <= kinds and refused[name], name
