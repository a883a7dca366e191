"""Synthetic talkers: reproducible, with audio, lips and boxes that agree."""

from pathlib import Path

import drawn
import numpy as np
import pytest

from data_prep import synthetic_voice
from data_prep.draw import (
    MOUTH_CENTER,
    Look,
    Motion,
    Talker,
    box_around,
    draw_dataset,
    draw_frame,
    draw_look,
    draw_motion,
    draw_talker,
)
from data_prep.options import DrawOptions
from data_prep.synthetic_voice import CONTROL_HZ, PAUSE, VOWELS, control_curves, glide, synthesize
from echolab.data.media import encode_flac
from echolab.data.shard_reader import open_dataset
from echolab.data.shard_writer import ShardWriter
from echolab.errors import ConfigError, DataError
from echolab.inference.inputs import load_clips


def correlation_at(first: np.ndarray, second: np.ndarray, delay: int) -> float:
    """Return the correlation of two curves, the second shifted by `delay`."""
    count = len(first)
    a = first[max(0, -delay) : count - max(0, delay)]
    b = second[max(0, delay) : count - max(0, -delay)]
    return float(np.corrcoef(a, b)[0, 1])


def test_a_talker_is_a_pure_function_of_seed_and_index() -> None:
    np.random.seed(1)
    one = draw_talker(7, 3, frames=9, size=32)
    np.random.seed(2)
    draw_talker(7, 4, frames=9, size=32)
    again = draw_talker(7, 3, frames=9, size=32)
    assert one.look == again.look
    for name in set(Talker._fields) - {"look"}:
        assert np.array_equal(getattr(one, name), getattr(again, name)), name
    for other in (draw_talker(8, 3, frames=9, size=32), draw_talker(7, 4, frames=9, size=32)):
        assert not np.array_equal(one.frames, other.frames)
        assert not np.array_equal(one.samples, other.samples)


def test_shapes_and_ranges() -> None:
    talker = draw_talker(0, 0, frames=13, size=48)
    assert talker.frames.shape == (13, 48, 48, 3) and talker.frames.dtype == np.uint8
    assert talker.samples.shape == (13 * 640,) and talker.samples.dtype == np.float32
    assert talker.face.shape == talker.lips.shape == (13, 4)
    assert np.abs(talker.samples).max() <= 1
    for curve in (talker.opening, talker.width):
        assert curve.shape == (13,) and curve.min() >= 0 and curve.max() <= 1


def test_the_image_size_changes_neither_voice_nor_visemes() -> None:
    small, large = (draw_talker(2, 5, frames=9, size=size) for size in (32, 64))
    assert np.array_equal(small.samples, large.samples)
    assert np.array_equal(small.opening, large.opening)
    np.testing.assert_allclose(2 * small.lips, large.lips, rtol=1e-5)


def test_open_mouths_are_loud_and_no_delay_fits_better_than_none() -> None:
    delays = range(-5, 6)
    fit = [
        np.mean([correlation_at(t.opening, drawn.loudness(t), d) for t in drawn.talkers(24)])
        for d in delays
    ]
    assert max(fit) == fit[delays.index(0)] > 0.6
    # A half-frame slip would lift one neighbour well above the other.
    assert abs(fit[delays.index(1)] - fit[delays.index(-1)]) < 0.2


def test_a_closed_mouth_has_no_voice() -> None:
    pause = control_curves([(PAUSE, 1.0)], 1.0)
    assert pause["opening"].max() == pause["voice"].max() == pause["hiss"].max() == 0
    vowel = control_curves([(VOWELS["a"], 1.0)], 1.0)
    assert vowel["opening"].min() == pytest.approx(1)
    assert vowel["formant_1"].mean() == pytest.approx(730)


@pytest.mark.parametrize("name", ["a", "i", "u"])
def test_a_vowel_has_its_energy_at_its_formants(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        synthetic_voice, "draw_phones", lambda rng, seconds: [(VOWELS[name], seconds)]
    )
    power = np.mean(
        [np.abs(np.fft.rfft(synthesize(np.random.default_rng(n), 1.0).samples)) ** 2
         for n in range(8)], axis=0,
    )  # fmt: skip
    loudest = int(power.argmax())  # in Hz, as the audio lasts one second
    first = VOWELS[name].formants[0]
    assert 0.6 * first < loudest < 1.6 * first  # the tract's length and the harmonics' grid


def test_glide_keeps_constants_steps_sides_and_length() -> None:
    step = np.repeat([0.0, 1.0], 50)
    smooth = glide(step)
    assert len(smooth) == 100 and np.all(np.diff(smooth) >= -1e-12)
    np.testing.assert_allclose(smooth, 1 - smooth[::-1], atol=1e-12)  # no delay
    np.testing.assert_allclose(glide(np.full(30, 0.4)), 0.4)
    reach = int(synthetic_voice.GLIDE_SECONDS * CONTROL_HZ)
    assert smooth[49 - reach] == 0 and smooth[50 + reach] == pytest.approx(1)


def still(rng: np.random.Generator) -> tuple[Look, Motion]:
    return draw_look(rng), draw_motion(rng, 9)


