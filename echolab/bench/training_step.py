"""`echolab bench step`: forward and backward of the network, beside diffusers' own."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from echolab.arguments import parse
from echolab.bench.engine import (
    Subject,
    average_rows,
    module_rows,
    net_of,
    write_clips,
)
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
from echolab.bench.ranks import strategy_rows
from echolab.bench.rows import Pair, Row, Run, as_json, as_table, measure, say
from echolab.bench.saves import save_rows
from echolab.config.networks import architecture_of
from echolab.errors import ConfigError
from echolab.models.attention import NAMES, attention_from, use_attention
from echolab.models.flops import FORMULA, step_flops
from echolab.training.engine.activation_checkpointing import (
    KEPT,
    checkpoint_blocks,
    compile_blocks,
    compiler_missing,
)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
USUAL = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}  # where no precision is named


@dataclass(frozen=True)
class StepArguments:
    """Forward and backward of the network in turns with diffusers' WanTransformer3DModel.

    Same weights, same inputs, both with the picture and without the sound; medians of the runs.
    Peak memory is the most that torch's allocator held in a step above what it held before it
    (activations and gradients; weights are not in it).  bf16 is autocast over fp32 weights.
    With engine=true, in the first precision: the average and an asynchronous save beside a step,
    training beside a bare loop of the same steps, and ZeRO beside DDP in processes of their own.
    """

    model: str = field(default="small", metadata={"help": "`small`, or a name of conf/model"})
    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "where"})
    frames: int | None = field(
        default=None, metadata={"help": "4n+1 video frames; none is 25, on a GPU 81"}
    )
    height: int | None = field(
        default=None, metadata={"help": "pixels, of 16; none is 192, on a GPU 480"}
    )
    width: int | None = field(
        default=None, metadata={"help": "pixels, of 16; none is 256, on a GPU 832"}
    )
    pairs: int = field(default=7, metadata={"help": "runs of each"})
    precision: tuple[str, ...] | None = field(
        default=None, metadata={"help": "fp32, bf16; none is both, on a GPU bf16"}
    )
    checkpointing: Literal["none", "full", "selective"] | None = field(
        default=None, metadata={"help": "diffusers has full only; on a GPU selective"}
    )
    attention: str = field(default="auto", metadata={"help": "ours: " + ", ".join(NAMES)})
    compile: bool = field(default=False, metadata={"help": "the blocks, of both"})
    variants: bool = field(
        default=True,
        metadata={"help": "also sound, checkpointing, compile and each attention"},
    )
    engine: bool = field(
        default=False, metadata={"help": "the rows of the engine, instead of the network's"}
    )
    scratch: Path | None = field(
        default=None,
        metadata={"help": "folder on the disk that is saved to; none is the system's"},
    )
    peak_tflops: float | None = field(
        default=None,
        metadata={"gt": 0, "help": "of the GPU in bf16, for MFU; none is the known one"},
    )
    seed: int = field(default=0, metadata={"ge": 0, "help": "of weights and inputs"})
    format: Literal["table", "json"] = field(default="table", metadata={"help": "of the answer"})


def main(argv: list[str]) -> None:
    """Measure and print."""
    arguments = parse(StepArguments, argv, command="echolab bench step")
    inputs, architecture = subject(arguments)
    if not arguments.engine:
        say(FORMULA)
    of = engine_rows if arguments.engine else bench
    rows = list(of(arguments, architecture, inputs))
    print(as_json(rows) if arguments.format == "json" else as_table(rows))


def subject(arguments: StepArguments) -> tuple[Inputs, dict[str, Any]]:
    """The inputs and the settings of the network without its sound; ConfigError for bad sizes."""
    on_gpu = arguments.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError("device=cuda: no GPU here; take device=cpu")
    if arguments.pairs < 1:
        raise ConfigError(f"pairs={arguments.pairs}: must be 1 or more")
    for name in arguments.precision or ():
        if name not in PRECISIONS:
            raise ConfigError(f"precision={name}: unknown; one of {', '.join(PRECISIONS)}")
    architecture = SMALL if arguments.model == "small" else architecture_of(arguments.model)
    architecture = {k: v for k, v in architecture.items() if k != "audio_layers"}
    architecture["audio_dim"] = None
    usual = (81, 480, 832) if on_gpu else (25, 192, 256)
    given = (arguments.frames, arguments.height, arguments.width)
    size = tuple(u if g is None else g for g, u in zip(given, usual, strict=True))
    return draw_inputs(architecture, size, arguments.seed, arguments.device), architecture


def bench(arguments: StepArguments, architecture: dict[str, Any], inputs: Inputs) -> Iterator[Row]:
    """All rows, precision by precision."""
    ours = ours_net(architecture, arguments.seed, arguments.device)
    theirs = diffusers_net(ours, architecture)
    use_attention(ours, attention_from(arguments.attention, arguments.device))
    for precision in arguments.precision or USUAL[arguments.device]:
        step = Step(arguments, inputs, PRECISIONS[precision])
        yield Row(
            f"{precision}/output_difference",
            relative(step.output(run_ours, ours), step.output(run_diffusers, theirs)),
            "relative",
            "diffusers",
        )
        base = checkpointed(ours, theirs, step.checkpointing)
        yield from main_rows(step, *base, architecture, precision)
        if arguments.variants:
            yield from checkpointing_rows(step, ours, theirs, precision)
            yield from variant_rows(step, *base, precision)
            yield from audio_rows(step, base[0], architecture, precision)


def engine_rows(
    arguments: StepArguments, architecture: dict[str, Any], inputs: Inputs
) -> Iterator[Row]:
    """What training costs beside the network's own step."""
    step = Step(arguments, inputs, torch.float32)
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="bench-step-") as folder:
        subject = Subject(
            architecture,
            Path(folder),
            arguments.device,
            (arguments.precision or USUAL[arguments.device])[0],
            step.checkpointing,
            arguments.attention,
            arguments.seed,
        )
        write_clips(subject, inputs)
        net, pairs = net_of(subject), arguments.pairs
        yield from average_rows(subject, net, pairs)
        yield from module_rows(subject, net, pairs)
        yield from save_rows(subject, net, pairs)
        yield from strategy_rows(subject, pairs)


