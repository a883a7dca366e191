"""`echolab bench step`: forward and backward of the network, compared with diffusers' own."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from echolab.bench.commands import StepArguments
from echolab.bench.engine import (
    Subject,
    average_rows,
    build_net,
    module_rows,
    write_clips,
)
from echolab.bench.measure import FORMULA, Pair, Row, Run, measure, say, step_flops
from echolab.bench.models import (
    SMALL,
    Inputs,
    diffusers_net,
    draw_inputs,
    ours_net,
    peak_tflops_of,
    relative,
    run_diffusers,
    run_ours,
    shapes_of,
    with_audio,
)
from echolab.config.folders import architecture_of
from echolab.errors import ConfigError
from echolab.models.attention import NAMES, attention_from, use_attention
from echolab.training.engine.activation_checkpointing import (
    KEPT,
    OFFLOAD,
    checkpoint_blocks,
    compile_blocks,
    compiler_missing,
    offload_activations,
)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULT_PRECISIONS = {
    "cpu": ("fp32", "bf16"),
    "cuda": ("bf16",),
}  # by device


def rows_of(arguments: StepArguments) -> list[Row]:
    """Return the rows of the benchmark that the arguments request."""
    inputs, architecture = subject(arguments)
    # The formula explains how FLOPs are counted.
    if not arguments.engine:
        say(FORMULA)
    measured = engine_rows if arguments.engine else bench
    return list(measured(arguments, architecture, inputs))


def subject(arguments: StepArguments) -> tuple[Inputs, dict[str, Any]]:
    """Return inputs and architecture without audio.  Raise ConfigError without its device."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: no GPU here; use device=cpu")
    architecture = SMALL if arguments.model == "small" else architecture_of(arguments.model)
    # diffusers' network has no audio branch.
    architecture = {k: v for k, v in architecture.items() if k != "audio_layers"}
    architecture["audio_dim"] = None
    return draw_inputs(
        architecture, arguments.size(), arguments.seed, arguments.device
    ), architecture


def bench(arguments: StepArguments, architecture: dict[str, Any], inputs: Inputs) -> Iterator[Row]:
    """Yield all rows of the network, precision by precision."""
    # Both networks have the same weights.
    ours = ours_net(architecture, arguments.seed, arguments.device)
    theirs = diffusers_net(ours, architecture)
    use_attention(ours, attention_from(arguments.attention, arguments.device))
    for precision in arguments.precision or DEFAULT_PRECISIONS[arguments.device]:
        step = Step(arguments, inputs, PRECISIONS[precision])
        yield Row(
            f"{precision}/output_difference",
            relative(step.output(run_ours, ours), step.output(run_diffusers, theirs)),
            "relative",
            "diffusers",
        )
        # Compare with diffusers, then variants of our network with our network.
        base = checkpointed(ours, theirs, step.checkpointing)
        yield from main_rows(step, *base, architecture, precision)
        if arguments.variants:
            yield from checkpointing_rows(step, ours, theirs, precision)
            yield from variant_rows(step, *base, precision)
            yield from audio_rows(step, base[0], architecture, precision)


def engine_rows(
    arguments: StepArguments, architecture: dict[str, Any], inputs: Inputs
) -> Iterator[Row]:
    """Yield the rows of the engine: the cost of training in addition to the network's step."""
    step = Step(arguments, inputs, torch.float32)
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="bench-step-") as folder:
        subject = Subject(
            architecture,
            Path(folder),
            arguments.device,
            (arguments.precision or DEFAULT_PRECISIONS[arguments.device])[0],
            step.checkpointing,
            arguments.attention,
            arguments.seed,
        )
        write_clips(subject, inputs)
        net, pairs = build_net(subject), arguments.pairs
        yield from average_rows(subject, net, pairs)
        yield from module_rows(subject, net, pairs)


class Step:
    """Runs and measures training steps on one set of inputs."""

    def __init__(self, arguments: StepArguments, inputs: Inputs, dtype: torch.dtype):
        """Store the arguments, the inputs and the dtype of autocast."""
        self.arguments, self.inputs, self.dtype = arguments, inputs, dtype
        self.device = arguments.device
        usual = "selective" if self.device == "cuda" else "none"  # 1.3 B at 480p needs it
        self.checkpointing: str = arguments.activation_checkpointing or usual

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    @torch.no_grad()
    def output(self, forward: Callable[[nn.Module, Inputs], Tensor], net: nn.Module) -> Tensor:
        """Return the velocity in fp32."""
        # Compare outputs before times.
        with self._autocast():
            return forward(net, self.inputs).float()

    def runner(
        self,
        forward: Callable[[nn.Module, Inputs], Tensor],
        net: nn.Module,
        checkpointing: str = "none",
    ) -> Run:
        """Return a function that runs forward and backward, then drops the gradients.

        The value OFFLOAD of `checkpointing` is applied here, others by `checkpointed`.
        """
        offloading = offload_activations(net) if checkpointing == OFFLOAD else nullcontext()

        def run() -> None:
            # Free the gradients even after an out-of-memory error.
            try:
                with self._autocast(), offloading:
                    velocity = forward(net, self.inputs)
                (velocity.float() * self.inputs.direction).sum().backward()
            finally:
                net.zero_grad(set_to_none=True)

        return run

    def measure(self, name: str, run: Run, baseline: Run) -> Pair | None:
        """Measure both alternately; return None, and print why, if memory does not suffice."""
        say(f"measuring {name}")
        try:
            return measure(run, baseline, self.arguments.pairs, self.device)
        except torch.OutOfMemoryError:
            say(f"{name}: skipped, out of GPU memory; give activation_checkpointing=full")
            return None


