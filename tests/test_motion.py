"""Motion, flicker and mouth scores of clips whose motion is known."""

import drawn
import numpy as np
import pytest
import torch
from scored import RATE, constant_frames, flags_of, noise_frames, scores_of
from torch import Tensor

from echolab.metrics.metric import VideoClip
from echolab.metrics.motion import (
    DarknessOpening,
    Flicker,
    MotionAmount,
    MouthCorrelation,
    SilentMouth,
    inside_pauses,
    loudness_db,
)


def textured(size: int, seed: int) -> np.ndarray:
    """Return a smooth random texture [size, size] in 40 .. 215."""
    import cv2

    coarse = np.random.default_rng(seed).uniform(40, 215, (size // 4, size // 4))
    return cv2.resize(coarse.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)


def moving_square(speed: int, frames: int = 6, size: int = 256, side: int = 96) -> Tensor:
    """Return a textured square that moves to the right over a textured still background."""
    images = []
    for frame in range(frames):
        image = textured(size, 0)
        left = 20 + speed * frame
        image[80 : 80 + side, left : left + side] = textured(side, 1)
        images.append(np.repeat(image.clip(0, 255).astype(np.uint8)[None], 3, 0))
    return torch.from_numpy(np.stack(images))


@pytest.mark.parametrize("speed", [1, 3, 6])
def test_motion_is_the_speed_of_a_moving_square(speed: int) -> None:
    value = scores_of(MotionAmount(1), VideoClip("a", moving_square(speed)))["motion"].value
    assert value == pytest.approx(speed, rel=0.12)


def test_motion_is_measured_at_one_size() -> None:
    """The same video at twice the size has the same motion in units of the card."""
    frames = moving_square(3)
    twice = frames.repeat_interleave(2, -1).repeat_interleave(2, -2)
    small, large = (scores_of(MotionAmount(1), VideoClip("a", f)) for f in (frames, twice))
    assert large["motion"].value == pytest.approx(small["motion"].value, rel=0.02)
    still = scores_of(MotionAmount(1), VideoClip("a", frames[:1].repeat(5, 1, 1, 1)))
    assert still["motion"].value < 0.05


def test_flicker_of_alternating_brightness_is_its_swing() -> None:
    alternating = constant_frames([100, 110] * 6)
    assert scores_of(Flicker(1), VideoClip("a", alternating))["flicker"].value == pytest.approx(10)
    ramp = constant_frames([10 + 4 * k for k in range(12)])
    flicker = scores_of(Flicker(1), VideoClip("a", ramp))["flicker"].value
    assert flicker == pytest.approx(0, abs=1e-5)


def test_flicker_hardly_reacts_to_motion() -> None:
    moving = scores_of(Flicker(1), VideoClip("a", moving_square(3)))["flicker"].value
    assert moving < 0.5
    assert flags_of(Flicker, VideoClip("a", noise_frames(2))) == {"too few frames"}
    assert flags_of(MotionAmount, VideoClip("a", noise_frames(1))) == {"too few frames"}


def test_loudness_is_in_db_of_full_scale() -> None:
    """A full-scale square wave has 0 dB, a sine 3.01 dB less, a tenth of the amplitude 20 dB."""
    time = torch.arange(640) / RATE
    sine = torch.sin(2 * torch.pi * 1000 * time)
    samples = torch.cat([torch.ones(640), sine, 0.1 * torch.ones(640), torch.zeros(640)])
    levels = loudness_db(samples, 5)
    assert levels[:4].tolist() == pytest.approx([0, -3.0103, -20, -120], abs=1e-3)
    assert levels[4].isnan()  # the audio ended
    assert loudness_db(samples, 6, fps=30.0)[:1].tolist() == pytest.approx([0], abs=1e-3)


def test_pauses_exclude_the_frames_next_to_speech() -> None:
    silent = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1], dtype=torch.bool)
    assert inside_pauses(silent, 1).int().tolist() == [1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert inside_pauses(silent, 0).equal(silent)


def talker(opening: list[float]) -> VideoClip:
    """Return a skin-colored clip with a dark mouth of the given opening, and its lip boxes."""
    frames = torch.full((len(opening), 3, 64, 64), 200, dtype=torch.uint8)
    for frame, height in enumerate(opening):
        rows = round(16 * height)
        frames[frame, :, 40 - rows // 2 : 40 + rows - rows // 2, 24:40] = 20
    lips = torch.tensor([20.0, 32.0, 44.0, 48.0]).expand(len(opening), 4)
    return VideoClip("a", frames, lips=lips)


def test_a_mouth_that_moves_in_silence_has_a_higher_score_than_a_closed_one() -> None:
    """The mouth moves in the second half only, in which nobody speaks."""
    speech = torch.cat([0.3 * torch.ones(20 * 640), torch.zeros(30 * 640)])
    moving = talker([0.0] * 20 + [0.0, 1.0] * 15)._replace(samples=speech)
    closed = talker([0.0, 1.0] * 10 + [0.0] * 30)._replace(samples=speech)
    values = [
        scores_of(SilentMouth(1, DarknessOpening()), clip)["silent_mouth_demo"].value
        for clip in (moving, closed)
    ]
    assert values[0] > 5 and values[1] == pytest.approx(0, abs=1e-6)


def test_clips_without_audio_pause_or_face_are_flagged() -> None:
    clip = talker([0.0] * 25)
    silence = torch.zeros(25 * 640)

    def flags(clip: VideoClip) -> set[str]:
        return flags_of(lambda n: SilentMouth(n, DarknessOpening()), clip)

    assert flags(clip) == {"no audio"}
    assert flags(clip._replace(samples=torch.ones(25 * 640))) == {"no pause in the audio"}
    assert flags(clip._replace(samples=torch.full((25 * 640,), torch.nan))) == {
        "no pause in the audio"
    }
    assert flags(clip._replace(samples=silence, lips=None)) == {"no face"}
    lost = torch.full((25, 4), torch.nan)
    assert flags(clip._replace(samples=silence, lips=lost)) == {"no face"}
    assert flags(clip._replace(samples=silence, frames=clip.frames[:1])) == {"too few frames"}
    # Five frames of silence are a pause of five frames.
    few = clip._replace(samples=silence[: 5 * 640], frames=clip.frames[:5])
    assert scores_of(SilentMouth(1, DarknessOpening()), few)["silent_mouth_demo"].value == 0


def test_the_mouth_of_drawn_talkers_follows_their_visemes() -> None:
    clips = drawn.clips(8, first=300)
    assert clips.visemes is not None
    videos = [
        VideoClip(key, pixels.transpose(0, 1), lips=lips, visemes=visemes)
        for key, pixels, lips, visemes in zip(
            clips.keys, clips.pixels, clips.lips, clips.visemes, strict=True
        )
    ]
    true = scores_of(MouthCorrelation(8), *videos)["mouth_corr"]
    assert true.value > 0.8 and true.low > 0.6
    others = [v._replace(visemes=w.visemes) for v, w in zip(videos, videos[1:], strict=False)]
    assert abs(scores_of(MouthCorrelation(7), *others)["mouth_corr"].value) < 0.4
    frozen = videos[0]._replace(frames=videos[0].frames[:1].expand(25, -1, -1, -1))
    assert scores_of(MouthCorrelation(1), frozen)["mouth_corr"].value == 0
    no_visemes = videos[0]._replace(visemes=None)
    assert flags_of(MouthCorrelation, no_visemes) == {"no visemes"}
