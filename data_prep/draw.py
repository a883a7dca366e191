"""Draw datasets of synthetic talkers: random faces whose lips follow a synthetic voice.

Synthetic talkers need no download, and their visemes are known exactly, so that lip sync can be
measured without a trained network.  A clip is a pure function of (seed, index).
"""

import json
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from data_prep.options import DrawOptions
from data_prep.synthetic_voice import CONTROL_HZ, synthesize
from echolab.data.media import encode_flac, encode_mp4, encode_tracks
from echolab.data.shard_writer import ShardWriter
from echolab.progress import progress

FPS = 25
OVERSAMPLE = 2
SHIFT = 4  # cv2 takes coordinates in 1/16 pixel
MOUTH_CENTER = (0.0, 0.50)  # in head coordinates, where the face is the ellipse x^2/a^2 + y^2 = 1

# Colors by their names in captions.
SKINS = {
    "pale": (244, 214, 190),
    "fair": (232, 190, 160),
    "olive": (208, 164, 122),
    "brown": (172, 120, 82),
    "dark": (128, 86, 60),
}
HAIRS = {
    "black": (34, 28, 30),
    "brown": (92, 58, 36),
    "blond": (222, 184, 104),
    "red": (168, 70, 34),
    "grey": (168, 168, 172),
}
EYES = {"blue": (70, 120, 190), "green": (70, 140, 90), "brown": (96, 58, 30)}
SHIRTS = {
    "red": (188, 52, 52),
    "blue": (52, 84, 176),
    "green": (54, 136, 84),
    "white": (226, 226, 222),
    "yellow": (222, 184, 58),
}
WALLS = {
    "grey": (132, 136, 142),
    "beige": (204, 190, 162),
    "teal": (84, 146, 148),
    "lilac": (150, 132, 178),
    "orange": (216, 148, 96),
}
LIPS = ((178, 78, 84), (196, 92, 92), (160, 66, 74))
MOUTH_INSIDE = (58, 14, 22)
TEETH = (240, 238, 230)
FRAME = (24, 24, 28)  # color of the rim of glasses


class Look(NamedTuple):
    """The appearance of a talker."""

    skin: str
    hair: str
    long_hair: bool
    eyes: str
    glasses: bool
    shirt: str
    wall: str
    lips: tuple[int, int, int]
    aspect: float  # width of the face / its height
    size: float  # height of the face, in half image heights

    def caption(self) -> str:
        length = "long" if self.long_hair else "short"
        glasses = " and glasses" if self.glasses else ""
        return (
            f"a talking person with {self.skin} skin, {length} {self.hair} hair, {self.eyes} eyes"
            f"{glasses}, in a {self.shirt} shirt before a {self.wall} wall"
        )


class Motion(NamedTuple):
    """The motion of a head; every field has shape [frames]."""

    x: NDArray[np.float64]  # in half image widths
    y: NDArray[np.float64]
    tilt: NDArray[np.float64]  # radians
    turn: NDArray[np.float64]  # sideways shift of the facial features, in head coordinates
    lids: NDArray[np.float64]  # 1 open, 0 shut
    brows: NDArray[np.float64]


def draw_look(rng: np.random.Generator) -> Look:
    """Draw an appearance; each field advances the generator, so their order is part of the data."""
    return Look(
        skin=str(rng.choice(list(SKINS))),
        hair=str(rng.choice(list(HAIRS))),
        long_hair=bool(rng.random() < 0.5),
        eyes=str(rng.choice(list(EYES))),
        glasses=bool(rng.random() < 0.25),
        shirt=str(rng.choice(list(SHIRTS))),
        wall=str(rng.choice(list(WALLS))),
        lips=LIPS[rng.integers(len(LIPS))],
        aspect=rng.uniform(0.74, 0.86),
        size=rng.uniform(0.68, 0.76),
    )


