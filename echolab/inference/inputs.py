"""Read a task's inputs: images or a video, cropped to the size of the video to generate."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from echolab.data.media import Frames, Tracks, decode_flac, decode_mp4, decode_tracks, read_image
from echolab.data.shard_reader import open_dataset
from echolab.errors import DataError, MediaError
from echolab.geometry import WAN
from echolab.inference.faces import Boxes, face_around, find_face, follow_face, lips_in
from echolab.inference.generate_arguments import CROPS, SIZES, GenerateArguments
from echolab.tasks.masks import known_pixels
from echolab.tasks.table import TASK_TABLE
from echolab.types import Clips
from echolab.vision.normalize import (
    Crop,
    boxes_in_crop,
    crop_frame,
    crop_full,
    crop_head,
    make_grid,
)
from echolab.vision.video_reader import Probe, VideoReader, probe

KNOWN_FRAMES = 8  # frames of the source at the beginning of a continuation


class Footage(NamedTuple):
    """The known pixels of a video; values of unknown pixels are not used."""

    pixels: Tensor  # [3, T, Y, X] in [-1, 1]
    known: Tensor  # [T, 1, Y, X] bool
    face: Tensor  # [T, 4] in pixels
    image: Tensor | None  # [3, Y, X] the reference image, None if the task has none

    def extended(self, frames: int) -> "Footage":
        """Return the footage with its last frame repeated up to `frames`."""
        indices = torch.arange(frames).clamp(max=len(self.known) - 1)
        return self._replace(
            pixels=self.pixels[:, indices], known=self.known[indices], face=self.face[indices]
        )


def size_of(arguments: GenerateArguments) -> int:
    """Return the side in pixels of a square with the area of the video."""
    return arguments.size or SIZES[arguments.preset_name]


def crop_of(arguments: GenerateArguments, faces: Boxes, width: int, height: int) -> Crop:
    """Return the crop of an image of width x height, and its size in the video."""
    size = size_of(arguments)
    if arguments.width is not None and arguments.height is not None:
        new_width, new_height = arguments.width, arguments.height
    elif (arguments.crop or CROPS[arguments.preset_name]) == "head":
        return crop_head(faces, width, height, size)
    else:
        full = crop_full(width, height, size // WAN.token_pixels * WAN.token_pixels)
        new_width, new_height = full.width, full.height

    # The largest centered part with the aspect ratio of the video.
    scale = min(width / new_width, height / new_height)
    x, y = (width - scale * new_width) / 2, (height - scale * new_height) / 2
    return Crop((x, y, x + scale * new_width, y + scale * new_height), new_width, new_height)


def _repeat_box(box: tuple[float, ...], frames: int) -> Boxes:
    return np.tile(np.array(box, np.float32), (frames, 1))


def known_of(
    arguments: GenerateArguments, pixels: Tensor, face: Boxes, lips: Boxes, crop: Crop
) -> tuple[Tensor, Tensor]:
    """Return the task's known pixels [T, 1, Y, X], and the face boxes [T, 4] in the video."""
    boxes, mouth = (torch.from_numpy(boxes_in_crop(b, crop)) for b in (face, lips))
    _, frames, height, width = pixels.shape
    known = known_pixels(
        arguments.task, frames=frames, height=height, width=width, face=boxes, lips=mouth,
        known_frames=KNOWN_FRAMES,
    )  # fmt: skip
    return known, boxes


def no_footage(arguments: GenerateArguments, frames: int) -> Footage:
    """Return the footage of t2v: no pixel is known, and audio may act everywhere."""
    height, width = arguments.height or size_of(arguments), arguments.width or size_of(arguments)
    return Footage(
        torch.zeros(3, 1, height, width).expand(-1, frames, -1, -1),
        torch.zeros(frames, 1, height, width, dtype=torch.bool),
        torch.tensor([[0.0, 0.0, width, height]]).expand(frames, -1),
        None,
    )


def image_footage(arguments: GenerateArguments, frames: int) -> Footage:
    """Return the footage of i2v and flf2v: the first image, and the last."""
    assert arguments.image is not None
    image = read_image(arguments.image)

    # Crop around the face, which the user gives or which is detected.
    if arguments.face is None:
        face, lips = find_face(image, arguments.image, arguments.face_models)
    else:
        face, lips = _repeat_box(arguments.face, 1), _repeat_box(lips_in(arguments.face), 1)
    crop = crop_of(arguments, face, image.shape[1], image.shape[0])

    # Every frame shows the first image; the task's mask selects the known ones.
    pixels = to_pixels(crop_frame(image, crop)[None]).expand(-1, frames, -1, -1)
    if arguments.last_image is not None:
        last = to_pixels(crop_frame(_read_last(arguments.last_image, image), crop)[None])
        pixels = torch.cat([pixels[:, :-1], last], 1)
    faces, mouths = (boxes.repeat(frames, 0) for boxes in (face, lips))
    known, boxes = known_of(arguments, pixels, faces, mouths, crop)
    return Footage(pixels, known, boxes, pixels[:, 0])


def _read_last(path: Path, first: Frames) -> Frames:
    """Return the last image; raise MediaError unless it has the size of the first."""
    last = read_image(path)
    if last.shape != first.shape:
        sizes = [f"{shape[1]}x{shape[0]}" for shape in (last.shape, first.shape)]
        raise MediaError(f"{path}: is {sizes[0]}, the first image {sizes[1]}; scale it to that")
    return last


