"""Videos longer than a clip: windows that share every denoising step, or chunks in sequence.

Windows are overlapping ranges of latent frames.  Each window is denoised with full guidance, and
neighbors are cross-faded in their overlap (EchoMimicV3 `pipeline`, 775-888, without its failures at
L <= P).  An Euler step is linear in the velocity, so blending velocities equals blending steps.

Chunks are sampled one after another.  The last decoded frames of a chunk are the known frames of
the next chunk (EchoMimicV3 `infer_preview.py`, 299-377: 113 frames, of which the first 8 are
known); the shared frames are cross-faded as pixels.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from echolab.diffusion.pipeline import (
    SOLVERS,
    SamplerConfig,
    check_clip_length,
    guided_velocity,
    sampler_sigmas,
)
from echolab.diffusion.solvers import OnStep, VelocityFunction
from echolab.diffusion.teacache import Net, branch_of
from echolab.errors import ConfigError
from echolab.geometry import WAN, LatentGeometry
from echolab.types import Conditions

Span = tuple[int, int]  # (start, stop)


def windows(latent_frames: int, size: int, overlap: int) -> list[Span]:
    """Return (start, stop) of windows of `size` frames that cover all; the last may be shorter.

    windows(58, 29, 8) = [(0, 29), (21, 50), (42, 58)].
    """
    if not 0 <= overlap < size:
        raise ConfigError(f"overlap={overlap}: must be 0 or more and below the window's {size}")
    # Place windows at a fixed stride until one reaches the end.
    stride, starts = size - overlap, [0]
    while starts[-1] + size < latent_frames:
        starts.append(starts[-1] + stride)
    return [(start, min(start + size, latent_frames)) for start in starts]


def window_latents(config: SamplerConfig, geometry: LatentGeometry = WAN) -> int:
    """Return the number of latent frames of a window."""
    return geometry.latent_frames(config.window)


def blend_weights(spans: Sequence[Span]) -> list[Tensor]:
    """Return the weights [stop - start] of each window, which sum to 1 at every frame.

    A window fades in from 0, because its first frame is conditioned on the reference image and not
    on the previous frame.
    """
    # In each overlap fade the new window in and all earlier windows out, with the same ramp.
    weights = [torch.ones(stop - start) for start, stop in spans]
    for index, (start, _) in enumerate(spans[1:], start=1):
        overlap = spans[index - 1][1] - start
        if overlap <= 0:
            continue
        fade = torch.linspace(0, 1, overlap) if overlap > 1 else torch.full((1,), 0.5)
        weights[index][:overlap] *= fade
        for earlier, (_, stop) in zip(weights[:index], spans, strict=False):
            shared = stop - start  # with a small stride more than two windows overlap
            if shared > 0:
                earlier[-shared:] *= 1 - fade[:shared]
    return weights


def window_conditions(conditions: Conditions, start: int, stop: int) -> Conditions:
    """Return the conditions of one window of a long video: its audio and known pixels.

    Known pixels in the window keep their position.  If there are none, the window gets the video's
    first image as its first frame (which the fade hides) and gray afterwards, as in the released
    code.  Audio with two tokens per frame is sliced as in the release to [8 start, 8 stop): three
    frames more than the window has, to which its last latent frame attends.  Audio with one entry
    per frame (Flash) is sliced to the window's 4 (n - 1) + 1 frames.
    """
    # The mask has one channel per frame of a latent frame.
    stride, latent_frames = conditions.known.shape[1:3]
    count = stop - start

    # Slice of the audio features.
    per_frame = conditions.audio.shape[1] // (stride * (latent_frames - 1) + 1)
    frames = stride * count if per_frame > 1 else stride * (count - 1) + 1
    first = stride * start * per_frame

    # Use a frame's known pixels at its own position, or else those at the start of the video.
    # Do not repeat known frames after the first, such as those of a clip to continue.
    has_known = conditions.known.transpose(0, 2).flatten(1).any(1)  # [F]
    uses_own = has_known[start:stop] | has_known[:count]
    uses_own[0] = has_known[start]
    sources = torch.arange(count, device=has_known.device) + start * uses_own
    return conditions._replace(
        audio=conditions.audio[:, first : first + frames * per_frame],
        known=conditions.known[:, :, sources],
        known_latents=conditions.known_latents[:, :, sources],
    )


def windowed_velocity(
    velocities: Sequence[VelocityFunction], spans: Sequence[Span]
) -> VelocityFunction:
    """Return the blended velocity function of a long video from those of its windows."""
    weights = blend_weights(spans)

    def velocity(noisy_latents: Tensor, sigma: Tensor) -> Tensor:
        blended = torch.zeros_like(noisy_latents, dtype=torch.float32)
        # Sum the weighted velocities of the windows; the weights sum to 1 at every frame.
        for (start, stop), weight, part in zip(spans, weights, velocities, strict=True):
            faded = weight.to(blended.device)[:, None, None]
            blended[:, :, start:stop] += faded * part(noisy_latents[:, :, start:stop], sigma)
        return blended

    return velocity


@torch.no_grad()
def sample_windows(
    net: Net,
    conditions: Conditions,
    config: SamplerConfig,
    noise: Tensor,
    *,
    negative: Tensor | None = None,
    cfg: str = "batched",
    conditions_of: Callable[[Conditions, int, int], Conditions] = window_conditions,
    dtype: torch.dtype = torch.float32,
    on_step: OnStep | None = None,
) -> Tensor:
    """Return latents [B, C, F, H, W] from noise of that shape; run the network in `dtype`.

    A clip up to the length of a window is one window.  `negative` [1, L, D] holds the states of the
    negative text; `cfg` is a key of `guidance.CFG_MODES`; `conditions_of` returns the conditions of
    latent frames [start, stop).
    """
    geometry = WAN._replace(time_stride=conditions.known.shape[1])
    # Each window has separate conditions and a separate step cache.
    spans = windows(noise.shape[2], window_latents(config, geometry), config.overlap)
    velocities = [
        guided_velocity(
            branch_of(net, f"window {start}"), conditions_of(conditions, start, stop),
            config, negative, cfg,
        )
        for start, stop in spans
    ]  # fmt: skip
    # The solver integrates the blended velocity, with one history for the full video.
    with torch.autocast(noise.device.type, dtype, enabled=dtype != torch.float32):
        solver = SOLVERS[config.solver]
        return solver(windowed_velocity(velocities, spans), noise, sampler_sigmas(config), on_step)


def chunk_spans(
    frames: int, size: int, overlap: int, fill: bool = False, geometry: LatentGeometry = WAN
) -> list[Span]:
    """Return (start, stop) in frames of chunks that cover a video; each is 4n + 1 frames long.

    All chunks are `size` long except the last, which ends up to three frames after the video, or
    is `size` long too if `fill`.  chunk_spans(229, 113, 8) = [(0, 113), (105, 218), (210, 231)].
    """
    check_clip_length("window", size, geometry)
    if not 1 <= overlap < size:
        raise ConfigError(f"overlap={overlap}: must be 1 or more and below the window's {size}")
    # Each chunk begins `overlap` frames before the end of the previous chunk.
    starts = [0]
    while starts[-1] + size < frames:
        starts.append(starts[-1] + size - overlap)
    # Unless `fill`, the last chunk is as short as the latent stride allows.
    remaining = geometry.covering_latent_frames(frames - starts[-1])
    last = size if fill else geometry.frames(remaining)
    return [(start, start + size) for start in starts[:-1]] + [(starts[-1], starts[-1] + last)]


def cross_fade(before: Tensor, after: Tensor, overlap: int) -> Tensor:
    """Join two videos [3, T, Y, X]; the last `overlap` frames of the first fade into the second.

    The fade is linspace(0, 1, overlap), as released: its first frame is the first video's and its
    last frame the second video's.
    """
    fade = torch.linspace(0, 1, overlap, device=before.device)[:, None, None]
    shared = torch.lerp(before[:, -overlap:], after[:, :overlap], fade)
    return torch.cat([before[:, :-overlap], shared, after[:, overlap:]], 1)


def join_chunks(chunks: Sequence[Tensor], overlap: int) -> Tensor:
    """Return chunks [3, T, Y, X] as one video, cross-faded in their overlaps."""
    video = chunks[0]
    for chunk in chunks[1:]:
        video = cross_fade(video, chunk, overlap)
    return video
