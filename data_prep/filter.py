"""Why a frame or a clip is refused.  The first words of a reason, up to the colon, are its kind.

"Talking" is judged simply: the sound is audible (not: is speech), one large face is there all the
time, and its lips move.  A song passes; a barking dog fails for want of a face.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.normalize import SAMPLES_PER_FRAME, Grid
from echolab.vision.faces import Rows
from echolab.vision.track import Track

AUDIBLE_DBFS = -50.0  # of the 40 ms of one frame
AUDIBLE_SHARE = 0.2  # of a clip's frames: people pause
STILL_LIPS = 0.006  # spread of the mouth's opening, in heights of the face
MESH_PRESENCE = 0.5
MESH_SHARE = 0.8  # of a clip's frames in which the mesh must fit
RIVAL = 0.5  # a second face this tall beside the subject makes several

CUT_SHORT = "damaged: the file ends before its header says; fetch it again"
DAMAGED = "damaged: the picture cannot be decoded here"

Flags = NDArray[np.bool_]


class Refusal(NamedTuple):
    """A span of a file that is not used, and why."""

    start_seconds: float
    end_seconds: float
    reason: str


class Subject(NamedTuple):
    """The one face of each frame."""

    track: NDArray[np.int64]  # [K] number of the largest track, -1 where there is none
    height: NDArray[np.float32]  # [K] of its box in source pixels
    rival: NDArray[np.float32]  # [K] height of the second largest, as a share
    faces: NDArray[np.int64]  # [K] how many


def find_subject(tracks: list[Track], frames: int) -> Subject:
    """The largest face of each frame."""
    heights = np.zeros((len(tracks) + 2, frames), np.float32)
    for number, track in enumerate(tracks):
        heights[number, track.first : track.last] = track.rows[:, 3]
    order = np.sort(heights, 0)
    largest, second = order[-1], order[-2]
    track_number = np.where(largest > 0, heights.argmax(0), -1)
    rival = second / np.maximum(largest, 1e-6)
    return Subject(track_number.astype(np.int64), largest, rival, (heights > 0).sum(0))


def frame_reasons(grid: Grid, sounding: Flags, subject: Subject, least_pixels: float) -> list[str]:
    """One reason a frame, "" where it may be used; the graver reason wins."""
    reasons = [""] * len(grid.numbers)
    for k in range(len(reasons)):
        if grid.damaged[k]:
            reasons[k] = DAMAGED
        elif grid.missing[k]:
            reasons[k] = "no picture: the frames are more than 0.2 s apart here"
        elif not sounding[k]:
            reasons[k] = "no sound: the sound track does not cover this, or is damaged"
        elif subject.track[k] < 0:
            reasons[k] = "no face: none that is sure (YuNet 0.9)"
        elif subject.rival[k] >= RIVAL:
            reasons[k] = "several faces: a second one is at least half as tall"
        elif subject.height[k] < least_pixels:
            reasons[k] = f"face too small: less than {least_pixels:g} pixels tall"
    return reasons


def runs(labels: list[str] | NDArray[np.int64]) -> list[tuple[int, int]]:
    """Stretches of equal labels, as first and after-last."""
    starts = [k for k in range(len(labels)) if k == 0 or labels[k] != labels[k - 1]]
    return list(zip(starts, [*starts[1:], len(labels)], strict=True)) if starts else []


def loudness(samples: NDArray[np.float32]) -> NDArray[np.float64]:
    """[T] dBFS of each frame's 40 ms."""
    frames = len(samples) // SAMPLES_PER_FRAME
    pieces = samples[: frames * SAMPLES_PER_FRAME].reshape(frames, -1).astype(np.float64)
    return np.asarray(10 * np.log10((pieces**2).mean(1) + 1e-10))


def audible(samples: NDArray[np.float32]) -> bool:
    """Is there any sound at all?"""
    levels = loudness(samples)
    return bool(len(levels)) and float(levels.max()) > AUDIBLE_DBFS


def silence(samples: NDArray[np.float32]) -> str:
    """The reason to refuse this sound, or ""."""
    levels = loudness(samples)
    share = float((levels > AUDIBLE_DBFS).mean()) if len(levels) else 0.0
    if share >= AUDIBLE_SHARE:
        return ""
    loudest = float(levels.max()) if len(levels) else -100.0
    return (
        f"silence: {share:.0%} of it is above {AUDIBLE_DBFS:g} dBFS, need {AUDIBLE_SHARE:.0%} "
        f"(loudest {loudest:.0f} dBFS)"
    )


def still_lips(opening: NDArray[np.floating[Any]], presence: NDArray[np.float64]) -> str:
    """The reason to refuse this mouth, or "".

    `opening` [T] is in heights of the face, `presence` [T] how sure the mesh is.
    """
    fits = presence >= MESH_PRESENCE
    if fits.mean() < MESH_SHARE:
        return f"no face: the face mesh fits in {fits.mean():.0%} of the frames, need 80%"
    spread = float(opening[fits].std())
    if spread < STILL_LIPS:
        return f"not talking: the lips move by {spread:.4f} of the face, need {STILL_LIPS:g}"
    return ""


def clip_scores(
    rows: Rows, opening: NDArray[np.floating[Any]], samples: NDArray[np.float32]
) -> dict[str, float]:
    """What was measured of an accepted clip, for a later, stricter choice."""
    return {
        "face_pixels": round(float(rows[:, 3].min()), 1),
        "face_score": round(float(rows[:, 14].mean()), 4),
        "lip_motion": round(float(opening.std()), 5),
        "loudness_dbfs": round(float(np.median(loudness(samples))), 1),
    }
