"""`echolab generate image=I audio=A out=V.mp4`: a talking video with its sound."""

import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from echolab.arguments import parse
from echolab.atomic_io import prove_writable
from echolab.config.networks import (
    architecture_of,
    check_encoders,
    last_checkpoint,
    load_policy,
    load_released,
)
from echolab.data.clips import to_frames
from echolab.data.media import Frames, Samples, read_audio, write_video
from echolab.diffusion.teacache import IDENTITY, WAN_1B3
from echolab.encoders.demo_audio import SAMPLES_PER_FRAME
from echolab.encoders.demo_vae import CausalAutoencoder
from echolab.encoders.encode import Encoders, demo_encoders
from echolab.encoders.loading import find_released, released_encoders
from echolab.errors import ConfigError, MediaError
from echolab.fitting import load_net, work_dtype
from echolab.inference.colors import match_colours
from echolab.inference.conditions import encode_scene
from echolab.inference.inputs import Footage, footage_of, open_source
from echolab.inference.options import GenerateArguments
from echolab.inference.paste import paste_known
from echolab.inference.render import Renderer, frames_of, render_chunks, render_windows, steps_of
from echolab.launch.local import run_ranks, started_by_launcher
from echolab.launch.run_dir import own_rank
from echolab.models.attention import attention_from, use_attention
from echolab.models.transformer import EchoTransformer
from echolab.progress import progress
from echolab.tasks.table import LOCAL_TASKS
from echolab.training.adapters.lora_reader import merge_adapters, read_adapters
from echolab.training.checkpoints.checkpoint import open_checkpoint
from echolab.training.engine.sequence_parallel import SequenceSplit

LEAST_FRAMES = 5


class Models(NamedTuple):
    """The network, and the encoders that it was trained with."""

    net: EchoTransformer
    encoders: Encoders


def main(argv: list[str]) -> int:
    arguments = parse(GenerateArguments, argv, command="echolab generate")
    arguments.check()
    prove_writable(arguments.out)
    recipe, began = arguments.recipe(), time.monotonic()
    samples, frames = read_sound_of(arguments)
    frames_of(frames, recipe, arguments.long)  # says what cannot be before anything is loaded
    if arguments.devices > 1 and not started_by_launcher():
        command = [sys.executable, "-P", "-m", "echolab.cli", "generate", *argv]
        return run_ranks(command, arguments.devices)
    check_network(architecture_asked(arguments), arguments)
    with joined(arguments.devices) as device:
        # What is given is looked at before weights are read.
        footage = footage_of(arguments, frames)
        models = load_models(arguments, device)
        use_attention(models.net, attention_from("auto", device))
        if arguments.devices > 1:
            SequenceSplit(models.net)
        with redirect_stderr(io.StringIO()) if own_rank() else nullcontext():
            pictures = generate(arguments, models, footage, samples, frames, device)
    if own_rank():
        return 0
    sound = None if samples is None else samples[: frames * SAMPLES_PER_FRAME]
    write_video(arguments.out, pictures, sound)
    seconds = time.monotonic() - began
    figures = {"out": str(arguments.out), "frames": frames, "seconds": round(seconds, 2)}
    plain = f"{arguments.out}: {frames} frames ({frames / 25:.2f} s) in {seconds:.1f} s"
    print(json.dumps(figures) if arguments.format == "json" else plain)
    return 0


@contextmanager
def joined(devices: int) -> Iterator[torch.device]:
    """This process's device, and, of several, the group of those that share a video."""
    on_gpu = torch.cuda.is_available()
    if on_gpu and devices > torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"devices={devices}: this machine has {count}; give devices={count}")
    number = int(os.environ.get("LOCAL_RANK", 0)) if devices > 1 else 0
    device = torch.device("cuda", number) if on_gpu else torch.device("cpu")
    if devices == 1:
        yield device
        return
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield device
        dist.barrier()  # nobody leaves while another still talks to him
    finally:
        dist.destroy_process_group()