def wander(rng: np.random.Generator, frames: int, amount: float) -> NDArray[np.float64]:
    """Return a slow, smooth path [frames] around zero: the sum of two sines of random phase."""
    # Frequencies in Hz.
    seconds = np.arange(frames) / FPS
    slow, quick = rng.uniform(0.15, 0.5), rng.uniform(0.6, 1.1)
    path = np.sin(2 * np.pi * slow * seconds + rng.uniform(0, 2 * np.pi))
    return amount * (path + 0.35 * np.sin(2 * np.pi * quick * seconds + rng.uniform(0, 2 * np.pi)))


def draw_motion(rng: np.random.Generator, frames: int) -> Motion:
    """Draw the motion of a head, with about one blink every 1.5 s."""
    # A blink lasts four frames.
    lids = np.ones(frames)
    for start in rng.integers(0, 3 * FPS, size=2):
        for offset, opening in ((0, 0.45), (1, 0.05), (2, 0.05), (3, 0.5)):
            if start + offset < frames:
                lids[start + offset] = opening
    return Motion(
        x=wander(rng, frames, 0.035),
        y=wander(rng, frames, 0.025),
        tilt=wander(rng, frames, 0.06),
        turn=wander(rng, frames, 0.05),
        lids=lids,
        brows=wander(rng, frames, 0.02),
    )


class Pen:
    """Draws shapes given in head coordinates on an oversampled canvas."""

    def __init__(self, canvas: NDArray[np.uint8], look: Look, motion: Motion, frame: int) -> None:
        # Head coordinates: origin at the center of the face, unit of half its height.
        half = canvas.shape[0] / 2
        self.canvas = canvas
        self.unit = look.size * half
        self.cos, self.sin = np.cos(motion.tilt[frame]), np.sin(motion.tilt[frame])
        self.origin = (half * (1 + motion.x[frame]), half * (0.94 + motion.y[frame]))
        self.degrees = float(np.degrees(motion.tilt[frame]))

    def to_canvas(self, x: float, y: float) -> tuple[float, float]:
        """Convert head coordinates to canvas pixels."""
        return (
            self.origin[0] + self.unit * (x * self.cos - y * self.sin),
            self.origin[1] + self.unit * (x * self.sin + y * self.cos),
        )

    def ellipse(
        self,
        x: float,
        y: float,
        a: float,
        b: float,
        color: tuple[int, ...],
        start: float = 0,
        end: float = 360,
    ) -> None:
        # Round to 1/16 pixel, so that slow motion is smooth.
        center = tuple(round(v * 2**SHIFT) for v in self.to_canvas(x, y))
        axes = (max(1, round(a * self.unit * 2**SHIFT)), max(1, round(b * self.unit * 2**SHIFT)))
        cv2.ellipse(
            self.canvas, center, axes, self.degrees, start, end, color, -1, cv2.LINE_AA, SHIFT
        )

    def line(self, points: list[tuple[float, float]], width: float, color: tuple[int, ...]) -> None:
        path = np.array([self.to_canvas(x, y) for x, y in points]) * 2**SHIFT
        cv2.polylines(
            self.canvas,
            [path.round().astype(np.int32)],
            False,
            color,
            max(1, round(width * self.unit)),
            cv2.LINE_AA,
            SHIFT,
        )


def darker(color: tuple[int, ...], factor: float) -> tuple[int, ...]:
    return tuple(int(value * factor) for value in color)


def draw_mouth(pen: Pen, look: Look, turn: float, opening: float, width: float) -> None:
    """Draw lips around a dark inside with a row of teeth; shut lips are one line."""
    # Draw the lips, then the inside, then the teeth if the mouth is wide open.
    x, y = MOUTH_CENTER[0] + turn, MOUTH_CENTER[1]
    half_width = 0.19 + 0.17 * width
    half_height = 0.02 + 0.24 * opening
    pen.ellipse(x, y, half_width + 0.05, half_height + 0.06, look.lips)
    if opening > 0.06:
        pen.ellipse(x, y, half_width, half_height, MOUTH_INSIDE)
        if opening > 0.2:
            pen.ellipse(x, y - 0.45 * half_height, 0.72 * half_width, 0.30 * half_height, TEETH)
    else:
        pen.line([(x - half_width, y), (x + half_width, y)], 0.03, darker(look.lips, 0.45))


