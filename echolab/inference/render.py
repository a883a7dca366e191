"""Render a scene to pixels, by joint windows or chunk after chunk, and postprocess the frames."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from echolab.data.media import Frames
from echolab.diffusion.long_video import (
    chunk_spans,
    join_chunks,
    sample_windows,
    window_conditions,
    window_latents,
    windows,
)
from echolab.diffusion.pipeline import SamplerConfig, sampler_timesteps
from echolab.diffusion.sigmas import draw_noise
from echolab.diffusion.teacache import WAN_1B3, CachePlan, Net, step_cached
from echolab.encoders.encode import Encoders
from echolab.geometry import WAN, LatentGeometry
from echolab.inference.conditions import Scene, conditions_of, encode_window_audio
from echolab.types import Conditions

FEATHER = 8.0  # pixels per latent, since the network sees the mask at this resolution
FEATHER_SHARE = 0.25  # limit as a fraction of the generated part's radius, to keep its center

Advance = Callable[[int, str], None]


class Renderer(NamedTuple):
    """The network and all other inputs of sampling, except the scene."""

    net: nn.Module
    encoders: Encoders
    recipe: SamplerConfig
    cfg: str  # one of guidance.CFG_MODES
    seed: int
    cache: float  # TeaCache threshold; 0: no cache
    coefficients: Sequence[float] = WAN_1B3
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32


def spans_of(
    frames: int, recipe: SamplerConfig, long_video: str, geometry: LatentGeometry = WAN
) -> list[tuple[int, int]]:
    """Return the windows (in latent frames) or the chunks (in frames) of a video."""
    if long_video == "chunked":
        return chunk_spans(frames, recipe.window, recipe.overlap, recipe.by_clip, geometry)
    # Windows cover the video; with by_clip every window has full length.
    size = window_latents(recipe, geometry)
    needed = geometry.covering_latent_frames(frames)
    spans = windows(needed, size, recipe.overlap)
    return windows(spans[-1][0] + size, size, recipe.overlap) if recipe.by_clip else spans


def frames_of(
    frames: int, recipe: SamplerConfig, long_video: str, geometry: LatentGeometry = WAN
) -> int:
    """Return how many frames are rendered for a video of `frames` frames.

    The number is 4n + 1, and with `by_clip` fills all windows.
    """
    stop = spans_of(frames, recipe, long_video, geometry)[-1][1]
    return stop if long_video == "chunked" else geometry.frames(stop)


def steps_of(
    frames: int, recipe: SamplerConfig, long_video: str, geometry: LatentGeometry = WAN
) -> int:
    """Return the number of steps that the progress bar counts."""
    # All windows share each step; each chunk has its own steps.
    is_chunked = long_video == "chunked"
    chunks = len(spans_of(frames, recipe, long_video, geometry)) if is_chunked else 1
    return chunks * recipe.num_steps


@contextmanager
def _cached(renderer: Renderer) -> Iterator[Net]:
    """Yield the network, with TeaCache if requested."""
    if not renderer.cache:
        yield renderer.net
        return
    plan = CachePlan(renderer.cache, sampler_timesteps(renderer.recipe), renderer.coefficients)
    with step_cached(renderer.net, plan) as net:
        yield net


def render_part(
    renderer: Renderer,
    recipe: SamplerConfig,
    scene: Scene,
    index: int,
    on_step: Callable[[int], None],
) -> Tensor:
    """Return pixels [3, T, Y, X] of a scene or chunk; `index` selects the noise."""
    # Encode the known pixels, and draw noise.
    conditions = conditions_of(renderer.encoders, scene, renderer.device)
    shape = (renderer.encoders.geometry.channels, *conditions.known.shape[2:])
    noise = draw_noise(["clip"], shape, seed=renderer.seed, epoch=0, draw_index=index).noise

    def clip_conditions(full: Conditions, start: int, stop: int) -> Conditions:
        part = window_conditions(full, start, stop)
        audio = encode_window_audio(renderer.encoders, scene, start, stop)
        return part if audio is None else part._replace(audio=audio[None].to(renderer.device))

    # Denoise all windows jointly, then decode.
    negative = None if scene.negative is None else scene.negative.to(renderer.device)
    with _cached(renderer) as net:
        latents = sample_windows(
            net, conditions, recipe, noise.to(renderer.device), negative=negative,
            conditions_of=clip_conditions if recipe.by_clip else window_conditions,
            cfg=renderer.cfg, dtype=renderer.dtype, on_step=lambda step, _: on_step(step),
        )  # fmt: skip
    with torch.no_grad():
        return renderer.encoders.video.decode(latents.float().cpu())[0]


def render_windows(renderer: Renderer, scene: Scene, advance: Advance) -> Tensor:
    """Return pixels [3, T, Y, X] of the scene, in windows that share every denoising step."""
    return render_part(renderer, renderer.recipe, scene, 0, lambda step: advance(step + 1, ""))


def render_chunks(renderer: Renderer, scene: Scene, advance: Advance) -> Tensor:
    """Return pixels [3, T, Y, X] of the scene, each chunk continuing the last frames before it."""
    recipe, chunks = renderer.recipe, list[Tensor]()
    single = recipe._replace(overlap=0)  # a chunk is one window

    def on_step(step: int) -> None:
        advance(len(chunks) * recipe.num_steps + step + 1, "")

    # Each chunk gets the last frames before it as known pixels.
    geometry = renderer.encoders.geometry
    for start, stop in spans_of(len(scene.known), recipe, "chunked", geometry):
        previous = chunks[-1][:, -recipe.overlap :] if chunks else None
        part = scene.chunk(start, stop, previous)
        chunks.append(render_part(renderer, single, part, len(chunks), on_step))
    return join_chunks(chunks, recipe.overlap)


def match_colors(frames: Frames) -> Frames:
    """Return frames [T, Y, X, 3] with the first frame's mean and spread of each LAB channel.

    The colors of a long video drift, but its first frame is the given image.  EchoMimicV3 matches
    colors whenever it saves a video (`src/utils.py`, lines 26-67).
    """
    # Statistics of the first frame, channel by channel.
    first = _lab(frames[0])
    mean, std = first.mean((0, 1)), first.std((0, 1))
    matched = [frames[0]]
    for frame in frames[1:]:
        lab = _lab(frame)
        # Standardize the frame, then apply mean and spread of the first frame.
        scaled = (lab - lab.mean((0, 1))) / np.maximum(lab.std((0, 1)), 1e-6) * std + mean
        rgb = cv2.cvtColor(scaled.astype(np.float32), cv2.COLOR_LAB2RGB)
        matched.append((rgb.clip(0, 1) * 255).round().astype(np.uint8))
    return np.stack(matched)


def _lab(frame: Frames) -> NDArray[np.float32]:
    return np.asarray(cv2.cvtColor(frame.astype(np.float32) / 255, cv2.COLOR_RGB2LAB), np.float32)


def known_weight(known: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the source's weight of each pixel [Y, X]: 1 where `known`, falling to 0 inside.

    The weight falls linearly over FEATHER pixels of distance from the known part, or over
    FEATHER_SHARE of the largest such distance in the frame.
    """
    # Distance of each generated pixel from the known part.
    distance = cv2.distanceTransform((~known).astype(np.uint8), cv2.DIST_L2, 5)
    width = min(FEATHER, FEATHER_SHARE * float(distance.max()))
    return np.asarray(np.clip(1 - distance / (width + 1), 0, 1), np.float32)


def paste_known(generated: Frames, source: Frames, known: NDArray[np.bool_]) -> Frames:
    """Return frames [T, Y, X, 3] with the source's pixels where `known` [T, Y, X].

    A generated video differs from its source even where the source was known, because it passed
    through autoencoder and sampler.  The edge is blended within the generated part.
    """
    pasted = np.empty_like(generated)
    for index, (made, given, mask) in enumerate(zip(generated, source, known, strict=True)):
        weight = known_weight(mask)[..., None]
        pasted[index] = (weight * given + (1 - weight) * made).round().astype(np.uint8)
    return pasted
