"""Long video: overlapping windows of latent frames that share every denoising step.

Each window is denoised with the whole guidance, and neighbours are cross-faded in their overlap
(EchoMimicV3 `pipeline`, 775-888, without its failures at L <= P).  An Euler step is linear in the
velocity, so blending velocities is blending steps.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from echolab.errors import ConfigError
from echolab.types import Conditions

VelocityFunction = Callable[[Tensor, Tensor], Tensor]


def windows(latent_frames: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """(start, stop) of windows of `size` frames that cover all; the last may be shorter.

    windows(58, 29, 8) = [(0, 29), (21, 50), (42, 58)].
    """
    if not 0 <= overlap < size:
        raise ConfigError(f"overlap={overlap}: must be 0 or more and below the window's {size}")
    stride, starts = size - overlap, [0]
    while starts[-1] + size < latent_frames:
        starts.append(starts[-1] + stride)
    return [(start, min(start + size, latent_frames)) for start in starts]


def blend_weights(spans: Sequence[tuple[int, int]]) -> list[Tensor]:
    """For each window its weights [stop - start]; over the windows they sum to 1 at every frame.

    A new window fades in from 0: its first frame is the reference picture, not what belongs there.
    """
    weights = [torch.ones(stop - start) for start, stop in spans]
    for index, (start, _) in enumerate(spans[1:], start=1):
        overlap = spans[index - 1][1] - start
        if overlap <= 0:
            continue
        fade = torch.linspace(0, 1, overlap) if overlap > 1 else torch.full((1,), 0.5)
        weights[index][:overlap] *= fade
        for earlier, (_, stop) in zip(weights[:index], spans, strict=False):
            shared = stop - start  # of a narrow stride more than the last window reaches in
            if shared > 0:
                earlier[-shared:] *= 1 - fade[:shared]
    return weights


def window_conditions(conditions: Conditions, start: int, stop: int) -> Conditions:
    """The conditions of one window of a whole video: its own sound, and the pixels it is given.

    Known pixels that lie in the window stay where they are.  Where there are none it gets the
    video's first picture as its own first frame (the fade hides it), and the grey after it, as the
    released code does.  Sound: two tokens a frame are cut as released, [8 start, 8 stop), which
    is three frames more than the window has, but its last latent frame hears them; one entry a
    frame (Flash) is cut to the window's 4 (n - 1) + 1 frames.
    """
    # A mask has one channel for each frame of a latent frame.
    stride, latent_frames = conditions.known.shape[1:3]
    count = stop - start
    per_frame = conditions.audio.shape[1] // (stride * (latent_frames - 1) + 1)
    frames = stride * count if per_frame > 1 else stride * (count - 1) + 1
    first = stride * start * per_frame
    own = conditions.known.transpose(0, 2).flatten(1).any(1)  # [F] which frames hold known pixels
    # More than one known frame at the beginning, such as a clip to go on from, stays there.
    takes_own = own[start:stop] | own[:count]
    takes_own[0] = own[start]
    places = torch.arange(count, device=own.device) + start * takes_own
    return conditions._replace(
        audio=conditions.audio[:, first : first + frames * per_frame],
        known=conditions.known[:, :, places],
        known_latents=conditions.known_latents[:, :, places],
    )


def windowed(
    velocities: Sequence[VelocityFunction], spans: Sequence[tuple[int, int]]
) -> VelocityFunction:
    """One velocity function for the whole video from one for each window."""
    weights = blend_weights(spans)

    def velocity(noisy_latents: Tensor, sigma: Tensor) -> Tensor:
        whole = torch.zeros_like(noisy_latents, dtype=torch.float32)
        for (start, stop), weight, part in zip(spans, weights, velocities, strict=True):
            faded = weight.to(whole.device)[:, None, None]
            whole[:, :, start:stop] += faded * part(noisy_latents[:, :, start:stop], sigma)
        return whole

    return velocity
