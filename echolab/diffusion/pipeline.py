"""How a video is sampled, as plain values: the demo's way, and those of the released models."""

import math
from typing import NamedTuple

from torch import Tensor

from echolab.diffusion.chunks import check_clip_length
from echolab.diffusion.flow import to_timesteps
from echolab.diffusion.guidance import (
    RUNS,
    VelocityFunction,
    compounding_factors,
    decaying,
    guided,
    negative_factors,
    stepwise,
    whole_timesteps,
)
from echolab.diffusion.sampling import Solver, sample_euler
from echolab.diffusion.sigmas import GRIDS
from echolab.diffusion.solvers import sample_dpmpp, sample_unipc
from echolab.diffusion.teacache import Net
from echolab.errors import ConfigError
from echolab.geometry import WAN, LatentGeometry
from echolab.types import Conditions

SOLVERS: dict[str, Solver] = {
    "euler": sample_euler,
    "unipc": sample_unipc,
    "dpmpp": sample_dpmpp,
}
NEGATIVES = {"phase": negative_factors, "compounding": compounding_factors}
TIMESTEPS = {"exact": to_timesteps, "whole": whole_timesteps}


class Recipe(NamedTuple):
    """The numbers of a sampling run; the words are keys of the tables here."""

    solver: str  # of SOLVERS
    grid: str  # of sigmas.GRIDS: how the levels lie before the shift
    steps: int
    shift: float
    text_scale: float  # guidance; 1 is none
    audio_scale: float
    decaying: bool  # scales other than 1 fall to their half
    negative: str  # text of the branch without the prompt
    negative_scale: float  # of that text's states, in the first `negative_steps` steps
    negative_steps: int
    negative_mode: str  # of NEGATIVES
    timesteps: str  # of TIMESTEPS: what the network is told
    window: int  # frames sampled at once, 4n + 1
    overlap: int  # latent frames that joint windows share, frames that chunks share
    by_clip: bool  # windows are clips as in training: of one length, their sound encoded alone


DEMO = Recipe(
    solver="euler", grid="even", steps=12, shift=3.0, text_scale=1.0, audio_scale=2.0,
    decaying=False, negative="", negative_scale=1.0, negative_steps=0, negative_mode="phase",
    timesteps="exact", window=25, overlap=2, by_clip=True,
)  # fmt: skip
# infer_preview.py; there the negative scale compounds (negative_mode).
PREVIEW = Recipe(
    solver="euler", grid="flow_match", steps=25, shift=5.0, text_scale=4.0, audio_scale=2.9,
    decaying=True, negative="Gesture is bad. Gesture is unclear. Strange and twisted hands. "
    "Bad hands. Bad fingers. Unclear and blurry hands. "
    "手部快速摆动, 手指频繁抽搐, 夸张手势, 重复机械性动作.",
    negative_scale=1.5, negative_steps=3, negative_mode="phase", timesteps="exact",
    window=113, overlap=8, by_clip=False,
)  # fmt: skip
# run_flash.sh; its text scale of 6 is not applied by its pipeline.
FLASH = Recipe(
    solver="unipc", grid="wan", steps=8, shift=5.0, text_scale=1.0, audio_scale=3.0,
    decaying=False, negative="", negative_scale=1.0, negative_steps=0, negative_mode="phase",
    timesteps="whole", window=81, overlap=8, by_clip=False,
)  # fmt: skip
PRESETS = {"demo": DEMO, "preview": PREVIEW, "flash": FLASH}


def check_recipe(recipe: Recipe, geometry: LatentGeometry = WAN) -> Recipe:
    """The recipe itself; ConfigError where a number of it cannot be."""
    if recipe.steps < 1:
        raise ConfigError(f"steps={recipe.steps}: must be 1 or more")
    if not 0 < recipe.shift < 100:
        raise ConfigError(f"shift={recipe.shift}: must lie between 0 and 100; 5 is usual")
    for name in ("text_scale", "audio_scale", "negative_scale"):
        if not math.isfinite(getattr(recipe, name)):
            raise ConfigError(f"{name}={getattr(recipe, name)}: must be a number")
    check_clip_length("window", recipe.window, geometry)
    if recipe.text_scale < 0 or recipe.audio_scale < 0 or recipe.negative_steps < 0:
        raise ConfigError(
            f"text_scale={recipe.text_scale}, audio_scale={recipe.audio_scale}, "
            f"negative_steps={recipe.negative_steps}: must be 0 or more"
        )
    return recipe


def sigmas_of(recipe: Recipe) -> Tensor:
    """The levels [steps + 1], shifted once."""
    return GRIDS[recipe.grid](recipe.steps, recipe.shift)


def timesteps_of(recipe: Recipe) -> Tensor:
    """What the network is told at each step.  [steps]."""
    return TIMESTEPS[recipe.timesteps](sigmas_of(recipe)[:-1])


def velocity_of(
    net: Net, conditions: Conditions, recipe: Recipe, negative: Tensor | None, branches: str
) -> VelocityFunction:
    """The guided velocity as the recipe has it; `negative` [1, L, D] is its negative text's states.

    `branches` is a key of `guidance.RUNS`.
    """
    sigmas, steps = sigmas_of(recipe), recipe.steps
    text, audio = (
        stepwise(decaying(scale, steps) if recipe.decaying and scale != 1 else [scale], sigmas)
        for scale in (recipe.text_scale, recipe.audio_scale)
    )
    factors = NEGATIVES[recipe.negative_mode](recipe.negative_scale, recipe.negative_steps)
    texts = None if negative is None else stepwise([f * negative for f in factors], sigmas)
    return guided(
        net, conditions, text_negative=texts, text_scale=text, audio_scale=audio,
        run=RUNS[branches], told_timesteps=TIMESTEPS[recipe.timesteps],
    )  # fmt: skip
