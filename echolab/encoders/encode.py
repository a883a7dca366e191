"""Encode a clip for training: latents, known latents for each task, conditions."""

import hashlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from einops import rearrange
from safetensors.torch import save
from torch import Tensor, nn

from echolab.encoders.demo import CausalAutoencoder, encode_audio, encode_caption, encode_image
from echolab.geometry import WAN, LatentGeometry
from echolab.tasks.masks import face_tokens, gray_out, known_pixels, latent_known
from echolab.tasks.table import KNOWN_TASKS

FACE_EMPHASIS, LIP_EMPHASIS = 1.0, 4.0  # added to the loss weight in the face and lip boxes


class Autoencoder(Protocol):
    """Maps pixels [B, 3, T, Y, X] in [-1, 1] to normalized latents [B, C, F, H, W] and back."""

    def encode(self, pixels: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class Encoders(NamedTuple):
    """The frozen encoders of a run and their fingerprints.  All return fp32."""

    video: Autoencoder
    text: Callable[[str], Tensor]  # caption -> [L, D]
    image: Callable[[Tensor | None], Tensor]  # [3, Y, X] -> [N, D]; zeros without an image
    audio: Callable[[Tensor, int], Tensor]  # samples, frames -> [2 T, D]; Flash: [T, layers, D]
    fingerprints: dict[str, str]
    geometry: LatentGeometry = WAN


def fingerprint(net: nn.Module) -> str:
    """Return the sha256 of a network's state dict."""
    return hashlib.sha256(
        save({k: v.contiguous() for k, v in net.state_dict().items()})
    ).hexdigest()


def demo_encoders(video: CausalAutoencoder) -> Encoders:
    """Return the demo's encoders with a fitted autoencoder."""
    names = {"text": "word-pairs-32", "image": "patches-16", "audio": "log-mel-5x40"}
    return Encoders(
        video, encode_caption, encode_image, encode_audio,
        {"video": fingerprint(video), **names}, video.geometry,
    )  # fmt: skip


def covered(boxes: Tensor, height: int, width: int, geometry: LatentGeometry = WAN) -> Tensor:
    """Return the fraction [1, F, H, W] of each latent's frames in which a box [T, 4] touches it."""
    side, stride = geometry.space_stride, geometry.time_stride
    half = side // 2
    # A box touches a latent if it overlaps the latent's square of pixels.
    rows, columns = torch.arange(height) * side + half, torch.arange(width) * side + half  # centers
    x0, y0, x1, y1 = (boxes[:, None, k] for k in range(4))
    inside_y = ((rows >= y0 - half) & (rows <= y1 + half)).float()  # [T, H]
    inside_x = ((columns >= x0 - half) & (columns <= x1 + half)).float()  # [T, W]
    frames = inside_y[:, :, None] * inside_x[:, None, :]
    # The first latent frame covers one frame: repeat it, so that all groups have equal length.
    groups = torch.cat([frames[:1].expand(stride, -1, -1), frames[1:]])
    return rearrange(groups, "(f k) h w -> f k h w", k=stride).mean(1)[None]


def emphasis(face: Tensor, lips: Tensor) -> Tensor:
    """Return the loss weight, mean 1, from the coverage of face and lips [1, F, H, W] each."""
    weight = 1 + FACE_EMPHASIS * face + LIP_EMPHASIS * lips
    return weight / weight.mean()


@torch.no_grad()
def encode_clip(
    encoders: Encoders, pixels: Tensor, samples: Tensor, caption: str, face: Tensor, lips: Tensor
) -> dict[str, Tensor]:
    """Return the tensors of one sample: pixels [3, T, Y, X] in [-1, 1], audio at 16 kHz."""
    return {
        **encode_pixels(encoders, pixels, face, lips),
        "text": encoders.text(caption),
        "image": encoders.image(pixels[:, 0]),
        "audio": encoders.audio(samples, pixels.shape[1]),
    }


@torch.no_grad()
def encode_pixels(
    encoders: Encoders, pixels: Tensor, face: Tensor, lips: Tensor
) -> dict[str, Tensor]:
    """Return the visual tensors of a clip [3, T, Y, X]: latents, known latents, face, weight, lips.

    A task without given pixels has no known latents: the network gets zeros.
    """
    _, frames, height, width = pixels.shape
    # Mask of the given pixels of each task.
    known = {
        task: known_pixels(task, frames=frames, height=height, width=width, face=face, lips=lips)
        for task in KNOWN_TASKS
    }
    frames_first = rearrange(pixels, "c t y x -> t c y x")
    # Encode the clip and all masked versions in one batch; unknown pixels are gray.
    masked = [gray_out(frames_first, known[task]) for task in KNOWN_TASKS]
    views = torch.stack([frames_first, *masked])
    latents = encoders.video.encode(rearrange(views, "n t c y x -> n c t y x"))
    geometry = encoders.geometry
    size = geometry.latent_size(height, width)
    # Coverage of face and lips at latent resolution.
    lip_cover = covered(lips, *size, geometry)
    tensors = {
        "latents": latents[0],
        "face": face_tokens(face, *size, geometry),
        "weight": emphasis(covered(face, *size, geometry), lip_cover),
        "lips": lip_cover,
    }
    for index, task in enumerate(KNOWN_TASKS, start=1):
        tensors[f"known.{task}"] = latent_known(known[task], geometry)
        tensors[f"known_latents.{task}"] = latents[index]
    return tensors
