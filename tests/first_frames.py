"""Decode the beginning of a video, without the rest."""

from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from echolab.metrics.face_track import source_frames


def first_frames(path: Path, count: int) -> NDArray[np.uint8]:
    """Return the first frames [count, Y, X, 3] of a video at 25 fps."""
    with av.open(str(path)) as container:
        fps = float(container.streams.video[0].average_rate or 25)
        decoded = []
        for frame in container.decode(video=0):
            decoded.append(frame.to_ndarray(format="rgb24"))
            if len(decoded) >= count * fps / 25:
                break
    return np.stack(decoded)[source_frames(len(decoded), fps)][:count]
