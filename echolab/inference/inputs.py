"""What a task is given to see: pictures or a video, cut to the size of the video to make."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_prep.normalize import make_grid
from data_prep.pack import MULTIPLE, Framing, cut_out, frame_head, frame_whole, in_frame
from echolab.data.clips import to_pixels
from echolab.data.media import Frames, read_image
from echolab.errors import MediaError
from echolab.inference.faces import Boxes, face_around, find_face, follow_face, lips_in
from echolab.inference.options import CROPS, SIZES, GenerateArguments
from echolab.tasks.masks import known_pixels
from echolab.tasks.table import TASK_TABLE
from echolab.vision.probe import Probe, probe
from echolab.vision.video_reader import VideoReader

KNOWN_FRAMES = 8  # that continuation goes on from


class Footage(NamedTuple):
    """The given pixels of a whole video; where none are known they do not matter."""

    pixels: Tensor  # [3, T, Y, X] in [-1, 1]
    known: Tensor  # [T, 1, Y, X] bool
    face: Tensor  # [T, 4] in pixels
    picture: Tensor | None  # [3, Y, X] the reference; None where there is none

    def extended(self, frames: int) -> "Footage":
        """The same with its last frame repeated up to `frames`."""
        places = torch.arange(frames).clamp(max=len(self.known) - 1)
        return self._replace(
            pixels=self.pixels[:, places], known=self.known[places], face=self.face[places]
        )


def size_of(arguments: GenerateArguments) -> int:
    return arguments.size or SIZES[arguments.preset_name]


def frame(arguments: GenerateArguments, faces: Boxes, width: int, height: int) -> Framing:
    """What part of a picture of width x height is used, and at what size."""
    size = size_of(arguments)
    if arguments.width is not None and arguments.height is not None:
        across, down = arguments.width, arguments.height
    elif (arguments.crop or CROPS[arguments.preset_name]) == "head":
        return frame_head(faces, width, height, size)
    else:
        whole = frame_whole(width, height, size // MULTIPLE * MULTIPLE)
        across, down = whole.width, whole.height
    scale = min(width / across, height / down)
    x, y = (width - scale * across) / 2, (height - scale * down) / 2
    return Framing((x, y, x + scale * across, y + scale * down), across, down)


def _fixed(box: tuple[float, ...], frames: int) -> Boxes:
    return np.tile(np.array(box, np.float32), (frames, 1))


def known_of(
    arguments: GenerateArguments, pixels: Tensor, face: Boxes, lips: Boxes, framing: Framing
) -> tuple[Tensor, Tensor]:
    """Where the task's pixels are known [T, 1, Y, X], and the face's boxes in the video."""
    boxes, mouth = (torch.from_numpy(in_frame(b, framing)) for b in (face, lips))
    _, frames, height, width = pixels.shape
    known = known_pixels(
        arguments.task, frames=frames, height=height, width=width, face=boxes, lips=mouth,
        known_frames=KNOWN_FRAMES,
    )  # fmt: skip
    return known, boxes


def nothing_given(arguments: GenerateArguments, frames: int) -> Footage:
    """For t2v: no picture; sound may act everywhere."""
    height, width = arguments.height or size_of(arguments), arguments.width or size_of(arguments)
    return Footage(
        torch.zeros(3, 1, height, width).expand(-1, frames, -1, -1),
        torch.zeros(frames, 1, height, width, dtype=torch.bool),
        torch.tensor([[0.0, 0.0, width, height]]).expand(frames, -1),
        None,
    )


def pictures_given(arguments: GenerateArguments, frames: int) -> Footage:
    """For i2v and flf2v: the first picture, and the last."""
    assert arguments.image is not None
    picture = read_image(arguments.image)
    if arguments.face is None:
        face, lips = find_face(picture, arguments.image, arguments.weights)
    else:
        face, lips = _fixed(arguments.face, 1), _fixed(lips_in(arguments.face), 1)
    framing = frame(arguments, face, picture.shape[1], picture.shape[0])
    pixels = to_pixels(cut_out(picture, framing)[None]).expand(-1, frames, -1, -1)
    if arguments.last is not None:
        last = to_pixels(cut_out(_as_large(arguments.last, picture), framing)[None])
        pixels = torch.cat([pixels[:, :-1], last], 1)
    many = [boxes.repeat(frames, 0) for boxes in (face, lips)]
    known, boxes = known_of(arguments, pixels, many[0], many[1], framing)
    return Footage(pixels, known, boxes, pixels[:, 0])


def _as_large(path: Path, picture: Frames) -> Frames:
    """The last picture; MediaError where it is not of the first one's size."""
    last = read_image(path)
    if last.shape != picture.shape:
        sizes = [f"{shape[1]}x{shape[0]}" for shape in (last.shape, picture.shape)]
        raise MediaError(f"{path}: is {sizes[0]}, the first picture {sizes[1]}; scale it to that")
    return last


def open_source(path: Path) -> Probe:
    """A video's probe; MediaError that names the file where there is no picture to read."""
    if not path.is_file():
        raise MediaError(f"{path}: not there; check the name")
    try:
        return probe(path)
    except MediaError as error:
        raise MediaError(f"{path}: {error}; give another source=") from error


def source_given(arguments: GenerateArguments, frames: int) -> Footage:
    """For avatar_sync and lip_sync the beginning of a video, for continuation its end."""
    assert arguments.source is not None
    found = open_source(arguments.source)
    continues = arguments.task == "continuation"
    needed, numbers = KNOWN_FRAMES if continues else frames, make_grid(found).numbers
    if len(numbers) < needed:
        raise MediaError(
            f"{arguments.source}: has {len(numbers)} frames at 25 a second, need {needed}; give a "
            f"longer video{'' if continues else f', or seconds={len(numbers) / 25:g}'}"
        )
    numbers = numbers[-needed:] if continues else numbers[:needed]
    box = arguments.box or arguments.face
    if box is None:
        face, lips = follow_face(found, numbers, arguments.weights)
    elif arguments.box is not None and arguments.task == "lip_sync":
        face, lips = _fixed(face_around(box), needed), _fixed(box, needed)
    else:
        face, lips = _fixed(box, needed), _fixed(lips_in(box), needed)
    framing = frame(arguments, face, found.width, found.height)
    reader = VideoReader(found, found.width, found.height)
    pixels = to_pixels(np.stack([cut_out(picture, framing) for picture in reader.read(numbers)]))
    places = torch.arange(frames).clamp(max=needed - 1)
    pixels = pixels[:, places]
    known, boxes = known_of(arguments, pixels, face[places], lips[places], framing)
    return Footage(pixels, known, boxes, pixels[:, 0])


def footage_of(arguments: GenerateArguments, frames: int) -> Footage:
    """What the task is given, for a video of `frames` frames."""
    if not TASK_TABLE[arguments.task].has_known:
        return nothing_given(arguments, frames)
    return (pictures_given if arguments.source is None else source_given)(arguments, frames)