class Step:
    """Runs and measures training steps on one set of inputs."""

    def __init__(self, arguments: StepArguments, inputs: Inputs, dtype: torch.dtype):
        self.arguments, self.inputs, self.dtype = arguments, inputs, dtype
        self.device = arguments.device
        usual = "selective" if self.device == "cuda" else "none"  # 1.3 B at 480p needs it
        self.checkpointing: str = arguments.checkpointing or usual

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    @torch.no_grad()
    def output(self, forward: Callable[[nn.Module, Inputs], Tensor], net: nn.Module) -> Tensor:
        """Velocity."""
        with self._autocast():
            return forward(net, self.inputs).float()

    def of(self, forward: Callable[[nn.Module, Inputs], Tensor], net: nn.Module) -> Run:
        """Forward and backward; the gradients are dropped at the end, as after every step."""

        def run() -> None:
            try:
                with self._autocast():
                    velocity = forward(net, self.inputs)
                (velocity.float() * self.inputs.direction).sum().backward()
            finally:
                net.zero_grad(set_to_none=True)

        return run

    def measure(self, name: str, run: Run, baseline: Run) -> Pair | None:
        """None, and the reason in words, where memory does not suffice."""
        say(f"measuring {name}")
        try:
            return measure(run, baseline, self.arguments.pairs, self.device)
        except torch.OutOfMemoryError:
            say(f"{name}: skipped, out of GPU memory; take checkpointing=full or a smaller size")
            return None


def checkpointed(ours: nn.Module, theirs: nn.Module, how: str) -> tuple[nn.Module, nn.Module]:
    """Copies of both that checkpoint; themselves where they shall not."""
    if how == "none":
        return ours, theirs
    ours, theirs = copy.deepcopy(ours), copy.deepcopy(theirs)
    checkpoint_blocks(ours, KEPT[how])
    theirs.enable_gradient_checkpointing()  # type: ignore[operator]
    return ours, theirs


def main_rows(
    step: Step, ours: nn.Module, theirs: nn.Module, architecture: dict[str, Any], precision: str
) -> Iterator[Row]:
    """Ours beside diffusers', as the arguments have it."""
    arguments = step.arguments
    if arguments.compile:
        ours, theirs = copy.deepcopy(ours), copy.deepcopy(theirs)
        compile_blocks(ours, step.device)
        compile_blocks(theirs, step.device)
    pair = step.measure(precision, step.of(run_ours, ours), step.of(run_diffusers, theirs))
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
        share = tera / peak
        yield Row(f"{precision}/mfu", share / seconds, "of peak", name, share / baseline)
    else:
        say("mfu: skipped, the peak of this device is not known; give peak_tflops=...")


def checkpointing_rows(
    step: Step, ours: nn.Module, theirs: nn.Module, precision: str
) -> Iterator[Row]:
    """Both kinds beside ours without, and beside diffusers' own."""
    plain = step.of(run_ours, ours)
    for how in KEPT:
        changed, other = checkpointed(ours, theirs, how)
        name = f"{precision}/checkpointing={how}"
        yield from _variant(step, name, changed, plain, "echolab")
        peer = step.of(run_diffusers, other)
        yield from _variant(step, f"{name}/peer", changed, peer, "diffusers, checkpointed")


def variant_rows(step: Step, ours: nn.Module, theirs: nn.Module, precision: str) -> Iterator[Row]:
    """Each change alone: compilation beside ours without it, attentions beside diffusers'."""
    plain = step.of(run_ours, ours)
    missing = compiler_missing(step.device)
    if missing:
        say(f"{precision}/compile: skipped, {missing}")
    else:
        changed = copy.deepcopy(ours)
        compile_blocks(changed, step.device)
        yield from _variant(step, f"{precision}/compile", changed, plain, "echolab")
    for choice in NAMES[1:]:
        try:
            attend = attention_from(choice, step.device)
        except ConfigError as error:
            say(f"{precision}/attention={choice}: skipped, {error}")
            continue
        changed = copy.deepcopy(ours)
        use_attention(changed, attend)
        name = f"{precision}/attention={choice}"
        yield from _variant(step, name, changed, step.of(run_diffusers, theirs), "diffusers")


def audio_rows(
    step: Step, ours: nn.Module, architecture: dict[str, Any], precision: str
) -> Iterator[Row]:
    """What the sound's branch costs."""
    hearing = with_audio(architecture)
    heard = ours_net(hearing, step.arguments.seed, step.device)
    use_attention(heard, attention_from(step.arguments.attention, step.device))
    if step.checkpointing != "none":
        checkpoint_blocks(heard, KEPT[step.checkpointing])
    yield from _variant(
        step, f"{precision}/sound", heard, step.of(run_ours, ours), "echolab without sound"
    )


def _variant(step: Step, name: str, net: nn.Module, baseline: Run, called: str) -> Iterator[Row]:
    pair = step.measure(name, step.of(run_ours, net), baseline)
    if pair:
        yield from pair.rows(name, called, step.device)