@pytest.mark.parametrize("number", range(6))
def test_the_lip_box_holds_the_mouth_at_its_widest_and_little_else(number: int) -> None:
    """The widest mouth changes pixels of its box alone, and reaches near its sides."""
    look, motion = still(np.random.default_rng(number))
    changed, size = np.zeros((96, 96), bool), 96
    shut, pen = draw_frame(size, look, motion, 4, 0.0, 0.0)
    for opening, width in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
        image, pen = draw_frame(size, look, motion, 4, opening, width)
        changed |= np.abs(image.astype(int) - shut).max(-1) > 0
    turn = float(motion.turn[4])
    x, y = MOUTH_CENTER
    left, top, right, bottom = box_around(pen, x + turn, y, 0.42, 0.33)
    rows, columns = np.nonzero(changed)
    assert left - 1 <= columns.min() and columns.max() <= right + 1  # the edge is smoothed
    assert top - 1 <= rows.min() and rows.max() <= bottom + 1
    assert columns.max() - columns.min() > 0.8 * (right - left)
    assert rows.max() - rows.min() > 0.8 * (bottom - top)


def test_the_lip_box_is_in_the_face_box_and_that_in_the_image() -> None:
    for talker in drawn.talkers(16):
        assert np.all(talker.face[:, :2] <= talker.lips[:, :2])
        assert np.all(talker.lips[:, 2:] <= talker.face[:, 2:])
        assert talker.lips.min() > 0 and talker.lips.max() < 64
        sides = talker.face[:, 2:] - talker.face[:, :2]
        assert np.all(sides > 24) and np.all(sides < 64)


def test_a_caption_describes_the_talker() -> None:
    captions = {talker.look.caption() for talker in drawn.talkers(16)}
    assert len(captions) > 12
    look = drawn.talkers(16)[0].look
    for word in (look.skin, look.hair, look.eyes, look.shirt, look.wall):
        assert word in look.caption()
    assert ("glasses" in look.caption()) is look.glasses


def test_a_dataset_holds_the_synthetic_talkers(tmp_path: Path) -> None:
    options = DrawOptions(tmp_path / "one", num_clips=3, seed=9, first=2, frames=9, size=32)
    progress: list[int] = []
    draw_dataset(options, progress.append)
    assert progress == [1, 2, 3]
    clips = load_clips(options.out)
    assert clips.keys == [f"talker_9_{number:06d}" for number in (2, 3, 4)]
    for index, number in enumerate((2, 3, 4)):
        talker = draw_talker(9, number, frames=9, size=32)
        seen = clips.pixels[index].permute(1, 2, 3, 0).numpy().astype(float)
        assert np.abs(seen - talker.frames).mean() < 8  # H.264 stands between
        np.testing.assert_allclose(clips.samples[index], talker.samples, atol=1e-4)
        np.testing.assert_array_equal(clips.lips[index], talker.lips)
        assert clips.visemes is not None
        np.testing.assert_array_equal(clips.visemes[index, :, 0], talker.opening)
        assert clips.metadata[index]["caption"] == talker.look.caption()
        assert clips.metadata[index]["number"] == number


def test_the_same_seed_gives_the_same_dataset(tmp_path: Path) -> None:
    for name in ("one", "two"):
        draw_dataset(
            DrawOptions(tmp_path / name, num_clips=2, frames=5, size=32), lambda done: None
        )
    one, two = (open_dataset(tmp_path / name) for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint


@pytest.mark.parametrize(
    ("wrong", "number"),
    [({"num_clips": 0}, "num_clips=0"), ({"frames": 24}, "frames=24"), ({"frames": 1}, "frames=1"),
     ({"size": 40}, "size=40"), ({"size": 16}, "size=16")],
)  # fmt: skip
def test_sizes_that_the_network_does_not_support_are_refused(
    wrong: dict[str, int], number: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=number):
        draw_dataset(DrawOptions(tmp_path / "out", **wrong), lambda done: None)
    assert not (tmp_path / "out").exists()


def test_clips_of_other_kinds_and_sizes_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "encoded", kind="encoded") as writer:
        writer.write("a", {"safetensors": b""})
    with pytest.raises(DataError, match="raw kind"):
        load_clips(tmp_path / "encoded")

    with ShardWriter(tmp_path / "mixed", kind="raw") as writer:
        for size in (32, 48):
            options = DrawOptions(tmp_path / str(size), num_clips=1, seed=size, frames=5, size=size)
            draw_dataset(options, lambda done: None)
            source = open_dataset(options.out)
            writer.write(source.keys[0], source.read(0))
    with pytest.raises(DataError, match=r"talker_48_000000 is .*frames= and one size="):
        load_clips(tmp_path / "mixed")

    with pytest.raises(DataError, match="0 of its 1 clips"):
        load_clips(tmp_path / "32", 0)
    with ShardWriter(tmp_path / "mute", kind="raw") as writer:
        cut = {**open_dataset(tmp_path / "32").read(0), "flac": encode_flac(np.zeros(9, "f4"))}
        writer.write("a", cut)
    with pytest.raises(DataError, match="clip a has 9 audio samples, 5 frames need 3200"):
        load_clips(tmp_path / "mute")
