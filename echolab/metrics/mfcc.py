"""Mel-frequency cepstra of audio, as python_speech_features computes them for SyncNet."""

import math
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import dct
from torch import Tensor

from echolab.types import Clips

# Defaults of python_speech_features, used to train SyncNet; lengths in samples.
SAMPLE_RATE, MFCC_WINDOW, MFCC_HOP, FFT, FILTERS, CEPSTRA, LIFTER = (
    16_000,
    400,
    160,
    512,
    26,
    13,
    22,
)
Array = NDArray[np.float64]


def frame_count(samples: int) -> int:
    """Return the number of MFCC columns of `samples` samples."""
    return 1 + max(0, math.ceil((samples - MFCC_WINDOW) / MFCC_HOP))


@cache
def mel_filters() -> Array:
    """Return triangular filters [26, 257], with corners rounded down to spectrum bins."""
    # Corners are equally spaced in mel.
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    # Convert the corners to the next lower bin of the spectrum.
    hertz = 700 * (10 ** (np.linspace(0, top, FILTERS + 2) / 2595) - 1)
    corners = np.floor((FFT + 1) * hertz / SAMPLE_RATE)
    # Each triangle begins and ends at the peaks of its neighbors.
    bins = np.arange(FFT // 2 + 1)
    bank = np.zeros((FILTERS, len(bins)))
    for row, (left, center, right) in enumerate(
        zip(corners, corners[1:], corners[2:], strict=False)
    ):
        rising = (bins >= left) & (bins < center)
        falling = (bins >= center) & (bins < right)
        bank[row, rising] = (bins[rising] - left) / (center - left)
        bank[row, falling] = (right - bins[falling]) / (right - center)
    return bank


def mfcc(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the mel-frequency cepstra [columns, 13] of samples in [-1, 1] at 16 kHz.

    The result equals python_speech_features with its defaults: 25 ms windows every 10 ms,
    pre-emphasis 0.97, 512-point spectrum, 26 mel filters, 13 cepstra with lifter 22, the first
    replaced by the log energy.  Samples are scaled to 16-bit integers: floats in [-1, 1] would
    silently shift the first cepstrum by 2 ln 32768.
    """
    # Apply pre-emphasis to 16-bit samples.
    audio = np.round(np.asarray(samples, np.float64) * 32768).clip(-32768, 32767)
    audio = np.append(audio[:1], audio[1:] - 0.97 * audio[:-1])
    columns = frame_count(len(audio))
    # Power spectrum of the windows.
    length = (columns - 1) * MFCC_HOP + MFCC_WINDOW
    padded = np.pad(audio, (0, length - min(len(audio), length)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, MFCC_WINDOW)[::MFCC_HOP][:columns]
    power = np.abs(np.fft.rfft(windows, FFT)) ** 2 / FFT
    # Log mel energies, DCT and lifter.
    tiny = np.finfo(np.float64).eps
    energy = np.maximum(power.sum(1), tiny)
    bands = np.log(np.maximum(power @ mel_filters().T, tiny))
    cepstra = dct(bands, type=2, axis=1, norm="ortho")[:, :CEPSTRA]
    cepstra *= 1 + LIFTER / 2 * np.sin(np.pi * np.arange(CEPSTRA) / LIFTER)
    # The first cepstrum is the energy of the window.
    cepstra[:, 0] = np.log(energy)
    return cepstra.astype(np.float32)


def cepstra_of(clips: Clips) -> Tensor:
    """Return the cepstra [N, columns, 13] of clips."""
    return torch.from_numpy(np.stack([mfcc(samples.numpy()) for samples in clips.samples]))
