"""Colour matching: a long video drifts, and its first frame is the one that was given."""

import cv2
import numpy as np
from numpy.typing import NDArray

from echolab.data.media import Frames


def _lab(frame: Frames) -> NDArray[np.float32]:
    return np.asarray(cv2.cvtColor(frame.astype(np.float32) / 255, cv2.COLOR_RGB2LAB), np.float32)


def match_colours(frames: Frames) -> Frames:
    """Frames [T, Y, X, 3] with the first one's mean and spread of each LAB channel.

    EchoMimicV3 does so whenever it saves a video (`src/utils.py`, 26-67).
    """
    first = _lab(frames[0])
    mean, std = first.mean((0, 1)), first.std((0, 1))
    matched = [frames[0]]
    for frame in frames[1:]:
        lab = _lab(frame)
        scaled = (lab - lab.mean((0, 1))) / np.maximum(lab.std((0, 1)), 1e-6) * std + mean
        rgb = cv2.cvtColor(scaled.astype(np.float32), cv2.COLOR_LAB2RGB)
        matched.append((rgb.clip(0, 1) * 255).round().astype(np.uint8))
    return np.stack(matched)
