"""One accepted clip: cropped around the head, scaled, and encoded as the members of a sample."""

import json
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from echolab.data.media import encode_flac, encode_mp4, encode_tracks
from echolab.geometry import WAN
from echolab.vision.faces import Picture

HEAD = 2.0  # side of the square around all face boxes of a clip, in their larger side
MULTIPLE = WAN.token_pixels  # of the sides of a clip

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in source pixels


class Framing(NamedTuple):
    """What part of the picture is kept, and at what size."""

    box: Box
    width: int
    height: int


def frame_head(faces: NDArray[np.float32], width: int, height: int, size: int) -> Framing:
    """A square of `size` pixels around the head, for face boxes [T, 4] of one clip."""
    left, top = faces[:, :2].min(0)
    right, bottom = faces[:, 2:].max(0)
    side = min(HEAD * max(right - left, bottom - top), width, height)
    x = min(max((left + right - side) / 2, 0), width - side)
    y = min(max((top + bottom - side) / 2, 0), height - side)
    return Framing((float(x), float(y), float(x + side), float(y + side)), size, size)


def frame_whole(width: int, height: int, size: int) -> Framing:
    """Nearly the whole picture in its own shape, with the area of size x size pixels."""
    scale = size / (width * height) ** 0.5
    across, down = (max(1, round(side * scale / MULTIPLE)) for side in (width, height))
    aspect = across / down
    kept_width, kept_height = min(width, height * aspect), min(height, width / aspect)
    x, y = (width - kept_width) / 2, (height - kept_height) / 2
    box = (x, y, x + kept_width, y + kept_height)
    return Framing(box, across * MULTIPLE, down * MULTIPLE)


def cut_out(picture: Picture, framing: Framing) -> Picture:
    """The framed part of a picture at its new size."""
    x0, y0, x1, y1 = framing.box
    scale = framing.width / (x1 - x0)
    # Half a pixel: the centres of the corner pixels map onto each other, as cv2.resize has it.
    to_source = np.array(
        [[1 / scale, 0, x0 + 0.5 / scale - 0.5], [0, 1 / scale, y0 + 0.5 / scale - 0.5]]
    )
    if scale < 1:  # averaging, else fine patterns turn into moire
        left, top, right, bottom = (round(v) for v in framing.box)
        part = picture[top : max(bottom, top + 1), left : max(right, left + 1)]
        size = (framing.width, framing.height)
        return np.asarray(cv2.resize(part, size, interpolation=cv2.INTER_AREA), np.uint8)
    enlarged = cv2.warpAffine(
        picture,
        to_source,
        (framing.width, framing.height),
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return np.asarray(enlarged, np.uint8)


def in_frame(boxes: NDArray[np.float32], framing: Framing) -> NDArray[np.float32]:
    """Boxes [T, 4] of the source as boxes of the clip, cut at its edges."""
    x0, y0, x1, y1 = framing.box
    scale = np.array([framing.width / (x1 - x0), framing.height / (y1 - y0)] * 2, np.float32)
    moved = (boxes - np.array([x0, y0, x0, y0], np.float32)) * scale
    edges = np.array([framing.width, framing.height] * 2, np.float32)
    return np.clip(moved, 0, edges).astype(np.float32)


def encode_members(
    frames: NDArray[np.uint8],
    samples: NDArray[np.float32],
    tracks: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.floating[Any]]],
    facts: dict[str, Any],
    crf: int,
) -> dict[str, bytes]:
    """The members of a raw sample; `tracks` are face [T, 4], lips [T, 4], mouth opening [T]."""
    face, lips, opening = tracks
    return {
        "mp4": encode_mp4(frames, crf=crf),
        "flac": encode_flac(samples),
        "tracks.npz": encode_tracks(face, lips, None, {"opening": opening.astype(np.float32)}),
        "json": json.dumps(facts, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace"),
    }
