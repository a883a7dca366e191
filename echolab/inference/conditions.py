"""Encode the conditions of a video: features of text, image and audio, and the known pixels."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from echolab.encoders.demo import SAMPLES_PER_FRAME
from echolab.encoders.encode import Encoders
from echolab.inference.inputs import Footage
from echolab.tasks.masks import face_tokens, gray_out, latent_known
from echolab.types import Conditions


class Scene(NamedTuple):
    """The conditions of a video of T = 4n + 1 frames, or of a chunk of it."""

    text: Tensor  # [L, D]
    negative: Tensor | None  # [1, L, D] features of the negative prompt, if it is used
    image: Tensor  # [N, D] zeros without an image
    audio: Tensor  # [2 T, D], or [T, ...] with released encoders; zeros without audio
    samples: Tensor | None  # [640 T] the audio samples
    face: Tensor  # [P]
    pixels: Tensor  # [3, T, Y, X] in [-1, 1]
    known: Tensor  # [T, 1, Y, X]

    def chunk(self, start: int, stop: int, previous: Tensor | None) -> "Scene":
        """Return frames [start, stop), the first k known from `previous` [3, k, Y, X] if given."""
        # The demo encoder has two audio tokens per frame, released encoders one entry.
        per_frame = len(self.audio) // len(self.known)
        pixels, known = self.pixels[:, start:stop].clone(), self.known[start:stop].clone()
        # The first frames repeat the last ones of the previous chunk.
        if previous is not None:
            pixels[:, : previous.shape[1]], known[: previous.shape[1]] = previous, True
        return self._replace(
            audio=self.audio[per_frame * start : per_frame * stop],
            samples=None
            if self.samples is None
            else self.samples[start * SAMPLES_PER_FRAME : stop * SAMPLES_PER_FRAME],
            pixels=pixels,
            known=known,
        )


@torch.no_grad()
def encode_scene(
    encoders: Encoders, footage: Footage, samples: Tensor | None, prompt: str, negative: str | None
) -> Scene:
    """Return the features of a full video.  `samples` and `negative` are None if not used."""
    _, frames, height, width = footage.pixels.shape
    geometry = encoders.geometry
    # Run one encoder after another, so that each can free its memory for the next.
    text = encoders.text(prompt)
    negative_text = None if negative is None else encoders.text(negative)[None]
    image = encoders.image(footage.image)
    # Cut the audio to the length of the video, or pad it with silence.
    needed = SAMPLES_PER_FRAME * frames
    trimmed = torch.zeros(needed) if samples is None else samples[:needed]
    padded = torch.cat([trimmed, trimmed.new_zeros(needed - len(trimmed))])
    audio = encoders.audio(padded, frames)
    return Scene(
        text=text,
        negative=negative_text,
        image=image,
        audio=torch.zeros_like(audio) if samples is None else audio,
        samples=None if samples is None else padded,
        face=face_tokens(footage.face, *geometry.latent_size(height, width), geometry),
        pixels=footage.pixels,
        known=footage.known,
    )


@torch.no_grad()
def conditions_of(encoders: Encoders, scene: Scene, device: torch.device) -> Conditions:
    """Return the network's conditions of a scene or a chunk: a batch of one.

    If no pixel is known, the known latents are zeros, not the latents of a gray video (released
    pipeline, lines 629-633).
    """
    known = latent_known(scene.known, encoders.geometry)
    if scene.known.any():
        masked = gray_out(rearrange(scene.pixels, "c t y x -> t c y x"), scene.known)
        latents = encoders.video.encode(rearrange(masked, "t c y x -> 1 c t y x"))
    else:
        latents = known.new_zeros(1, encoders.geometry.channels, *known.shape[1:])
    conditions = Conditions(
        text=scene.text[None], image=scene.image[None], audio=scene.audio[None],
        face=scene.face[None], known=known[None], known_latents=latents,
    )  # fmt: skip
    return Conditions(*(part.to(device) for part in conditions))


def encode_window_audio(encoders: Encoders, scene: Scene, start: int, stop: int) -> Tensor | None:
    """Return the audio features of latent frames [start, stop), encoded as a separate clip.

    Return None without audio.  The demo encoder's tokens depend on their position in the clip, so a
    network trained on clips of one length misreads tokens of later windows cut from a long clip.
    """
    if scene.samples is None:
        return None
    # Cut the samples of the window, and encode them separately.
    frames = encoders.geometry.frames(stop - start)
    first = encoders.geometry.time_stride * start
    part = scene.samples[first * SAMPLES_PER_FRAME :][: frames * SAMPLES_PER_FRAME]
    return encoders.audio(part, frames)
