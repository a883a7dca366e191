"""Masks of the tasks (i2v, lip_sync, ...) in pixels and at latent resolution, and face tokens.

A mask rule returns `known`: 1 for a given pixel, 0 for a generated pixel.  Boxes are
(x0, y0, x1, y1) in pixels, one per frame.  Margins and shapes of the two local tasks are not
published; the paper's figure shows a square over the head of a quarter to a third of the frame's
width, and a disc at the mouth.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from echolab.errors import ConfigError, DataError
from echolab.geometry import WAN, LatentGeometry
from echolab.tasks.table import TASK_TABLE, TASKS

HEAD_MARGIN = 0.35  # margin on each side / size of the face box, to include hair and chin
LIP_MARGIN = 1.5  # diameter of the disc / size of the largest lip box
TOKEN_MARGIN = 0.15  # margin on each side / size of the union face box, for face tokens


class Clip(NamedTuple):
    """The inputs of a mask rule."""

    frames: int
    height: int
    width: int
    face: Tensor  # [T, 4]
    lips: Tensor  # [T, 4]
    known_frames: int

    def all_frames(self, known: bool) -> Tensor:
        """Return a constant mask [T, 1, Y, X]."""
        return torch.full((self.frames, 1, self.height, self.width), known)


def no_pixels(clip: Clip) -> Tensor:
    """Return the mask of text to video: no pixel is given."""
    return clip.all_frames(False)


def first_frames(clip: Clip, count: int) -> Tensor:
    """Return the mask in which the first `count` frames are given."""
    known = clip.all_frames(False)
    known[:count] = True
    return known


def first_and_last(clip: Clip) -> Tensor:
    """Return the mask in which the first and the last frame are given."""
    known = first_frames(clip, 1)
    known[-1] = True
    return known


def _grid(clip: Clip) -> tuple[Tensor, Tensor]:
    """Return the centers of the pixel rows [1, Y, 1] and columns [1, 1, X]."""
    return torch.arange(clip.height)[None, :, None] + 0.5, torch.arange(clip.width) + 0.5


def outside_head(clip: Clip) -> Tensor:
    """Return the mask of avatar sync: a box that follows the head is generated."""
    # Test the pixel centers against the box of each frame.
    boxes = enlarge_boxes(clip.face, HEAD_MARGIN)[:, :, None, None]  # [T, 4, 1, 1]
    x0, y0, x1, y1 = boxes.unbind(1)
    rows, columns = _grid(clip)
    inside = (rows >= y0) & (rows <= y1) & (columns >= x0) & (columns <= x1)
    return ~inside[:, None]


def outside_lips(clip: Clip) -> Tensor:
    """Return the mask of lip sync: a disc over the mouth is generated.

    The disc has the same size in all frames and moves with the face box, at the median position of
    the lips relative to the face: a disc fitted to each frame's lips would reveal how far the mouth
    is open.
    """
    # Use the median offset from the face and a constant radius.
    face_x, face_y = centers(clip.face).unbind(1)
    offset_x, offset_y = (centers(clip.lips) - centers(clip.face)).median(0).values
    radius = LIP_MARGIN / 2 * (clip.lips[:, 2:] - clip.lips[:, :2]).max()
    rows, columns = _grid(clip)
    across = columns - (face_x + offset_x)[:, None, None]
    down = rows - (face_y + offset_y)[:, None, None]
    return (across.square() + down.square() > radius.square())[:, None]


# Keys are the values of `table.Task.mask`.
MASK_RULES: dict[str, Callable[[Clip], Tensor]] = {
    "nothing": no_pixels,
    "first_frame": lambda clip: first_frames(clip, 1),
    "first_frames": lambda clip: first_frames(clip, clip.known_frames),
    "first_and_last_frame": first_and_last,
    "outside_head": outside_head,
    "outside_lips": outside_lips,
}


def centers(boxes: Tensor) -> Tensor:
    """Return the centers [T, 2], x and y, of boxes [T, 4]."""
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def enlarge_boxes(boxes: Tensor, margin: float) -> Tensor:
    """Return boxes [T, 4] with `margin` times their size added on each side."""
    size = boxes[:, 2:] - boxes[:, :2]
    return torch.cat([boxes[:, :2] - margin * size, boxes[:, 2:] + margin * size], 1)


def _check_boxes(boxes: Tensor, name: str, frames: int) -> Tensor:
    """Return boxes in fp32; raise DataError unless they are finite [frames, 4]."""
    # A damaged dataset may hold boxes of another shape, or NaN.
    boxes = torch.as_tensor(boxes, dtype=torch.float32)
    if boxes.shape != (frames, 4) or not boxes.isfinite().all():
        raise DataError(
            f"{name} boxes: shape {tuple(boxes.shape)}, finite {bool(boxes.isfinite().all())}; "
            f"need finite [{frames}, 4]: prepare the clip again"
        )
    return boxes


def known_pixels(
    task: str,
    *,
    frames: int,
    height: int,
    width: int,
    face: Tensor,
    lips: Tensor,
    known_frames: int = 8,
) -> Tensor:
    """Return the mask of given pixels of a clip: bool [T, 1, Y, X].

    `face` and `lips` are boxes [T, 4]; `known_frames` applies to continuation (8 as in the released
    chunked inference).  Raise ConfigError for an unknown task, DataError for bad boxes.
    """
    # Check the arguments, then apply the task's mask rule.
    if task not in TASK_TABLE:
        raise ConfigError(f"task={task}: unknown; one of {', '.join(TASKS)}")
    face, lips = _check_boxes(face, "face", frames), _check_boxes(lips, "lip", frames)
    return MASK_RULES[TASK_TABLE[task].mask](Clip(frames, height, width, face, lips, known_frames))


def gray_out(pixels: Tensor, known: Tensor) -> Tensor:
    """Return pixels [T, 3, Y, X] in [-1, 1], mid-gray (0) outside of known [T, 1, Y, X]."""
    return pixels * known.to(pixels.dtype)


def latent_known(known: Tensor, geometry: LatentGeometry = WAN) -> Tensor:
    """Return known pixels [T, 1, Y, X] at latent resolution: float [4, F, H, W].

    The four channels are the four frames of a latent frame: channel c of latent frame i is frame
    4i - 3 + c; the first frame fills all four channels of latent frame 0.  Space is downsampled by
    bilinear interpolation, so borders are fractional; frames are not mixed.  (EchoMimicV3
    `pipeline_wan_fun_inpaint_audio.py`, 654-662, where the masks are still inverted.)
    """
    # Sizes must be multiples of the latent strides.
    frames, _, height, width = known.shape
    stride, space = geometry.time_stride, geometry.space_stride
    if not geometry.is_clip_length(frames):
        lengths = geometry.clip_lengths
        raise DataError(f"{frames} frames: latent frames need {lengths}; trim the clip")
    if height % space or width % space:
        raise DataError(f"{height}x{width} pixels: need multiples of {space}; resize the clip")
    # Downsample space by interpolation, and regroup frames into channels.
    small = F.interpolate(known.float(), geometry.latent_size(height, width), mode="bilinear")
    groups = torch.cat([small[:1].expand(stride, -1, -1, -1), small[1:]])
    return rearrange(groups, "(f c) 1 h w -> c f h w", c=stride)


def face_tokens(face: Tensor, height: int, width: int, geometry: LatentGeometry = WAN) -> Tensor:
    """Return the tokens that attend to audio: float [P], 1 if the face touches the token.

    `face` are boxes [T, 4] in pixels; `height` and `width` count latents.  The face is the union of
    its boxes over the clip, enlarged by a margin; the released model uses the box of the first
    frame, which a moving head leaves.  Row-major over (height / 2, width / 2) tokens.
    """
    face = _check_boxes(face, "face", len(face))
    # Compute the union box over all frames, in units of tokens.
    union = torch.cat([face[:, :2].amin(0), face[:, 2:].amax(0)])[None]
    x0, y0, x1, y1 = (enlarge_boxes(union, TOKEN_MARGIN)[0] / geometry.token_pixels).tolist()
    patch = geometry.patch
    rows, columns = torch.arange(height // patch)[:, None], torch.arange(width // patch)
    inside = (rows + 1 > y0) & (rows < y1) & (columns + 1 > x0) & (columns < x1)
    return inside.float().flatten()