def open_source(path: Path) -> Probe:
    """Return a video's probe.  Raise MediaError, with the file's name, if it has no frames."""
    if not path.is_file():
        raise MediaError(f"{path}: not there; check the name")
    try:
        return probe(path)
    except MediaError as error:
        raise MediaError(f"{path}: {error}; give another source_video=") from error


def video_footage(arguments: GenerateArguments, frames: int) -> Footage:
    """Return the start of the source video, or for continuation its last frames."""
    assert arguments.source_video is not None
    source = open_source(arguments.source_video)
    continues = arguments.task == "continuation"
    needed, indices = KNOWN_FRAMES if continues else frames, make_grid(source).indices
    if len(indices) < needed:
        remedy = "" if continues else f", or seconds={len(indices) / 25:g}"
        raise MediaError(
            f"{arguments.source_video}: has {len(indices)} frames at 25 a second, need {needed}; "
            f"give a longer video{remedy}"
        )
    indices = indices[-needed:] if continues else indices[:needed]

    # Boxes of face and lips: from the given box, or tracked.
    box = arguments.box or arguments.face
    if box is None:
        face, lips = follow_face(source, indices, arguments.face_models)
    elif arguments.box is not None and arguments.task == "lip_sync":
        face, lips = _repeat_box(face_around(box), needed), _repeat_box(box, needed)
    else:
        face, lips = _repeat_box(box, needed), _repeat_box(lips_in(box), needed)

    # Crop the frames; a continuation repeats its last known frame.
    crop = crop_of(arguments, face, source.width, source.height)
    reader = VideoReader(source, source.width, source.height)
    pixels = to_pixels(np.stack([crop_frame(frame, crop) for frame in reader.read(indices)]))
    repeated = torch.arange(frames).clamp(max=needed - 1)
    pixels = pixels[:, repeated]
    known, boxes = known_of(arguments, pixels, face[repeated], lips[repeated], crop)
    return Footage(pixels, known, boxes, pixels[:, 0])


def footage_of(arguments: GenerateArguments, frames: int) -> Footage:
    """Return the inputs of the task, for a video of `frames` frames."""
    if not TASK_TABLE[arguments.task].has_known:
        return no_footage(arguments, frames)
    return (image_footage if arguments.source_video is None else video_footage)(arguments, frames)


# Clips of a raw dataset, on which the demo networks are fitted and judged


def load_clips(folder: Path, count: int | None = None) -> Clips:
    """Return the first `count` clips of a raw dataset; raise DataError if their sizes differ."""
    dataset = open_dataset(folder)
    if dataset.kind != "raw":
        raise DataError(f"{folder}: holds {dataset.kind} samples; give a dataset of the raw kind")
    # Read all clips, or only the first `count`.
    count = len(dataset) if count is None else min(count, len(dataset))
    if count < 1:
        raise DataError(
            f"{folder}: {count} of its {len(dataset)} clips asked for; need one or more"
        )
    # Frames must have one size, so that they can be stacked.
    members = [dataset.read(i) for i in range(count)]
    frames = [decode_mp4(m["mp4"]) for m in members]
    for key, clip in zip(dataset.keys, frames, strict=False):
        if clip.shape != frames[0].shape:
            raise DataError(
                f"{folder}: clip {key} is {clip.shape[:3]}, the first {frames[0].shape[:3]} "
                "(frames, height, width); prepare them with one frames= and one size="
            )
    # Boxes, and for drawn talkers the shape of the mouth.
    tracks = [decode_tracks(m["tracks.npz"]) for m in members]
    # Audio: 640 samples a frame, at 16 kHz and 25 frames a second.
    length = 640 * frames[0].shape[0]
    audio = [decode_flac(m["flac"])[:length] for m in members]
    for key, track in zip(dataset.keys, audio, strict=False):
        if len(track) < length:
            raise DataError(
                f"{folder}: clip {key} has {len(track)} audio samples, {frames[0].shape[0]} "
                f"frames need {length}; prepare it again"
            )
    return Clips(
        keys=dataset.keys[:count],
        pixels=torch.from_numpy(np.stack(frames)).permute(0, 4, 1, 2, 3).contiguous(),
        samples=torch.from_numpy(np.stack(audio)),
        face=torch.from_numpy(np.stack([t.face for t in tracks])),
        lips=torch.from_numpy(np.stack([t.lips for t in tracks])),
        visemes=_visemes(tracks),
        metadata=[json.loads(m["json"]) for m in members],
    )


def _visemes(tracks: list[Tracks]) -> Tensor | None:
    """Return opening and width of the mouths [B, T, 2]; None if they are missing in any clip."""
    if not all({"opening", "width"} <= set(track.extra) for track in tracks):
        return None
    curves = [np.stack([t.extra["opening"], t.extra["width"]], -1) for t in tracks]
    return torch.from_numpy(np.stack(curves)).float()


def to_frames(pixels: Tensor) -> Frames:
    """Return pixels [3, T, Y, X] in [-1, 1] as frames uint8 [T, Y, X, 3]."""
    scaled = ((pixels.permute(1, 2, 3, 0) + 1) * 127.5).round()
    return np.asarray(scaled.to(torch.uint8).numpy(), np.uint8)


def to_pixels(frames: Frames) -> Tensor:
    """Return frames uint8 [T, Y, X, 3] as pixels [3, T, Y, X] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1
