"""A clip to everything that training needs of it: latents, known latents a task, conditions."""

import hashlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from einops import rearrange
from safetensors.torch import save
from torch import Tensor, nn

from echolab.encoders.demo_audio import encode_sound
from echolab.encoders.demo_image import encode_picture
from echolab.encoders.demo_text import encode_words
from echolab.encoders.demo_vae import CausalAutoencoder
from echolab.tasks.masks import TASKS, face_tokens, grey_out, known_pixels, latent_known

FACE_EMPHASIS, LIP_EMPHASIS = 1.0, 4.0  # added to the weight of the error there


class Autoencoder(Protocol):
    """Pixels [B, 3, T, Y, X] in [-1, 1] to normalised latents [B, 16, F, Y / 8, X / 8] and back."""

    def encode(self, pixels: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class Encoders(NamedTuple):
    """The frozen encoders of a run, and what identifies each.  All give fp32."""

    video: Autoencoder
    text: Callable[[str], Tensor]  # caption -> [L, D]
    image: Callable[[Tensor | None], Tensor]  # [3, Y, X] -> [N, D]; zeros without a picture
    audio: Callable[[Tensor, int], Tensor]  # samples, frames -> [2 T, D]; Flash: [T, layers, D]
    fingerprints: dict[str, str]


def fingerprint(net: nn.Module) -> str:
    """The sha256 of a network's tensors, by name."""
    return hashlib.sha256(
        save({k: v.contiguous() for k, v in net.state_dict().items()})
    ).hexdigest()


def demo_encoders(video: CausalAutoencoder) -> Encoders:
    """The stand-ins around a fitted autoencoder."""
    names = {"text": "word-pairs-32", "image": "patches-16", "audio": "log-mel-5x40"}
    return Encoders(
        video, encode_words, encode_picture, encode_sound, {"video": fingerprint(video), **names}
    )


def covered(boxes: Tensor, height: int, width: int) -> Tensor:
    """The share of each latent's four frames in which boxes [T, 4] touch it: [1, F, H, W]."""
    rows, columns = torch.arange(height) * 8 + 4, torch.arange(width) * 8 + 4  # centres in pixels
    x0, y0, x1, y1 = (boxes[:, None, k] for k in range(4))
    inside_y = ((rows >= y0 - 4) & (rows <= y1 + 4)).float()  # [T, H]
    inside_x = ((columns >= x0 - 4) & (columns <= x1 + 4)).float()  # [T, W]
    frames = inside_y[:, :, None] * inside_x[:, None, :]
    fours = torch.cat([frames[:1].expand(4, -1, -1), frames[1:]])
    return rearrange(fours, "(f k) h w -> f k h w", k=4).mean(1)[None]


def emphasis(face: Tensor, lips: Tensor) -> Tensor:
    """How much each place counts, with mean 1, from what face and lips cover [1, F, H, W]."""
    weight = 1 + FACE_EMPHASIS * face + LIP_EMPHASIS * lips
    return weight / weight.mean()


@torch.no_grad()
def encode_clip(
    encoders: Encoders, pixels: Tensor, samples: Tensor, caption: str, face: Tensor, lips: Tensor
) -> dict[str, Tensor]:
    """The tensors of one encoded sample: pixels [3, T, Y, X] in [-1, 1], sound at 16 kHz."""
    return {
        **encode_pixels(encoders.video, pixels, face, lips),
        "text": encoders.text(caption),
        "image": encoders.image(pixels[:, 0]),
        "audio": encoders.audio(samples, pixels.shape[1]),
    }


@torch.no_grad()
def encode_pixels(
    video: Autoencoder, pixels: Tensor, face: Tensor, lips: Tensor
) -> dict[str, Tensor]:
    """What is seen of a clip [3, T, Y, X]: latents, known latents a task, face, weight and lips.

    `t2v` is given nothing, so it has no known latents: the network gets zeros.
    """
    _, frames, height, width = pixels.shape
    tasks = [task for task in TASKS if task != "t2v"]
    known = {
        task: known_pixels(task, frames=frames, height=height, width=width, face=face, lips=lips)
        for task in tasks
    }
    moving = rearrange(pixels, "c t y x -> t c y x")
    views = torch.stack([moving, *(grey_out(moving, known[task]) for task in tasks)])
    latents = video.encode(rearrange(views, "n t c y x -> n c t y x"))
    lip_cover = covered(lips, height // 8, width // 8)
    tensors = {
        "latents": latents[0],
        "face": face_tokens(face, height // 8, width // 8),
        "weight": emphasis(covered(face, height // 8, width // 8), lip_cover),
        "lips": lip_cover,
    }
    for place, task in enumerate(tasks, start=1):
        tensors[f"known.{task}"] = latent_known(known[task])
        tensors[f"known_latents.{task}"] = latents[place]
    return tensors