def draw_eyes(pen: Pen, look: Look, turn: float, lids: float, brows: float) -> None:
    """Draw eyes or, if the lids are shut, lines; then brows and glasses."""
    skin = SKINS[look.skin]
    for side in (-1, 1):
        x, y = side * 0.36 * look.aspect / 0.8 + 1.2 * turn, -0.16
        # White, iris and pupil; iris and pupil shift in the direction of the head turn.
        if lids > 0.3:
            pen.ellipse(x, y, 0.15, 0.105 * lids, (250, 250, 250))
            pen.ellipse(x + 0.25 * turn, y, 0.075, min(0.075, 0.1 * lids), EYES[look.eyes])
            pen.ellipse(x + 0.25 * turn, y, 0.035, min(0.035, 0.05 * lids), (16, 16, 18))
        else:
            pen.line([(x - 0.14, y + 0.02), (x + 0.14, y + 0.02)], 0.035, darker(skin, 0.5))
        # Brow and rim of the glasses.
        brow = -0.37 - brows
        pen.line(
            [(x - 0.16, brow + 0.03), (x, brow - 0.03), (x + 0.16, brow + 0.02)],
            0.06,
            darker(HAIRS[look.hair], 0.8),
        )
        if look.glasses:
            around = np.linspace(0, 2 * np.pi, 20)
            rim = zip(x + 0.235 * np.cos(around), y + 0.2 * np.sin(around), strict=True)
            pen.line(list(rim), 0.04, FRAME)
    if look.glasses:
        pen.line([(1.2 * turn - 0.13, -0.18), (1.2 * turn + 0.13, -0.18)], 0.04, FRAME)


def draw_frame(
    size: int, look: Look, motion: Motion, frame: int, opening: float, width: float
) -> tuple[NDArray[np.uint8], Pen]:
    """Return an image uint8 [size, size, 3], and the pen that drew it."""
    # Draw the background, then the layers of the head from back to front.
    canvas = np.empty((size * OVERSAMPLE, size * OVERSAMPLE, 3), np.uint8)
    shade = np.linspace(1.08, 0.86, canvas.shape[0])[:, None, None]  # brighter at the top
    canvas[:] = np.clip(np.array(WALLS[look.wall]) * shade, 0, 255)
    pen = Pen(canvas, look, motion, frame)
    skin, hair, turn = SKINS[look.skin], HAIRS[look.hair], float(motion.turn[frame])
    if look.long_hair:
        pen.ellipse(0.4 * turn, 0.15, look.aspect + 0.24, 1.18, hair)
    pen.ellipse(0, 1.75, 1.15, 0.75, SHIRTS[look.shirt])
    pen.ellipse(0.2 * turn, 1.0, 0.34, 0.42, darker(skin, 0.86))
    pen.ellipse(0.3 * turn, -0.18, look.aspect + 0.10, 0.98, hair)
    pen.ellipse(0, 0.06, look.aspect, 0.98, skin)
    pen.ellipse(0.6 * turn, -0.66, 0.86 * look.aspect, 0.34, hair, 180, 360)
    draw_eyes(pen, look, turn, float(motion.lids[frame]), float(motion.brows[frame]))
    pen.line(
        [(1.3 * turn - 0.02, -0.05), (1.7 * turn + 0.06, 0.2), (1.3 * turn - 0.03, 0.22)],
        0.035,
        darker(skin, 0.72),
    )
    draw_mouth(pen, look, turn, opening, width)
    image = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    return np.asarray(image, np.uint8), pen


def box_around(pen: Pen, x: float, y: float, a: float, b: float) -> list[float]:
    """Return the box [left, top, right, bottom], in pixels, of an ellipse in head coordinates."""
    # Bounding box of an ellipse tilted with the head.
    center = pen.to_canvas(x, y)
    half_width = pen.unit * float(np.hypot(a * pen.cos, b * pen.sin))
    half_height = pen.unit * float(np.hypot(a * pen.sin, b * pen.cos))
    box = (
        center[0] - half_width,
        center[1] - half_height,
        center[0] + half_width,
        center[1] + half_height,
    )
    return [value / OVERSAMPLE for value in box]


