"""A synthetic voice with known lip shapes: syllables of vowels, closures, hisses and pauses.

Two functions of time drive the lips: opening and width of the mouth, both in [0, 1].  Audio and
lip curves come from one sequence of phones (closures silence the voice), so that audio and video
are in sync by construction.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RATE_HZ = 16_000
CONTROL_HZ = 200
GLIDE_SECONDS = 0.045  # half-width of the transition of lips and formants between two targets

Array = NDArray[np.float64]


class Phone(NamedTuple):
    """One speech sound: lip targets, formants in Hz, levels of voice and hiss."""

    opening: float
    width: float
    formants: tuple[float, float, float]
    voice: float
    hiss: float


# Formants after Peterson and Barney (1952), men's averages, rounded.
VOWELS = {
    "a": Phone(1.00, 0.55, (730, 1090, 2440), 1.0, 0.0),
    "e": Phone(0.55, 0.80, (530, 1840, 2480), 0.9, 0.0),
    "i": Phone(0.28, 1.00, (270, 2290, 3010), 0.8, 0.0),
    "o": Phone(0.70, 0.20, (570, 840, 2410), 0.9, 0.0),
    "u": Phone(0.35, 0.00, (300, 870, 2240), 0.8, 0.0),
}
CONSONANTS = {
    "p": Phone(0.00, 0.50, (300, 900, 2300), 0.0, 0.0),
    "m": Phone(0.00, 0.50, (250, 1100, 2200), 0.25, 0.0),
    "s": Phone(0.14, 0.75, (300, 1800, 2600), 0.0, 0.5),
}
PAUSE = Phone(0.00, 0.50, (400, 1400, 2400), 0.0, 0.0)


class Voice(NamedTuple):
    """A synthetic utterance and its lip curves at CONTROL_HZ."""

    samples: NDArray[np.float32]  # [16000 seconds] in [-1, 1]
    opening: Array  # [200 seconds] in [0, 1]
    width: Array  # [200 seconds] in [0, 1]


def draw_phones(rng: np.random.Generator, seconds: float) -> list[tuple[Phone, float]]:
    """Draw syllables (consonant, vowel) and occasional pauses, as (phone, seconds)."""
    phones: list[tuple[Phone, float]] = []
    filled = 0.0
    while filled < seconds:
        # Insert a pause now and then; all other syllables are a consonant and a vowel.
        if rng.random() < 0.18:
            syllable = [(PAUSE, rng.uniform(0.12, 0.35))]
        else:
            consonant = CONSONANTS[rng.choice(list(CONSONANTS))]
            vowel = VOWELS[rng.choice(list(VOWELS))]
            syllable = [(consonant, rng.uniform(0.06, 0.11)), (vowel, rng.uniform(0.11, 0.26))]
        phones += syllable
        filled += sum(duration for _, duration in syllable)
    return phones


def glide(values: Array) -> Array:
    """Smooth a staircase of targets with a raised cosine of GLIDE_SECONDS half-width."""
    half = int(GLIDE_SECONDS * CONTROL_HZ)
    kernel = 1 + np.cos(np.linspace(-np.pi, np.pi, 2 * half + 1))
    padded = np.pad(values, half, mode="edge")
    return np.convolve(padded, kernel / kernel.sum(), mode="valid")


def control_curves(phones: list[tuple[Phone, float]], seconds: float) -> dict[str, Array]:
    """Return the targets of all phones as smooth curves at CONTROL_HZ."""
    # Find the phone at the middle of each control step.
    count = round(seconds * CONTROL_HZ)
    ends = np.cumsum([duration for _, duration in phones])
    indices = np.searchsorted(ends, (np.arange(count) + 0.5) / CONTROL_HZ, side="right")
    rows = np.array(
        [(p.opening, p.width, *p.formants, p.voice, p.hiss) for p, _ in phones], dtype=np.float64
    )[np.minimum(indices, len(phones) - 1)]
    names = ("opening", "width", "formant_1", "formant_2", "formant_3", "voice", "hiss")
    return {name: glide(rows[:, column]) for column, name in enumerate(names)}


def harmonics_of(curves: dict[str, Array], pitch: Array, scale: float) -> Array:
    """Return the amplitude [harmonics, time] of each harmonic at CONTROL_HZ."""
    # The vocal tract resonates at three formants; `scale` shifts them (a longer tract is below 1).
    numbers = np.arange(1, 1 + int(4000 / pitch.max()))[:, None]
    frequency = numbers * pitch[None]
    response = np.zeros_like(frequency)
    for name, bandwidth, gain in (
        ("formant_1", 90.0, 1.0),
        ("formant_2", 120.0, 0.55),
        ("formant_3", 170.0, 0.25),
    ):
        center = curves[name][None] * scale
        response += gain / (1 + ((frequency - center) / bandwidth) ** 2)
    return response * curves["voice"][None] / np.sqrt(numbers)


def synthesize(rng: np.random.Generator, seconds: float) -> Voice:
    """Synthesize `seconds` of speech with random pitch and vocal-tract length."""
    # At the control rate: lips, formants, pitch and the amplitude of each harmonic.
    curves = control_curves(draw_phones(rng, seconds), seconds)
    base, tract = rng.uniform(95, 230), rng.uniform(0.92, 1.15)
    times = np.arange(len(curves["voice"])) / CONTROL_HZ
    pitch = base * (
        1 + 0.05 * np.sin(2 * np.pi * rng.uniform(0.5, 1.5) * times + rng.uniform(0, 6))
    )
    amplitude = harmonics_of(curves, pitch, tract)

    # At the audio rate: a sum of harmonics, and noise for hisses.
    count = round(seconds * RATE_HZ)
    fine = np.arange(count) / RATE_HZ
    phase = 2 * np.pi * np.cumsum(np.interp(fine, times, pitch)) / RATE_HZ
    samples = np.zeros(count)
    for number, row in enumerate(amplitude, start=1):
        samples += np.interp(fine, times, row) * np.sin(number * phase)
    noise = np.diff(rng.standard_normal(count + 1))  # differencing boosts high frequencies
    samples = 0.25 * samples + 0.12 * np.interp(fine, times, curves["hiss"]) * noise
    samples += 0.001 * rng.standard_normal(count)
    return Voice(np.clip(samples, -1, 1).astype(np.float32), curves["opening"], curves["width"])
