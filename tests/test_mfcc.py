"""Cepstra: the reference program's numbers, and mistakes that would stay silent."""

import math
from pathlib import Path

import numpy as np
import pytest

from echolab.data.media import read_audio
from echolab.metrics.mfcc import frame_count, mel_filters, mfcc


def noise(count: int, scale: float = 0.1) -> np.ndarray:
    return (scale * np.random.default_rng(0).standard_normal(count)).astype(np.float32)


@pytest.mark.parametrize(
    ("samples", "columns"),
    [(1, 1), (400, 1), (401, 2), (560, 2), (561, 3), (16_000, 99), (64_000, 399)],
)
def test_audio_has_a_column_for_every_ten_milliseconds(samples: int, columns: int) -> None:
    assert frame_count(samples) == columns
    assert mfcc(noise(samples)).shape == (columns, 13)


@pytest.mark.media
def test_cepstra_equal_those_of_the_reference_program(media: Path) -> None:
    """python_speech_features gets the audio of a real clip; ffmpeg's resampler is in between."""
    golden = np.load(media / "syncnet_golden_seed1000.npz", allow_pickle=False)["mfcc"]
    cepstra = mfcc(read_audio(media / "video" / "th_lrs3_crop224.mp4"))
    assert cepstra.shape == (1573, 13)
    difference = np.abs(cepstra[: len(golden)] - golden)
    assert difference.max() < 0.1 and difference.mean() < 0.005


def test_the_scale_of_the_samples_moves_the_log_energy_alone() -> None:
    """The silent error: audio in [-1, 1] taken for integers would miss 2 ln 32768 = 20.79."""
    loud = np.round(noise(16_000) * 512) / 512  # integers, also when divided by 64
    quiet = loud / 64
    shift = mfcc(loud.astype(np.float32)) - mfcc(quiet.astype(np.float32))
    np.testing.assert_allclose(shift[:, 0], 2 * math.log(64), atol=1e-3)
    np.testing.assert_allclose(shift[:, 1:], 0, atol=1e-3)


def test_samples_count_as_integers() -> None:
    """The log energy is that of a constant 1 of 32768, pre-emphasized: 1, 0.03, 0.03, ..."""
    cepstra = mfcc(np.full(400, 1 / 32768, np.float32))[0, 0]
    emphasised = np.r_[1.0, np.full(399, 0.03)]
    energy = (np.abs(np.fft.rfft(emphasised, 512)) ** 2 / 512).sum()
    assert cepstra == pytest.approx(math.log(energy), abs=1e-5)


def test_full_scale_audio_keeps_its_sign() -> None:
    """+1 has no 16-bit integer; it must not become -32768."""
    square = np.where(np.arange(1600) // 40 % 2, 1.0, -1.0).astype(np.float32)
    np.testing.assert_allclose(mfcc(square), mfcc(square * 0.9999), atol=0.01)


def test_silence_is_finite_and_later_audio_changes_no_earlier_column() -> None:
    assert np.isfinite(mfcc(np.zeros(3200, np.float32))).all()
    audio = np.concatenate([np.zeros(1600, np.float32), noise(1600)])
    cepstra = mfcc(audio)
    silent = 1 + (1600 - 400) // 160  # columns that end before the audio begins
    assert np.ptp(cepstra[:silent], axis=0).max() == 0
    assert cepstra[silent + 1, 0] > cepstra[0, 0] + 10


def test_a_delay_of_ten_milliseconds_is_one_column() -> None:
    audio = noise(8000)
    late = np.concatenate([np.zeros(160, np.float32), audio])
    np.testing.assert_allclose(mfcc(late)[2:-3], mfcc(audio)[1:-3], atol=1e-3)


def test_filters_are_adjoining_triangles() -> None:
    bank = mel_filters()
    assert bank.shape == (26, 257) and bank.min() == 0 and bank.max() == 1
    peaks = bank.argmax(1)
    assert np.all(np.diff(peaks) > 0)
    inside = bank[:, peaks[0] : peaks[-1] + 1].sum(0)
    np.testing.assert_allclose(inside, 1, atol=1e-9)
