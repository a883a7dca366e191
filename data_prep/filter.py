"""Reasons to refuse a frame or a clip.  The part of a reason before the colon is its kind.

A clip counts as talking if its audio is audible (not: is speech), one large face is in every frame,
and its lips move.  A song passes; a barking dog has no face and fails.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from echolab.vision.faces import Rows, Track
from echolab.vision.normalize import SAMPLES_PER_FRAME, Grid

AUDIBLE_DBFS = -50.0  # minimum loudness of an audible frame (40 ms)
MIN_AUDIBLE_FRACTION = 0.2  # minimum fraction of audible frames in a clip; low, as people pause
STILL_LIPS = 0.006  # standard deviation of the mouth opening, in face heights, of still lips
MESH_PRESENCE = 0.5  # minimum confidence of the face mesh
MIN_MESH_FRACTION = 0.8  # minimum fraction of a clip's frames in which the mesh fits
SECOND_FACE_FRACTION = 0.5  # minimum height of a second face that counts, relative to the largest

CUT_SHORT = "damaged: the file ends before the end in its header; download it again"
DAMAGED = "damaged: the frames cannot be decoded here"

Flags = NDArray[np.bool_]


class Refusal(NamedTuple):
    """A refused span of a file, with the reason."""

    start_seconds: float
    end_seconds: float
    reason: str


class Subject(NamedTuple):
    """The largest face of each frame."""

    track: NDArray[np.int64]  # [K] index of the largest track, -1 for no face
    height: NDArray[np.float32]  # [K] height of the largest face in source pixels
    second: NDArray[np.float32]  # [K] height of the second largest face / that of the largest
    faces: NDArray[np.int64]  # [K] number of faces


def find_subject(tracks: list[Track], frames: int) -> Subject:
    """Return the largest face of each frame."""
    # Two extra rows of zeros, so that the two largest heights always exist.
    heights = np.zeros((len(tracks) + 2, frames), np.float32)
    for index, track in enumerate(tracks):
        heights[index, track.first : track.last] = track.rows[:, 3]
    order = np.sort(heights, 0)
    largest, second = order[-1], order[-2]
    track_index = np.where(largest > 0, heights.argmax(0), -1)
    fraction = second / np.maximum(largest, 1e-6)
    return Subject(track_index.astype(np.int64), largest, fraction, (heights > 0).sum(0))


def frame_reasons(grid: Grid, covered: Flags, subject: Subject, min_pixels: float) -> list[str]:
    """Return the most severe reason to refuse each frame, "" for usable frames."""
    # The first reason that applies, from damage of the file to the size of the face.
    reasons = [""] * len(grid.indices)
    for k in range(len(reasons)):
        if grid.damaged[k]:
            reasons[k] = DAMAGED
        elif grid.missing[k]:
            reasons[k] = "no frames: more than 0.2 s from one to the next here"
        elif not covered[k]:
            reasons[k] = "no audio: the audio track does not cover this, or is damaged"
        elif subject.track[k] < 0:
            reasons[k] = "no face: none with a YuNet score of 0.9"
        elif subject.second[k] >= SECOND_FACE_FRACTION:
            reasons[k] = "several faces: a second one is at least half as tall"
        elif subject.height[k] < min_pixels:
            reasons[k] = f"face too small: less than {min_pixels:g} pixels tall"
    return reasons


def runs(labels: list[str] | NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return the runs of equal labels as (first, end) indices, end exclusive."""
    starts = [k for k in range(len(labels)) if k == 0 or labels[k] != labels[k - 1]]
    return list(zip(starts, [*starts[1:], len(labels)], strict=True)) if starts else []


def loudness(samples: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the loudness [T] of each 40 ms frame in dBFS."""
    # The offset maps silence to -100 dBFS instead of minus infinity.
    frames = len(samples) // SAMPLES_PER_FRAME
    blocks = samples[: frames * SAMPLES_PER_FRAME].reshape(frames, -1).astype(np.float64)
    return np.asarray(10 * np.log10((blocks**2).mean(1) + 1e-10))


def is_audible(samples: NDArray[np.float32]) -> bool:
    """Return whether any frame is audible."""
    levels = loudness(samples)
    return bool(len(levels)) and float(levels.max()) > AUDIBLE_DBFS


def silence_reason(samples: NDArray[np.float32]) -> str:
    """Return the reason to refuse silent audio, or "" if enough of it is audible."""
    # People pause, so only a fraction of the frames must be audible.
    levels = loudness(samples)
    fraction = float((levels > AUDIBLE_DBFS).mean()) if len(levels) else 0.0
    if fraction >= MIN_AUDIBLE_FRACTION:
        return ""
    # Report the loudest frame, so that the user can judge the limit.
    loudest = float(levels.max()) if len(levels) else -100.0
    return (
        f"silence: {fraction:.0%} of it is above {AUDIBLE_DBFS:g} dBFS, need "
        f"{MIN_AUDIBLE_FRACTION:.0%} (loudest {loudest:.0f} dBFS)"
    )


def still_lips_reason(opening: NDArray[np.floating[Any]], presence: NDArray[np.float64]) -> str:
    """Return the reason to refuse still or undetected lips, or "" if the lips move.

    `opening` [T] is the mouth opening in face heights, `presence` [T] the confidence of the mesh.
    """
    # The opening is meaningless in frames in which the mesh does not fit.
    fits = presence >= MESH_PRESENCE
    if fits.mean() < MIN_MESH_FRACTION:
        return f"no face: the face mesh fits in {fits.mean():.0%} of the frames, need 80%"
    spread = float(opening[fits].std())
    if spread < STILL_LIPS:
        return f"not talking: the lips move by {spread:.4f} of the face, need {STILL_LIPS:g}"
    return ""


def clip_scores(
    rows: Rows, opening: NDArray[np.floating[Any]], samples: NDArray[np.float32]
) -> dict[str, float]:
    """Return the measurements of an accepted clip, for stricter filtering later."""
    return {
        "face_pixels": round(float(rows[:, 3].min()), 1),
        "face_score": round(float(rows[:, 14].mean()), 4),
        "lip_motion": round(float(opening.std()), 5),
        "loudness_dbfs": round(float(np.median(loudness(samples))), 1),
    }
