"""A whole video's conditions: features of what is said and heard, and the pixels that are given."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from echolab.encoders.demo_audio import SAMPLES_PER_FRAME
from echolab.encoders.encode import Encoders
from echolab.inference.inputs import Footage
from echolab.tasks.masks import face_tokens, grey_out, latent_known
from echolab.types import Conditions


class Scene(NamedTuple):
    """Everything that a video of T = 4n + 1 frames, or a chunk of it, is made from."""

    text: Tensor  # [L, D]
    negative: Tensor | None  # [1, L, D] what is not to be seen; None where nobody asks
    image: Tensor  # [N, D] zeros where there is no picture
    audio: Tensor  # [2 T, D], or one entry a frame; zeros where there is no sound
    samples: Tensor | None  # [640 T] the sound itself
    face: Tensor  # [P]
    pixels: Tensor  # [3, T, Y, X] in [-1, 1]
    known: Tensor  # [T, 1, Y, X]

    def chunk(self, start: int, stop: int, before: Tensor | None) -> "Scene":
        """Frames [start, stop), whose first are those that `before` [3, k, Y, X] ended with."""
        per_frame = len(self.audio) // len(self.known)
        pixels, known = self.pixels[:, start:stop].clone(), self.known[start:stop].clone()
        if before is not None:
            pixels[:, : before.shape[1]], known[: before.shape[1]] = before, True
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
    """The features of a whole video, encoded at once; None for no sound and for no negative."""
    _, frames, height, width = footage.pixels.shape
    geometry = encoders.geometry
    # One encoder after another: where memory is short each makes room for the next.
    said = encoders.text(prompt)
    unsaid = None if negative is None else encoders.text(negative)[None]
    image = encoders.image(footage.picture)
    needed = SAMPLES_PER_FRAME * frames
    sound = torch.zeros(needed) if samples is None else samples[:needed]
    padded = torch.cat([sound, sound.new_zeros(needed - len(sound))])
    audio = encoders.audio(padded, frames)
    return Scene(
        text=said,
        negative=unsaid,
        image=image,
        audio=torch.zeros_like(audio) if samples is None else audio,
        samples=None if samples is None else padded,
        face=face_tokens(footage.face, *geometry.latent_size(height, width), geometry),
        pixels=footage.pixels,
        known=footage.known,
    )


@torch.no_grad()
def conditions_of(encoders: Encoders, scene: Scene, device: torch.device) -> Conditions:
    """What the network is told of a scene or a chunk: a batch of one.

    Where no pixel is known the known latents are zeros, not those of a grey video (the released
    pipeline, 629-633).
    """
    known = latent_known(scene.known, encoders.geometry)
    if scene.known.any():
        moving = grey_out(rearrange(scene.pixels, "c t y x -> t c y x"), scene.known)
        latents = encoders.video.encode(rearrange(moving, "t c y x -> 1 c t y x"))
    else:
        latents = known.new_zeros(1, encoders.geometry.channels, *known.shape[1:])
    told = Conditions(
        text=scene.text[None], image=scene.image[None], audio=scene.audio[None],
        face=scene.face[None], known=known[None], known_latents=latents,
    )  # fmt: skip
    return Conditions(*(part.to(device) for part in told))


def heard_alone(encoders: Encoders, scene: Scene, start: int, stop: int) -> Tensor | None:
    """The sound of latent frames [start, stop), encoded by itself; None where there is none.

    The stand-in's tokens tell their place in the clip, so a network that has seen clips of one
    length mishears those of later windows when they are cut from a whole.
    """
    if scene.samples is None:
        return None
    frames = encoders.geometry.frames(stop - start)
    first = encoders.geometry.time_stride * start
    part = scene.samples[first * SAMPLES_PER_FRAME :][: frames * SAMPLES_PER_FRAME]
    return encoders.audio(part, frames)
