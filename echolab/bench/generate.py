"""`echolab bench generate`: how long a video takes, by solver, steps and window."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from echolab.bench.commands import GenerateArguments
from echolab.bench.measure import Row, cost_of, peak_of, say
from echolab.bench.models import Inputs, draw_inputs, ours_net
from echolab.config.folders import architecture_of
from echolab.diffusion.long_video import sample_windows
from echolab.diffusion.pipeline import PRESETS, SamplerConfig, check_sampler
from echolab.errors import ConfigError
from echolab.geometry import WAN
from echolab.models.attention import attention_from, use_attention
from echolab.models.transformer import EchoTransformer
from echolab.training.engine.activation_checkpointing import compile_blocks

FPS = 25


def rows_of(arguments: GenerateArguments) -> list[Row]:
    """Return the rows of the benchmark that the arguments request."""
    return list(bench(arguments))


def bench(arguments: GenerateArguments) -> Iterator[Row]:
    """Yield a row of time for each combination and one of memory for each window."""
    on_gpu = arguments.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError("device=cuda: no GPU here; use device=cpu")
    # Refuse impossible combinations before the network is built.
    wanted = recipes(arguments)
    architecture = architecture_of(arguments.model_name)
    inputs = draw_inputs(architecture, arguments.size(), arguments.seed, arguments.device)
    net = network(arguments, architecture)
    half = (arguments.precision or ("bf16" if on_gpu else "fp32")) == "bf16"
    measured: set[int] = set()
    # Memory depends only on the window; time depends on solver, steps and window.
    for recipe in wanted:
        name = f"{recipe.solver}/steps={recipe.num_steps}/window={recipe.window}"
        say(f"measuring {name}")
        run = Denoising(net, inputs, recipe, arguments.cfg, half)
        if recipe.window not in measured:  # solvers differ only by a few copies of the latents
            measured.add(recipe.window)
            peak = peak_of(run.one_step, arguments.device)
            yield Row(f"window={recipe.window}/peak_memory", peak / 2**20, "MiB")
        length = arguments.size()[0] / FPS
        yield Row(f"{name}/time", cost_of(run, arguments.device).seconds, "s", "the video", length)


def recipes(arguments: GenerateArguments) -> list[SamplerConfig]:
    """Return every combination.  Raise ConfigError for impossible ones."""
    on_gpu = arguments.device == "cuda"
    preset = PRESETS[arguments.preset or ("preview" if on_gpu else "demo")]
    windows = arguments.windows or ((81, 125) if on_gpu else (25, 49))
    for window in windows:
        # A window must be longer than its overlap.
        if WAN.latent_frames(window) <= preset.overlap:
            least = WAN.frames(preset.overlap + 1)
            raise ConfigError(f"windows={window}: frames, of which {least} or more are needed")
    combinations = itertools.product(arguments.solvers, arguments.num_steps, windows)
    return [
        check_sampler(preset._replace(solver=solver, num_steps=steps, window=window))
        for solver, steps, window in combinations
    ]


def network(arguments: GenerateArguments, architecture: dict[str, Any]) -> EchoTransformer:
    """Build the network, frozen; in bf16 on a GPU, as the release runs it."""
    net = ours_net(architecture, arguments.seed, arguments.device).eval().requires_grad_(False)
    if arguments.device == "cuda" and arguments.precision != "fp32":
        net = net.bfloat16()
    use_attention(net, attention_from(arguments.attention, arguments.device))
    # Compile after the weights have their dtype.
    if arguments.compile:
        compile_blocks(net, arguments.device)
    return net


class Denoising:
    """A video and its sampler settings; a call denoises the video."""

    def __init__(
        self, net: EchoTransformer, inputs: Inputs, recipe: SamplerConfig, cfg: str, half: bool
    ):
        """Store the network, its inputs and the sampler settings."""
        self.net, self.inputs, self.recipe, self.cfg = net, inputs, recipe, cfg
        self.dtype = torch.bfloat16 if half else torch.float32

    def _sample(self, recipe: SamplerConfig) -> None:
        # All windows share the conditions.
        conditions = self.inputs.conditions
        sample_windows(
            self.net, conditions, recipe, self.inputs.latents,
            negative=torch.zeros_like(conditions.text), cfg=self.cfg, dtype=self.dtype,
        )  # fmt: skip

    def one_step(self) -> None:
        """Run one step, which needs the same memory as any number of steps and warms up."""
        self._sample(self.recipe._replace(num_steps=1))

    def __call__(self) -> None:
        """Denoise the video."""
        self._sample(self.recipe)
