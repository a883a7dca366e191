"""Scores of generated clips: FID and FVD, lip sync, PSNR, mouth opening.

Sync and mouth opening are measured in one lip box per clip, that of the reference image, because a
generated head may move differently from the true head.  FID and FVD compare with clips of the
training set, so the held-out ground truth has scores above zero.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import dct
from torch import Tensor
from torch.nn import functional

from echolab.errors import DataError
from echolab.metrics.demo_networks import (
    FRAMES_PER_WINDOW,
    ClipFeatures,
    FrameFeatures,
    SyncNetDemo,
    correlation,
    crop_lips,
    mouth_darkness,
)
from echolab.types import Clips

MAX_SHIFT = 8  # frames; the original's 15 would leave only 5 of the 20 windows of one second
BATCH = 16  # clips
PERFECT_PSNR = 100.0  # dB, for equal images

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


# -- Frechet distance ------------------------------------------------------------------------------


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the Frechet distance between the Gaussian fits of features [N, D] and [M, D].

        FD = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

    With centered features A and B divided by sqrt(n - 1), S1 = A^T A and S2 = B^T B, and the trace
    of the root is the nuclear norm of A B^T.  No matrix root is needed: the distance is never
    imaginary or negative, and it is exact also with fewer samples than features.  Covariances are
    unbiased (n - 1), as in pytorch-fid.  Raise ValueError for less than two samples.
    """
    if len(first) < 2 or len(second) < 2:
        raise ValueError(f"a covariance needs 2 samples, got {len(first)} and {len(second)}")
    a, b = (_centered(features.double()) for features in (first, second))
    shift = (first.double().mean(0) - second.double().mean(0)).square().sum()
    cross = torch.linalg.matrix_norm(a @ b.T, ord="nuc")
    return float((shift + a.square().sum() + b.square().sum() - 2 * cross).clamp(min=0))


def _centered(features: Tensor) -> Tensor:
    return (features - features.mean(0)) / (len(features) - 1) ** 0.5


# -- cepstra ---------------------------------------------------------------------------------------


def frame_count(samples: int) -> int:
    """Return the number of MFCC columns of `samples` samples."""
    return 1 + max(0, math.ceil((samples - MFCC_WINDOW) / MFCC_HOP))


@cache
def mel_filters() -> Array:
    """Return triangular filters [26, 257], with corners rounded down to spectrum bins."""
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    hertz = 700 * (10 ** (np.linspace(0, top, FILTERS + 2) / 2595) - 1)
    corners = np.floor((FFT + 1) * hertz / SAMPLE_RATE)
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
    cepstra[:, 0] = np.log(energy)
    return cepstra.astype(np.float32)


# -- Sync-C and Sync-D -----------------------------------------------------------------------------
#
# SyncNet's published scores of lip sync, for embeddings V (lips) and A (audio):
#
#     d(i, j) = |V_i - A_(i + j)|,  j = -s .. s
#     D(j)    = mean over i of d(i, j)
#     Sync-D  = min D,  Sync-C = median D - min D,  offset = -argmin
#
# Window i is frames i .. i + 4 with cepstra 4 i .. 4 i + 19.  A positive offset means that the
# audio is early.  The original pads A with zeros at both ends; on short clips the padding itself
# increases confidence (over 20 for 20 unrelated windows).  Therefore use the padded form to compare
# with published numbers, and the unpadded form for clips of a few seconds.


class Sync(NamedTuple):
    """The sync scores of one clip."""

    confidence: float
    distance: float
    offset: int  # in frames
    windows: int