class Talker(NamedTuple):
    """One synthetic clip."""

    frames: NDArray[np.uint8]  # [T, size, size, 3]
    samples: NDArray[np.float32]  # [640 T] at 16 kHz
    face: NDArray[np.float32]  # [T, 4] left, top, right, bottom in pixels
    lips: NDArray[np.float32]  # [T, 4] boxes with room for the widest mouth
    opening: NDArray[np.float32]  # [T] true opening of the mouth, 0 to 1
    width: NDArray[np.float32]  # [T] true width of the mouth, 0 to 1
    look: Look


def draw_talker(seed: int, index: int, *, frames: int = 25, size: int = 64) -> Talker:
    """Draw clip `index` of dataset `seed`; frame k shows the lips at (k + 1/2) / 25 s."""
    rng = np.random.default_rng([seed, index])
    look, motion = draw_look(rng), draw_motion(rng, frames)
    voice = synthesize(rng, frames / FPS)
    # Sample the lip curves at the middle of each frame.
    samples_at = (np.arange(frames) + 0.5) * CONTROL_HZ / FPS - 0.5
    steps = np.arange(len(voice.opening))
    opening = np.interp(samples_at, steps, voice.opening)
    width = np.interp(samples_at, steps, voice.width)

    # Draw the frames and record the true boxes.
    images, face, lips = [], [], []
    for frame in range(frames):
        image, pen = draw_frame(size, look, motion, frame, opening[frame], width[frame])
        turn = float(motion.turn[frame])
        images.append(image)
        face.append(box_around(pen, 0, 0.06, look.aspect, 0.98))
        lips.append(box_around(pen, MOUTH_CENTER[0] + turn, MOUTH_CENTER[1], 0.42, 0.33))
    return Talker(
        np.stack(images),
        voice.samples,
        np.array(face, np.float32),
        np.array(lips, np.float32),
        opening.astype(np.float32),
        width.astype(np.float32),
        look,
    )


# A raw dataset of talkers


def draw_and_report(options: DrawOptions) -> None:
    """Draw a dataset and print a summary."""
    with progress("drawing talkers", options.num_clips) as advance:
        draw_dataset(options, lambda done: advance(done, ""))
    seconds = options.num_clips * options.frames / FPS
    figures = {"out": str(options.out), "clips": options.num_clips, "seconds": seconds}
    plain = f"{options.out}: {options.num_clips} clips, {seconds:.0f} s of speech"
    print(json.dumps(figures) if options.format == "json" else plain)


def draw_dataset(options: DrawOptions, report: Callable[[int], None]) -> None:
    """Write the dataset, calling `report` with the number of clips done."""
    # Keys contain seed and index, so that datasets with different seeds can be mixed.
    with ShardWriter(
        options.out, kind="raw", description={"source": "drawn", "seed": options.seed}
    ) as writer:
        for index in range(options.first, options.first + options.num_clips):
            talker = draw_talker(options.seed, index, frames=options.frames, size=options.size)
            writer.write(f"talker_{options.seed}_{index:06d}", members_of(talker, index, options))
            report(index - options.first + 1)


def members_of(talker: Talker, index: int, options: DrawOptions) -> dict[str, bytes]:
    """Return the members of one raw sample."""
    # The true mouth curves serve as reference for lip-sync metrics.
    facts = {
        "caption": talker.look.caption(),
        "source": "drawn",
        "seed": options.seed,
        "number": index,
        "frames": options.frames,
        "height": options.size,
        "width": options.size,
        "fps": FPS,
    }
    curves = {"opening": talker.opening, "width": talker.width}
    return {
        "mp4": encode_mp4(talker.frames, FPS),
        "flac": encode_flac(talker.samples),
        "tracks.npz": encode_tracks(talker.face, talker.lips, extra=curves),
        "json": json.dumps(facts).encode(),
    }