def read_sound_of(arguments: GenerateArguments) -> tuple[Samples | None, int]:
    """The sound to speak, if any, and how many frames the video has."""
    if arguments.audio is None:
        assert arguments.seconds is not None
        samples, length, name = None, round(16_000 * arguments.seconds), Path("seconds=")
    else:
        samples = read_audio(arguments.audio, since=_picture_start(arguments))
        name = arguments.audio
        if arguments.seconds is not None:
            samples = samples[: round(16_000 * arguments.seconds)]
        length = len(samples)
    frames = length // SAMPLES_PER_FRAME
    if frames < LEAST_FRAMES:
        raise MediaError(f"{name}: {length / 16_000:.2f} s of sound, need "
                         f"{LEAST_FRAMES / 25} s or more; give a longer file")  # fmt: skip
    return samples, frames


def _picture_start(arguments: GenerateArguments) -> float | None:
    """Return the time of the first picture if the sound is that of the video to make anew."""
    source, audio = arguments.source, arguments.audio
    if arguments.task == "continuation" or source is None or audio is None:
        return None
    if not (source.exists() and audio.exists() and source.samefile(audio)):
        return None
    return float(open_source(source).times[0])


def load_models(arguments: GenerateArguments, device: torch.device) -> Models:
    """A released network and its encoders, or a run's with averaged weights and the demo's."""
    if arguments.model is not None and arguments.encoders is not None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        files = find_released(arguments.encoders, arguments.wav2vec_folder)
        encoders = released_encoders(files, device, dtype, speech=arguments.speech)
        architecture = architecture_of(arguments.model)
        net = load_released(arguments.checkpoint, architecture, dtype)
        if arguments.lora:
            merge_adapters(net, read_adapters(arguments.lora, net))
        return Models(net, encoders)
    checkpoint = last_checkpoint(arguments.checkpoint)
    net = load_policy(checkpoint)
    encoders = demo_encoders(load_net(arguments.video, CausalAutoencoder))
    check_encoders(checkpoint, encoders.fingerprints)
    return Models(net, encoders)


def architecture_asked(arguments: GenerateArguments) -> Mapping[str, Any]:
    """The settings of the network, without its weights."""
    if arguments.model is not None:
        return architecture_of(arguments.model)
    checkpoint = open_checkpoint(last_checkpoint(arguments.checkpoint))
    architecture: dict[str, Any] = checkpoint.state["architecture"]
    return architecture


def check_network(architecture: Mapping[str, Any], arguments: GenerateArguments) -> None:
    """ConfigError where the network is asked for what it has no branch for."""
    channels = architecture.get("in_channels", 36), architecture.get("out_channels", 16)
    if channels[0] <= channels[1] and arguments.task != "t2v":
        raise ConfigError(
            f"{arguments.checkpoint}: the network takes no known pixels, task={arguments.task} "
            "needs them; use task=t2v, or another checkpoint"
        )
    scale = arguments.recipe().audio_scale
    deaf = architecture.get("audio_dim", 768) is None
    if deaf and (scale != 1 or arguments.task != "t2v"):
        raise ConfigError(
            f"{arguments.checkpoint}: the network hears no sound; use task=t2v with audio_scale=1 "
            "and seconds=, or another checkpoint"
        )


def generate(
    arguments: GenerateArguments,
    models: Models,
    footage: Footage,
    samples: Samples | None,
    frames: int,
    device: torch.device,
) -> Frames:
    """The video's frames [T, Y, X, 3], uint8."""
    recipe, long = arguments.recipe(), arguments.long
    made = frames_of(frames, recipe, long)
    footage = footage.extended(made)
    negative = recipe.negative if recipe.text_scale != 1 else None
    sound = None if samples is None else torch.from_numpy(samples)
    scene = encode_scene(models.encoders, footage, sound, arguments.prompt, negative)
    coefficients = IDENTITY if arguments.model is None else WAN_1B3
    renderer = Renderer(
        models.net.to(device), models.encoders, recipe, arguments.branches, arguments.seed,
        arguments.cache, coefficients, device, work_dtype(device),
    )  # fmt: skip
    with progress("generating", steps_of(made, recipe, long)) as advance:
        render = render_chunks if long == "chunks" else render_windows
        pixels = render(renderer, scene, advance)
    pictures = to_frames(pixels[:, :frames].float().cpu())
    if arguments.match_colours:
        pictures = match_colours(pictures)
    if arguments.paste_known and arguments.task in LOCAL_TASKS:
        source, known = to_frames(footage.pixels[:, :frames]), footage.known[:frames, 0].numpy()
        pictures = paste_known(pictures, source, known)
    return pictures