def window_count(frames: int, samples: int) -> int:
    """Return the number of windows of a clip, one less than possible, as in the original."""
    return min(frames, samples // 640) - FRAMES_PER_WINDOW


def padded_distances(visual: Tensor, audio: Tensor, max_shift: int) -> Tensor:
    """Return D(j), [2 s + 1], of embeddings [L, D], with zero-padded audio."""
    padded = functional.pad(audio, (0, 0, max_shift, max_shift))
    shifted = padded.unfold(0, 2 * max_shift + 1, 1).transpose(1, 2)  # [L, 2 s + 1, D]
    return (visual[:, None] - shifted + 1e-6).norm(dim=-1).mean(0)


def unpadded_distances(visual: Tensor, audio: Tensor, max_shift: int) -> Tensor:
    """Return D(j), [2 s + 1], averaged only over windows that have audio at shift j.

    Raise ValueError unless there are more windows than the largest shift.
    """
    count = len(visual)
    if count <= max_shift:
        raise ValueError(f"{count} windows, need more than the largest shift, {max_shift}")
    means = []
    for shift in range(-max_shift, max_shift + 1):
        first, last = max(0, -shift), min(count, count - shift)
        means.append((visual[first:last] - audio[first + shift : last + shift]).norm(dim=-1).mean())
    return torch.stack(means)


def sync_score(distances: Tensor, windows: int) -> Sync:
    """Compute Sync-C, Sync-D and the offset from D(j)."""
    lowest, index = distances.min(0)
    offset = (len(distances) - 1) // 2 - int(index)
    median = distances.quantile(0.5)
    return Sync(float(median - lowest), float(lowest), offset, windows)


# -- all scores ------------------------------------------------------------------------------------


class Judges(NamedTuple):
    """Networks that compute the scores, and the features of real clips for comparison."""

    sync: SyncNetDemo
    frame: FrameFeatures
    clip: ClipFeatures
    real_frames: Tensor  # [N, D]
    real_clips: Tensor  # [M, D]


def cepstra_of(clips: Clips) -> Tensor:
    """Return the cepstra [N, columns, 13] of clips."""
    return torch.from_numpy(np.stack([mfcc(samples.numpy()) for samples in clips.samples]))


@torch.no_grad()
def sync_of(net: SyncNetDemo, pixels: Tensor, boxes: Tensor, cepstra: Tensor) -> list[Sync]:
    """Return the sync scores of clips [B, 3, T, Y, X] in [-1, 1] and audio, at lip boxes [B, 4].

    Raise DataError for clips that are too short.
    """
    lips = net.embed_lips(crop_lips(pixels, boxes))
    audio = net.embed_audio(cepstra)
    windows = min(lips.shape[1], audio.shape[1])
    if windows <= MAX_SHIFT:
        raise DataError(
            f"clips of {pixels.shape[2]} frames have {windows} windows of sync, need more than "
            f"{MAX_SHIFT}; prepare them with frames=17 or more"
        )
    lips, audio = lips[:, :windows], audio[:, :windows]
    return [
        sync_score(unpadded_distances(clip_lips, clip_audio, MAX_SHIFT), windows)
        for clip_lips, clip_audio in zip(lips, audio, strict=True)
    ]


@torch.no_grad()
def features_of(frame: FrameFeatures, clip: ClipFeatures, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return features of every fourth frame and of each clip, for [N, 3, T, Y, X] in [-1, 1]."""
    frames, clips = [], []
    for part in pixels.split(BATCH):
        frames.append(frame(part[:, :, ::4].transpose(1, 2).flatten(0, 1)))
        clips.append(clip(part))
    return torch.cat(frames), torch.cat(clips)


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio [B] in dB of images [B, ...] in [-1, 1]."""
    error = (first - second).flatten(1).square().mean(1)
    return (10 * torch.log10(4 / error.clamp(min=1e-12))).clamp(max=PERFECT_PSNR)


def score_clips(judges: Judges, pixels: Tensor, truth: Clips, cepstra: Tensor) -> dict[str, float]:
    """Return all scores of clips [N, 3, T, Y, X] in [-1, 1], generated for the audio of `truth`.

    `cepstra` are the MFCCs of the audio that is played with each clip.
    """
    boxes = truth.lips[:, 0]
    syncs = sync_of(judges.sync, pixels, boxes, cepstra)
    frames, clips = features_of(judges.frame, judges.clip, pixels)
    scores = {
        "sync_c_demo": float(np.mean([sync.confidence for sync in syncs])),
        "sync_d_demo": float(np.mean([sync.distance for sync in syncs])),
        "fid_demo": frechet_distance(frames, judges.real_frames),
        "fvd_demo": frechet_distance(clips, judges.real_clips),
        "psnr_first_frame": float(psnr(pixels[:, :, 0], truth.float_pixels()[:, :, 0]).mean()),
    }
    if truth.visemes is not None:
        opening, target = mouth_darkness(pixels, boxes).numpy(), truth.visemes[..., 0].numpy()
        correlations = [correlation(a, b) for a, b in zip(opening, target, strict=True)]
        scores["mouth_corr"] = float(np.mean(correlations))
    return scores
