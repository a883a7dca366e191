"""Mel-frequency cepstra as SyncNet takes them: python_speech_features with its defaults.

25 ms windows every 10 ms, pre-emphasis 0.97, 512-point spectrum, 26 mel filters, 13 cepstra with
lifter 22, the first replaced by the log energy.  Samples count as 16-bit integers: floats in
[-1, 1] would shift the first cepstrum by 2 ln 32768 and change nothing else, a silent error.
"""

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dct

RATE_HZ, WINDOW, STEP, FFT, FILTERS, CEPSTRA, LIFTER = 16_000, 400, 160, 512, 26, 13, 22

Array = NDArray[np.float64]


def frame_count(samples: int) -> int:
    """How many columns `samples` give."""
    return 1 + max(0, math.ceil((samples - WINDOW) / STEP))


@cache
def mel_filters() -> Array:
    """Triangular filters [26, 257], with corners rounded down to bins of the spectrum."""
    top = 2595 * np.log10(1 + RATE_HZ / 2 / 700)
    hertz = 700 * (10 ** (np.linspace(0, top, FILTERS + 2) / 2595) - 1)
    corners = np.floor((FFT + 1) * hertz / RATE_HZ)
    bins = np.arange(FFT // 2 + 1)
    bank = np.zeros((FILTERS, len(bins)))
    for row, (left, centre, right) in enumerate(
        zip(corners, corners[1:], corners[2:], strict=False)
    ):
        rising = (bins >= left) & (bins < centre)
        falling = (bins >= centre) & (bins < right)
        bank[row, rising] = (bins[rising] - left) / (centre - left)
        bank[row, falling] = (right - bins[falling]) / (right - centre)
    return bank


def mfcc(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cepstra [columns, 13] of sound in [-1, 1] at 16 kHz."""
    sound = np.round(np.asarray(samples, np.float64) * 32768).clip(-32768, 32767)
    sound = np.append(sound[:1], sound[1:] - 0.97 * sound[:-1])
    columns = frame_count(len(sound))
    padded = np.pad(
        sound, (0, (columns - 1) * STEP + WINDOW - min(len(sound), (columns - 1) * STEP + WINDOW))
    )
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::STEP][:columns]
    power = np.abs(np.fft.rfft(windows, FFT)) ** 2 / FFT
    tiny = np.finfo(np.float64).eps
    energy = np.maximum(power.sum(1), tiny)
    bands = np.log(np.maximum(power @ mel_filters().T, tiny))
    cepstra = dct(bands, type=2, axis=1, norm="ortho")[:, :CEPSTRA]
    cepstra *= 1 + LIFTER / 2 * np.sin(np.pi * np.arange(CEPSTRA) / LIFTER)
    cepstra[:, 0] = np.log(energy)
    return cepstra.astype(np.float32)
