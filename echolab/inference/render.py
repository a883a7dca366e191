"""A scene to pixels: by windows that share every step, or by one chunk after another."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from echolab.diffusion.chunks import chunk_spans, joined
from echolab.diffusion.long_video import sample_windows, window_latents
from echolab.diffusion.pipeline import Recipe, timesteps_of
from echolab.diffusion.sigmas import draw
from echolab.diffusion.teacache import WAN_1B3, CachePlan, Net, step_cached
from echolab.diffusion.windows import window_conditions, windows
from echolab.encoders.encode import Encoders
from echolab.geometry import WAN, LatentGeometry
from echolab.inference.conditions import Scene, conditions_of, heard_alone
from echolab.types import Conditions


class Renderer(NamedTuple):
    """What makes the video."""

    net: nn.Module
    encoders: Encoders
    recipe: Recipe
    branches: str  # of guidance.RUNS
    seed: int
    cache: float  # threshold of step caching; 0 is none
    coefficients: Sequence[float] = WAN_1B3
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32


Advance = Callable[[int, str], None]


def spans_of(
    frames: int, recipe: Recipe, long: str, geometry: LatentGeometry = WAN
) -> list[tuple[int, int]]:
    """The windows (in latent frames) or the chunks (in frames) of a video."""
    if long == "chunks":
        return chunk_spans(frames, recipe.window, recipe.overlap, recipe.by_clip, geometry)
    size = window_latents(recipe, geometry)
    needed = geometry.covering_latent_frames(frames)
    spans = windows(needed, size, recipe.overlap)
    return windows(spans[-1][0] + size, size, recipe.overlap) if recipe.by_clip else spans


def frames_of(frames: int, recipe: Recipe, long: str, geometry: LatentGeometry = WAN) -> int:
    """How many frames are made for a video of `frames`: 4n + 1, and what `by_clip` adds."""
    stop = spans_of(frames, recipe, long, geometry)[-1][1]
    return stop if long == "chunks" else geometry.frames(stop)


def steps_of(frames: int, recipe: Recipe, long: str, geometry: LatentGeometry = WAN) -> int:
    """Steps to show progress by."""
    chunks = len(spans_of(frames, recipe, long, geometry)) if long == "chunks" else 1
    return chunks * recipe.steps


@contextmanager
def _sampled(renderer: Renderer) -> Iterator[Net]:
    """The network, with its steps cached where that is asked for."""
    if not renderer.cache:
        yield renderer.net
        return
    plan = CachePlan(renderer.cache, timesteps_of(renderer.recipe), renderer.coefficients)
    with step_cached(renderer.net, plan) as cached:
        yield cached


def render_part(
    renderer: Renderer, recipe: Recipe, scene: Scene, number: int, on_step: Callable[[int], None]
) -> Tensor:
    """Pixels [3, T, Y, X] of one scene or chunk; `number` tells their noises apart."""
    told = conditions_of(renderer.encoders, scene, renderer.device)
    shape = (renderer.encoders.geometry.channels, *told.known.shape[2:])
    noise = draw(["clip"], shape, seed=renderer.seed, epoch=0, draw_index=number).noise

    def told_alone(whole: Conditions, start: int, stop: int) -> Conditions:
        part = window_conditions(whole, start, stop)
        sound = heard_alone(renderer.encoders, scene, start, stop)
        return part if sound is None else part._replace(audio=sound[None].to(renderer.device))

    negative = None if scene.negative is None else scene.negative.to(renderer.device)
    with _sampled(renderer) as net:
        latents = sample_windows(
            net, told, recipe, noise.to(renderer.device), negative=negative,
            told=told_alone if recipe.by_clip else window_conditions,
            branches=renderer.branches, dtype=renderer.dtype, on_step=lambda step, _: on_step(step),
        )  # fmt: skip
    with torch.no_grad():
        return renderer.encoders.video.decode(latents.float().cpu())[0]


def render_windows(renderer: Renderer, scene: Scene, advance: Advance) -> Tensor:
    """The whole scene at once, in windows that share every denoising step.  [3, T, Y, X]."""
    return render_part(renderer, renderer.recipe, scene, 0, lambda step: advance(step + 1, ""))


def render_chunks(renderer: Renderer, scene: Scene, advance: Advance) -> Tensor:
    """One chunk after another, each going on from the last frames of the one before."""
    recipe, chunks = renderer.recipe, list[Tensor]()
    single = recipe._replace(overlap=0)  # a chunk is one window

    def on_step(step: int) -> None:
        advance(len(chunks) * recipe.steps + step + 1, "")

    geometry = renderer.encoders.geometry
    for start, stop in spans_of(len(scene.known), recipe, "chunks", geometry):
        before = chunks[-1][:, -recipe.overlap :] if chunks else None
        part = scene.chunk(start, stop, before)
        chunks.append(render_part(renderer, single, part, len(chunks), on_step))
    return joined(chunks, recipe.overlap)