def checkpointed(ours: nn.Module, theirs: nn.Module, mode: str) -> tuple[nn.Module, nn.Module]:
    """Return copies of both networks that checkpoint activations; without checkpointing, both."""
    if mode not in KEPT:
        return ours, theirs
    ours, theirs = copy.deepcopy(ours), copy.deepcopy(theirs)
    checkpoint_blocks(ours, KEPT[mode])
    theirs.enable_gradient_checkpointing()  # type: ignore[operator]
    return ours, theirs


def main_rows(
    step: Step, ours: nn.Module, theirs: nn.Module, architecture: dict[str, Any], precision: str
) -> Iterator[Row]:
    """Yield rows of our network compared with diffusers' network."""
    arguments = step.arguments
    if arguments.compile:
        ours, theirs = copy.deepcopy(ours), copy.deepcopy(theirs)
        compile_blocks(ours, step.device)
        compile_blocks(theirs, step.device)
    run = step.runner(run_ours, ours, step.checkpointing)
    pair = step.measure(precision, run, step.runner(run_diffusers, theirs))
    # Memory did not suffice: there is nothing to compare.
    if pair is None:
        return
    yield from pair.rows(precision, "diffusers", step.device)
    tokens, name = shapes_of(step.inputs).tokens, "diffusers"
    seconds, baseline = pair.ours.seconds, pair.baseline.seconds
    yield Row(f"{precision}/tokens", tokens / seconds, "1/s", name, tokens / baseline)
    tera = step_flops(architecture, shapes_of(step.inputs)) / 1e12
    yield Row(f"{precision}/arithmetic", tera / seconds, "TFLOP/s", name, tera / baseline)
    peak = arguments.peak_tflops or peak_tflops_of(step.device)
    if peak:
        # MFU is measured against the GPU's data sheet.
        share = tera / peak
        yield Row(f"{precision}/mfu", share / seconds, "of peak", name, share / baseline)
    else:
        say("mfu: skipped, the peak of this device is not known; give peak_tflops=...")


def checkpointing_rows(
    step: Step, ours: nn.Module, theirs: nn.Module, precision: str
) -> Iterator[Row]:
    """Yield rows of both kinds of checkpointing, compared with none and with diffusers."""
    plain = step.runner(run_ours, ours)
    # diffusers knows full recomputation only.
    for mode in KEPT:
        changed, other = checkpointed(ours, theirs, mode)
        name = f"{precision}/checkpointing={mode}"
        yield from _variant_rows(step, name, changed, plain, "echolab")
        peer = step.runner(run_diffusers, other)
        yield from _variant_rows(step, f"{name}/peer", changed, peer, "diffusers, checkpointed")
    if step.device == "cuda":
        name = f"{precision}/checkpointing={OFFLOAD}"
        yield from _variant_rows(step, name, ours, plain, "echolab", OFFLOAD)


def variant_rows(step: Step, ours: nn.Module, theirs: nn.Module, precision: str) -> Iterator[Row]:
    """Yield rows of compilation, and of each attention kernel, one change at a time."""
    plain = step.runner(run_ours, ours)
    missing = compiler_missing(step.device)
    # Compiling needs a compiler on the machine.
    if missing:
        say(f"{precision}/compile: skipped, {missing}")
    else:
        changed = copy.deepcopy(ours)
        compile_blocks(changed, step.device)
        yield from _variant_rows(step, f"{precision}/compile", changed, plain, "echolab")
    # Each kernel of attention that this device has.
    for choice in NAMES[1:]:
        try:
            attend = attention_from(choice, step.device)
        except ConfigError as error:
            say(f"{precision}/attention={choice}: skipped, {error}")
            continue
        changed = copy.deepcopy(ours)
        use_attention(changed, attend)
        name = f"{precision}/attention={choice}"
        yield from _variant_rows(
            step, name, changed, step.runner(run_diffusers, theirs), "diffusers"
        )


def audio_rows(
    step: Step, ours: nn.Module, architecture: dict[str, Any], precision: str
) -> Iterator[Row]:
    """Yield rows of the cost of the audio branch."""
    audio_net = ours_net(with_audio(architecture), step.arguments.seed, step.device)
    use_attention(audio_net, attention_from(step.arguments.attention, step.device))
    if step.checkpointing in KEPT:
        checkpoint_blocks(audio_net, KEPT[step.checkpointing])
    yield from _variant_rows(
        step, f"{precision}/audio", audio_net, step.runner(run_ours, ours), "echolab without audio"
    )


def _variant_rows(
    step: Step, name: str, net: nn.Module, baseline: Run, called: str, checkpointing: str = "none"
) -> Iterator[Row]:
    pair = step.measure(name, step.runner(run_ours, net, checkpointing), baseline)
    if pair:
        yield from pair.rows(name, called, step.device)
