"""`echolab generate`: a video with its audio, or one line and no file."""

import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
import small_run
import soundfile
from PIL import Image

from data_prep.draw import draw_talker
from echolab.cli.__main__ import main
from echolab.data.media import write_video
from echolab.inference import generate as module
from echolab.inference.fit import fit_network
from echolab.inference.inputs import load_clips
from echolab.tasks.table import TASKS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> small_run.SmallRun:
    return small_run.make(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Return a talker's first frame, 1.7 s of its voice, and its face box."""
    folder, drawn = tmp_path_factory.mktemp("talker"), draw_talker(5, 0, frames=45)
    Image.fromarray(drawn.frames[0]).save(folder / "talker.png")
    soundfile.write(folder / "talker.wav", drawn.samples[: int(1.7 * 16_000)], 16_000)
    face = ",".join(f"{value:.1f}" for value in drawn.face[0])
    return folder / "talker.png", folder / "talker.wav", face


class Given(NamedTuple):
    """Files of one drawn talker, for every task."""

    image: Path
    last: Path
    source: Path  # 45 frames
    audio: Path  # 42 frames
    face: str
    mouth: str


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder, drawn = tmp_path_factory.mktemp("given"), draw_talker(5, 0, frames=45)
    for name, frame in (("image", 0), ("last", -1)):
        Image.fromarray(drawn.frames[frame]).save(folder / f"{name}.png")
    write_video(folder / "source.mp4", drawn.frames, drawn.samples)
    soundfile.write(folder / "voice.wav", drawn.samples[: int(1.7 * 16_000)], 16_000)
    face, mouth = (
        ",".join(f"{value:.1f}" for value in (*boxes[:, :2].min(0), *boxes[:, 2:].max(0)))
        for boxes in (drawn.face, drawn.lips)
    )
    names = ("image.png", "last.png", "source.mp4", "voice.wav")
    return Given(*(folder / name for name in names), face, mouth)


def words_for(task: str, given: Given) -> list[str]:
    """Return the input arguments of a task."""
    audio, face = f"audio={given.audio}", f"face={given.face}"
    words = {
        "t2v": [],
        "i2v": [f"image={given.image}", audio, face],
        "flf2v": [f"image={given.image}", f"last_image={given.last}", audio, face],
        "avatar_sync": [f"source_video={given.source}", audio, f"box={given.face}"],
        "lip_sync": [f"source_video={given.source}", audio, f"box={given.mouth}"],
        "continuation": [f"source_video={given.source}", audio, face],
    }
    return [f"task={task}", *words[task]]


def frames_in(path: Path) -> np.ndarray:
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


def generate(made: small_run.SmallRun, *words: str) -> int:
    """Run the command with this run's checkpoint and autoencoder unless `words` name others."""
    said = {"checkpoint": str(made.run), "vae": str(made.video), "num_steps": "2"}
    said |= dict(word.split("=", 1) for word in words)
    return main(["generate", *(f"{key}={value}" for key, value in said.items())])


def test_the_video_has_the_audio_and_its_length(
    made: small_run.SmallRun, talker: tuple[Path, Path, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    image, voice, face = talker
    out = tmp_path / "talking.mp4"
    words = (f"image={image}", f"audio={voice}", f"out={out}", f"face={face}", "format=json")
    assert generate(made, *words) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == 42  # 1.7 s at 25 frames a second
    with av.open(str(out)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 42 and frames[0].shape == (64, 64, 3)
    with av.open(str(out)) as video:
        samples = np.concatenate([f.to_ndarray() for f in video.decode(audio=0)], axis=1)
    assert np.abs(samples).max() > 0.05


def test_the_same_seed_gives_the_same_video(
    made: small_run.SmallRun, talker: tuple[Path, Path, str], tmp_path: Path
) -> None:
    image, voice, face = talker
    words = (f"image={image}", f"audio={voice}", f"face={face}", "seconds=0.5")
    for name in ("a.mp4", "b.mp4"):
        assert generate(made, *words, f"out={tmp_path / name}") == 0
    assert generate(made, *words, f"out={tmp_path / 'c.mp4'}", "seed=1") == 0
    files = [(tmp_path / name).read_bytes() for name in ("a.mp4", "b.mp4", "c.mp4")]
    assert files[0] == files[1] != files[2]


def test_sequence_parallel_devices_generate_the_same_video(
    made: small_run.SmallRun, given: Given, tmp_path: Path
) -> None:
    for devices in (1, 2):
        out = f"out={tmp_path / str(devices)}.mp4"
        assert generate(made, *words_for("i2v", given), out, f"devices={devices}") == 0
    alone, shared = frames_in(tmp_path / "1.mp4"), frames_in(tmp_path / "2.mp4")
    assert np.abs(alone.astype(int) - shared).mean() < 0.5  # of 255: sums in another order


@pytest.mark.parametrize("long", ["joint", "chunked"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_generates_a_long_video(
    made: small_run.SmallRun, given: Given, tmp_path: Path, task: str, long: str
) -> None:
    out = tmp_path / "v.mp4"
    words = [*words_for(task, given), f"long_video={long}", "seconds=1.5"]
    assert generate(made, *words, f"out={out}") == 0
    frames = frames_in(out)
    assert frames.shape == (37, 64, 64, 3)
    with av.open(str(out)) as video:
        assert bool(video.streams.audio) is (task != "t2v")


@pytest.mark.parametrize(
    "words",
    [
        ["solver=unipc", "sigma_schedule=wan", "num_steps=3", "cfg=sequential"],
        [
            "solver=dpmpp",
            "guidance_scale=3",
            "negative_prompt=a dog",
            "dynamic_guidance=true",
            "teacache_threshold=0.1",
        ],
        ["preset=preview", "window=25", "overlap=2", "num_steps=3", "crop=head", "size=64"],
        ["preset=flash", "width=96", "height=64", "long_video=chunked", "match_colors=true"],
    ],
    ids=lambda words: words[0],
)
def test_every_solver_and_preset_runs(
    made: small_run.SmallRun, given: Given, tmp_path: Path, words: list[str]
) -> None:
    out = tmp_path / "v.mp4"
    assert generate(made, *words_for("i2v", given), *words, "seconds=0.6", f"out={out}") == 0
    wide = "width=96" in words
    assert frames_in(out).shape == (15, 64, 96 if wide else 64, 3)


def test_every_sampling_argument_changes_the_video(
    made: small_run.SmallRun, given: Given, tmp_path: Path
) -> None:
    def video(*words: str) -> np.ndarray:
        out = tmp_path / "v.mp4"
        assert generate(made, *words_for("i2v", given), "seconds=0.5", *words, f"out={out}") == 0
        return frames_in(out)

    plain = video("num_steps=4")
    for words in (["solver=unipc"], ["audio_guidance_scale=6"], ["flow_shift=8"],
                  ["dynamic_guidance=true"], ["guidance_scale=6", "negative_prompt=red"],
                  ["prompt=something else"]):  # fmt: skip
        assert (video("num_steps=4", *words) != plain).any(), words
    assert (video("num_steps=4", "teacache_threshold=0", "cfg=sequential") == plain).mean() > 0.9


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("flf2v", "last_image=", "task=flf2v: needs last_image="),
        ("lip_sync", "source_video=", "task=lip_sync: needs source_video="),
        ("i2v", "audio=", "task=i2v: needs audio="),
        ("t2v", "image=a.png", "task=t2v: takes no image="),
        ("t2v", "seconds=", "give seconds="),
        ("i2v", "box=1,2,3,4", "takes no box="),
        ("i2v", "task=sing", "task=sing is not one of t2v"),
        ("lip_sync", "audio={source}", "has 45 frames at 25 a second, need 46"),
        ("lip_sync", "source_video={audio}", "give another source_video="),
        ("lip_sync", "source_video=no.mp4", "no.mp4: not there"),
        ("i2v", "window=24", "window=24: must be 4n+1"),
        ("i2v", "overlap=7", "overlap=7"),
        ("i2v", "num_steps=0", "num_steps=0"),
        ("i2v", "width=64", "width= and height= go together"),
        ("i2v", "size=50", "size=50: must be a multiple of 16"),
        ("i2v", "size=16", "size=16 is not a whole number or none, at least 32"),
        ("i2v", "model=echomimicv3_preview", "model= and encoder_dir= go together"),
        ("flf2v", "last_image={wide}", "is 96x64, the first image 64x64"),
    ],
)
def test_arguments_that_do_not_go_together_give_one_line(
    made: small_run.SmallRun, given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    task: str, change: str, message: str,
) -> None:  # fmt: skip
    wide = tmp_path / "wide.png"
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(wide)
    key, value = change.split("=", 1)
    words = dict(word.split("=", 1) for word in words_for(task, given))
    words |= {"seconds": "0.4"} if task == "t2v" else {}
    words[key] = value.format(source=given.source, audio=given.audio, wide=wide)
    if message.endswith("need 46"):
        long = tmp_path / "long.wav"
        soundfile.write(long, np.zeros(46 * 640), 16_000)
        words["audio"] = str(long)
    said = [f"{name}={word}" for name, word in words.items() if word]
    assert generate(made, *said, f"out={tmp_path / 'v.mp4'}") == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("echolab: error:") and message in line
    assert not (tmp_path / "v.mp4").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("image=nothing.png", "nothing.png"),
        ("audio=nothing.wav", "nothing.wav"),
        ("seconds=0.1", "need 0.2 s"),
        ("out=video.avi", ".mp4"),
        ("checkpoint=no/run", "checkpoint=no/run: not there"),
        ("face=1,2,3", "four numbers"),
        ("colour=red", "colour"),
        ("grid=wan", "did you mean sigma_schedule=...?"),
        ("video=v.mp4", "did you mean source_video=... or vae=...?"),
        ("audio_scale=2", "did you mean audio_guidance_scale=...?"),
        ("solver=eular", "did you mean euler?"),
    ],
)
def test_bad_input_gives_one_line(
    made: small_run.SmallRun, talker: tuple[Path, Path, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], change: str, message: str,
) -> None:  # fmt: skip
    image, voice, face = talker
    words = (f"image={image}", f"audio={voice}", f"face={face}", f"out={tmp_path / 'v.mp4'}")
    assert generate(made, *words, change) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("echolab: error:") and message in line
    assert not list(tmp_path.iterdir())


def test_another_autoencoder_is_refused(
    made: small_run.SmallRun, talker: tuple[Path, Path, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = tmp_path / "other.safetensors"
    fit_network("autoencoder", load_clips(made.raw), other, steps=1, seed=9)
    image, voice, face = talker
    words = (f"image={image}", f"audio={voice}", f"face={face}", f"out={tmp_path / 'v.mp4'}")
    assert generate(made, *words, f"vae={other}") == 1
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
    image, voice, face = talker
    words = (f"image={image}", f"audio={voice}", f"face={face}", f"out={tmp_path / 'v.mp4'}")
    assert generate(made, *words, f"checkpoint={run}") == 1
    assert "sha256" in capsys.readouterr().err


@pytest.mark.media
@pytest.mark.parametrize(
    ("name", "faces"), [("hallo3_0001.jpg", 1), ("facenet-pytorch_multiface.jpg", 2)]
)
def test_real_images_are_animated(
    made: small_run.SmallRun, talker: tuple[Path, Path, str], media: Path, weights: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, faces: int,
) -> None:  # fmt: skip
    out = tmp_path / "v.mp4"
    words = (f"image={media / 'image' / name}", f"audio={media / 'audio' / 'hallo_1.wav'}",
             f"out={out}", f"face_models={weights}", "seconds=1")  # fmt: skip
    code = generate(made, *words)
    if faces == 1:
        assert code == 0 and out.stat().st_size > 1000
    else:
        assert code == 1 and "faces in it" in capsys.readouterr().err and not out.exists()


@pytest.mark.media
def test_an_image_without_a_face_is_refused(
    made: small_run.SmallRun, talker: tuple[Path, Path, str], weights: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    blank = tmp_path / "blank.png"
    Image.fromarray(np.full((200, 300, 3), 130, np.uint8)).save(blank)
    out = tmp_path / "v.mp4"
    words = (f"image={blank}", f"audio={talker[1]}", f"out={out}", f"face_models={weights}")
    assert generate(made, *words) == 1
    assert "no face" in capsys.readouterr().err and not out.exists()


@pytest.mark.media
@pytest.mark.parametrize(
    ("task", "name", "message"),
    [
        ("lip_sync", "th_infinitetalk.mp4", ""),
        ("avatar_sync", "hb_wan_animate.mp4", ""),
        ("continuation", "grid_bbaf2n.mpg", ""),
        ("lip_sync", "noface_dog.mp4", "no face is in all 20 frames"),
    ],
)
def test_faces_of_real_videos_are_tracked(
    made: small_run.SmallRun, given: Given, media: Path, weights: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], task: str, name: str, message: str,
) -> None:  # fmt: skip
    out = tmp_path / "v.mp4"
    words = (f"source_video={media / 'video' / name}", f"audio={given.audio}", "seconds=0.8")
    code = generate(made, f"task={task}", *words, f"face_models={weights}", f"out={out}")
    if message:
        assert code == 1 and message in capsys.readouterr().err and not out.exists()
    else:
        assert code == 0 and frames_in(out).shape == (20, 64, 64, 3)


@pytest.mark.parametrize("long", ["joint", "chunked"])
@pytest.mark.parametrize("task", ["lip_sync", "avatar_sync"])
def test_a_local_task_keeps_the_pixels_of_the_source_outside_its_mask(
    made: small_run.SmallRun, given: Given, tmp_path: Path, task: str, long: str
) -> None:
    """The pixels are equal up to the codec; without pasting the network's pixels differ."""
    source = frames_in(given.source)[:37].astype(int)
    errors = []
    for paste in ("true", "false"):
        out = tmp_path / f"{paste}.mp4"
        words = [
            *words_for(task, given),
            f"long_video={long}",
            "seconds=1.5",
            f"paste_known={paste}",
        ]
        words = [word for word in words if not word.startswith("box=")] + ["box=24,20,40,44"]
        assert generate(made, *words, "crop=frame", f"out={out}") == 0
        frames = frames_in(out).astype(int)
        errors.append(np.abs(frames - source)[:, :, :6].mean())  # outside of the regenerated part
    assert errors[0] < 2 and errors[1] > 2 * errors[0]


@pytest.mark.parametrize(
    "output", ["missing/deep/v.mp4", "file/v.mp4", "folder.mp4", f"{'x' * 260}.mp4"]
)
def test_the_output_path_is_checked_before_the_work(
    made: small_run.SmallRun, given: Given, tmp_path: Path, output: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    done: list[str] = []
    monkeypatch.setattr(module, "load_models", lambda *_: done.append("weights") or sys.exit(9))
    if output.startswith("missing"):  # the folder is made
        with pytest.raises(SystemExit):
            generate(made, *words_for("i2v", given), f"out={tmp_path / output}")
        assert done == ["weights"] and (tmp_path / output).parent.is_dir()
        return
    assert generate(made, *words_for("i2v", given), f"out={tmp_path / output}") == 1
    said = capsys.readouterr().err
    assert done == [] and said.count("\n") == 1 and f"{tmp_path / output}: " in said


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("i2v", "image={folder}/none.png"),
        ("i2v", "image={folder}/voice.wav"),
        ("flf2v", "last_image={folder}/none.png"),
        ("lip_sync", "source_video={folder}/none.mp4"),
        ("continuation", "source_video={folder}/image.png"),
        ("i2v", "audio={folder}/none.wav"),
        ("i2v", "audio={folder}/image.png"),
        ("i2v", "face=1,1,0,0"),
        ("i2v", "num_steps=0"),
        ("i2v", "flow_shift=0"),
        ("i2v", "flow_shift=-1"),
        ("i2v", "seed=-1"),
        ("i2v", "audio_guidance_scale=nan"),
        ("i2v", "negative_prompt=ugly"),
        ("i2v", "negative_steps=3"),
        ("i2v", "wav2vec=folder"),
        ("t2v", "face=0,0,9,9"),
    ],
)
def test_inputs_are_checked_before_weights_are_read(
    made: small_run.SmallRun, given: Given, tmp_path: Path, task: str, change: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def no_weights(*_: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(module, "load_models", no_weights)
    words = [*words_for(task, given), "seconds=0.5", change.format(folder=given.image.parent)]
    assert generate(made, *words, f"out={tmp_path / 'v.mp4'}") == 1
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "v.mp4").exists()


def test_a_face_is_detected_before_weights_are_read(
    made: small_run.SmallRun, given: Given, tmp_path: Path, weights: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "load_models", lambda *_: sys.exit(9))
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "blue.png")
    words = [f"image={tmp_path / 'blue.png'}", f"audio={given.audio}", f"face_models={weights}"]
    assert generate(made, *words, f"out={tmp_path / 'v.mp4'}") == 1
    assert "no face in it, need 1; give another image, or face=" in capsys.readouterr().err


def test_a_negative_prompt_needs_text_guidance(
    made: small_run.SmallRun, given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *words_for("i2v", given),
        "seconds=0.3",
        f"out={tmp_path / 'v.mp4'}",
        "negative_prompt=ugly",
    ]
    assert generate(made, *words) == 1
    said = capsys.readouterr().err
    assert "negative_prompt=ugly: does nothing without text guidance" in said
    assert "give guidance_scale=4" in said
    assert generate(made, *words, "guidance_scale=4") == 0
