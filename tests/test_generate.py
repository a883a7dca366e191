"""`echolab generate`: a video with its sound, or one line and nothing left behind."""

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import small_run
import soundfile
from PIL import Image

from data_prep.talker import draw_talker
from echolab.cli.__main__ import main
from echolab.cli.fit import fit_network
from echolab.data.clips import load_clips


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> small_run.SmallRun:
    return small_run.make(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A drawn talker's first frame, 1.7 s of its voice, and where its face is."""
    folder, drawn = tmp_path_factory.mktemp("talker"), draw_talker(5, 0, frames=45)
    Image.fromarray(drawn.frames[0]).save(folder / "talker.png")
    soundfile.write(folder / "talker.wav", drawn.samples[: int(1.7 * 16_000)], 16_000)
    face = ",".join(f"{value:.1f}" for value in drawn.face[0])
    return folder / "talker.png", folder / "talker.wav", face


def generate(made: small_run.SmallRun, *words: str) -> int:
    """The command with this run's checkpoint and autoencoder, unless the words say otherwise."""
    said = {"checkpoint": str(made.run), "video": str(made.video), "steps": "2"}
    said |= dict(word.split("=", 1) for word in words)
    return main(["generate", *(f"{key}={value}" for key, value in said.items())])


def test_the_video_is_as_long_as_the_sound_and_has_it(
    made: small_run.SmallRun, talker: tuple[Path, Path, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    picture, voice, face = talker
    out = tmp_path / "talking.mp4"
    words = (f"image={picture}", f"audio={voice}", f"out={out}", f"face={face}", "format=json")
    assert generate(made, *words) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == 42  # 1.7 s at 25 frames a second
    with av.open(str(out)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 42 and frames[0].shape == (64, 64, 3)
    with av.open(str(out)) as video:
        sound = np.concatenate([f.to_ndarray() for f in video.decode(audio=0)], axis=1)
    assert np.abs(sound).max() > 0.05


def test_the_same_seed_gives_the_same_video(
    made: small_run.SmallRun, talker: tuple[Path, Path, str], tmp_path: Path
) -> None:
    picture, voice, face = talker
    words = (f"image={picture}", f"audio={voice}", f"face={face}", "seconds=0.5")
    for name in ("a.mp4", "b.mp4"):
        assert generate(made, *words, f"out={tmp_path / name}") == 0
    assert generate(made, *words, f"out={tmp_path / 'c.mp4'}", "seed=1") == 0
    files = [(tmp_path / name).read_bytes() for name in ("a.mp4", "b.mp4", "c.mp4")]
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("image=nothing.png", "nothing.png"),
        ("audio=nothing.wav", "nothing.wav"),
        ("seconds=0.1", "need 0.2 s"),
        ("out=video.avi", ".mp4"),
        ("checkpoint=no/run", "no whole checkpoint"),
        ("face=1,2,3", "four numbers"),
        ("colour=red", "colour"),
    ],
)
def test_bad_input_is_one_line(
    made: small_run.SmallRun, talker: tuple[Path, Path, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], change: str, told: str,
) -> None:  # fmt: skip
    picture, voice, face = talker
    words = (f"image={picture}", f"audio={voice}", f"face={face}", f"out={tmp_path / 'v.mp4'}")
    assert generate(made, *words, change) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("echolab: error:") and told in line
    assert not list(tmp_path.iterdir())


def test_another_autoencoder_is_refused(
    made: small_run.SmallRun, talker: tuple[Path, Path, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = tmp_path / "other.safetensors"
    fit_network("autoencoder", load_clips(made.raw), other, steps=1, seed=9)
    picture, voice, face = talker
    words = (f"image={picture}", f"audio={voice}", f"face={face}", f"out={tmp_path / 'v.mp4'}")
    assert generate(made, *words, f"video={other}") == 1
    assert "trained with the video encoder" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(
    made: small_run.SmallRun, talker: tuple[Path, Path, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    shutil.copytree(made.run, run)
    for weights in run.rglob("ema*.safetensors"):
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    picture, voice, face = talker
    words = (f"image={picture}", f"audio={voice}", f"face={face}", f"out={tmp_path / 'v.mp4'}")
    assert generate(made, *words, f"checkpoint={run}") == 1
    assert "sha256" in capsys.readouterr().err


@pytest.mark.media
@pytest.mark.parametrize(
    ("name", "faces"), [("hallo3_0001.jpg", 1), ("facenet-pytorch_multiface.jpg", 2)]
)
def test_real_pictures(
    made: small_run.SmallRun, talker: tuple[Path, Path, str], media: Path, weights: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, faces: int,
) -> None:  # fmt: skip
    out = tmp_path / "v.mp4"
    words = (f"image={media / 'image' / name}", f"audio={media / 'audio' / 'hallo_1.wav'}",
             f"out={out}", f"weights={weights}", "seconds=1")  # fmt: skip
    code = generate(made, *words)
    if faces == 1:
        assert code == 0 and out.stat().st_size > 1000
    else:
        assert code == 1 and "faces found" in capsys.readouterr().err and not out.exists()


@pytest.mark.media
def test_a_picture_without_a_face_is_refused(
    made: small_run.SmallRun, talker: tuple[Path, Path, str], weights: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    blank = tmp_path / "blank.png"
    Image.fromarray(np.full((200, 300, 3), 130, np.uint8)).save(blank)
    out = tmp_path / "v.mp4"
    words = (f"image={blank}", f"audio={talker[1]}", f"out={out}", f"weights={weights}")
    assert generate(made, *words) == 1
    assert "no face" in capsys.readouterr().err and not out.exists()
