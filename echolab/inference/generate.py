"""Generate a video for `echolab generate`: read inputs, load models, render, write."""

import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from echolab.config.folders import architecture_of
from echolab.config.networks import (
    check_encoders,
    last_checkpoint,
    load_policy,
    load_released,
)
from echolab.data.media import FPS, Frames, Samples, read_audio, write_video
from echolab.diffusion.teacache import IDENTITY, WAN_1B3
from echolab.encoders.demo import SAMPLES_PER_FRAME, CausalAutoencoder
from echolab.encoders.encode import Encoders, demo_encoders
from echolab.encoders.loading import find_released, released_encoders
from echolab.errors import ConfigError, MediaError
from echolab.fitting import load_net, work_dtype
from echolab.inference.conditions import encode_scene
from echolab.inference.generate_arguments import GenerateArguments
from echolab.inference.inputs import Footage, footage_of, open_source, to_frames
from echolab.inference.render import (
    Renderer,
    frames_of,
    match_colors,
    paste_known,
    render_chunks,
    render_windows,
    steps_of,
)
from echolab.launch.processes import run_ranks, started_by_launcher
from echolab.launch.run_dir import rank_from_environment
from echolab.models.attention import attention_from, use_attention
from echolab.models.transformer import EchoTransformer
from echolab.progress import progress
from echolab.tasks.table import LOCAL_TASKS
from echolab.training.adapters.lora_files import merge_adapters, read_adapters
from echolab.training.checkpoints.checkpoint import open_checkpoint
from echolab.training.engine.sequence_parallel import SequenceSplit

MIN_FRAMES = 5
RATE_HZ = 16_000


class Models(NamedTuple):
    """The network, and the encoders of its training data."""

    net: EchoTransformer
    encoders: Encoders


def generate_video(arguments: GenerateArguments, argv: list[str]) -> int:
    """Write the video and print a summary; return the exit code.

    With several devices, start a rank for each by the same command, whose words are `argv`.
    """
    # Check the length of the speech before anything is loaded.
    recipe, start = arguments.recipe(), time.monotonic()
    samples, frames = read_speech(arguments)
    frames_of(frames, recipe, arguments.long_video)
    if arguments.devices > 1 and not started_by_launcher():
        command = [sys.executable, "-P", "-m", "echolab.cli", "generate", *argv]
        return run_ranks(command, arguments.devices)
    check_network(requested_architecture(arguments), arguments)

    with device_group(arguments.devices) as device:
        # Read the inputs before the weights, which take longer.
        footage = footage_of(arguments, frames)
        models = load_models(arguments, device)
        use_attention(models.net, attention_from("auto", device))
        if arguments.devices > 1:
            SequenceSplit(models.net)
        with redirect_stderr(io.StringIO()) if rank_from_environment() else nullcontext():
            video = generate(arguments, models, footage, samples, frames, device)

    # Only rank 0 writes.
    if rank_from_environment():
        leave_rank()
    audio = None if samples is None else samples[: frames * SAMPLES_PER_FRAME]
    write_video(arguments.out, video, audio)
    seconds = time.monotonic() - start
    figures = {"out": str(arguments.out), "frames": frames, "seconds": round(seconds, 2)}
    plain = f"{arguments.out}: {frames} frames ({frames / FPS:.2f} s) in {seconds:.1f} s"
    print(json.dumps(figures) if arguments.format == "json" else plain)
    if arguments.devices > 1:
        leave_rank()
    return 0


def leave_rank() -> NoReturn:
    """End this rank with exit code 0, because threads of gloo may abort Python's shutdown."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextmanager
def device_group(devices: int) -> Iterator[torch.device]:
    """Yield this process's device, within a process group if several share the video."""
    # One device, or a process group with one device per rank.
    on_gpu = torch.cuda.is_available()
    if on_gpu and devices > torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"devices={devices}: this machine has {count}; give devices={count}")
    index = int(os.environ.get("LOCAL_RANK", 0)) if devices > 1 else 0
    device = torch.device("cuda", index) if on_gpu else torch.device("cpu")
    if devices == 1:
        yield device
        return
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield device
        dist.barrier()  # a rank that left early would break the connections of the others
    finally:
        dist.destroy_process_group()


def read_speech(arguments: GenerateArguments) -> tuple[Samples | None, int]:
    """Return the audio samples, if any, and the number of frames of the video."""
    if arguments.audio is None:
        assert arguments.seconds is not None
        samples, length, name = None, round(RATE_HZ * arguments.seconds), Path("seconds=")
    else:
        samples = read_audio(arguments.audio, since=_video_start(arguments))
        name = arguments.audio
        if arguments.seconds is not None:
            samples = samples[: round(RATE_HZ * arguments.seconds)]
        length = len(samples)
    # The video ends with the last full frame of audio.
    frames = length // SAMPLES_PER_FRAME
    if frames < MIN_FRAMES:
        raise MediaError(f"{name}: {length / RATE_HZ:.2f} s of audio, need "
                         f"{MIN_FRAMES / FPS} s or more; give a longer file")  # fmt: skip
    return samples, frames


def _video_start(arguments: GenerateArguments) -> float | None:
    """Return the time of the first frame if the audio comes from the video to regenerate."""
    video, audio = arguments.source_video, arguments.audio
    if arguments.task == "continuation" or video is None or audio is None:
        return None
    if not (video.exists() and audio.exists() and video.samefile(audio)):
        return None
    return float(open_source(video).times[0])


def load_models(arguments: GenerateArguments, device: torch.device) -> Models:
    """Return a released network with its encoders, or a run's EMA with the demo encoders."""
    if arguments.model is not None and arguments.encoder_dir is not None:
        # A released network with its encoders.
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        files = find_released(arguments.encoder_dir, arguments.wav2vec_folder)
        encoders = released_encoders(files, device, dtype, speech=arguments.speech)
        architecture = architecture_of(arguments.model)
        net = load_released(arguments.checkpoint, architecture, dtype)
        if arguments.lora:
            merge_adapters(net, read_adapters(arguments.lora, net))
        return Models(net, encoders)
    checkpoint = last_checkpoint(arguments.checkpoint)
    net = load_policy(checkpoint)
    encoders = demo_encoders(load_net(arguments.vae, CausalAutoencoder))
    check_encoders(checkpoint, encoders.fingerprints)
    return Models(net, encoders)


def requested_architecture(arguments: GenerateArguments) -> Mapping[str, Any]:
    """Return the architecture of the network, without reading its weights."""
    if arguments.model is not None:
        return architecture_of(arguments.model)
    checkpoint = open_checkpoint(last_checkpoint(arguments.checkpoint))
    architecture: dict[str, Any] = checkpoint.state["architecture"]
    return architecture


def check_network(architecture: Mapping[str, Any], arguments: GenerateArguments) -> None:
    """Raise ConfigError if the task needs a branch that the network lacks."""
    # The network needs inputs for known pixels and audio if the task has these.
    channels = architecture.get("in_channels", 36), architecture.get("out_channels", 16)
    if channels[0] <= channels[1] and arguments.task != "t2v":
        raise ConfigError(
            f"{arguments.checkpoint}: the network takes no known pixels, task={arguments.task} "
            "needs them; use task=t2v, or another checkpoint"
        )
    scale = arguments.recipe().audio_guidance_scale
    has_no_audio = architecture.get("audio_dim", 768) is None
    if has_no_audio and (scale != 1 or arguments.task != "t2v"):
        raise ConfigError(
            f"{arguments.checkpoint}: the network takes no audio; use task=t2v with "
            "audio_guidance_scale=1 and seconds=, or another checkpoint"
        )


def generate(
    arguments: GenerateArguments,
    models: Models,
    footage: Footage,
    samples: Samples | None,
    frames: int,
    device: torch.device,
) -> Frames:
    """Return the frames [T, Y, X, 3] of the video, uint8."""
    recipe, long_video = arguments.recipe(), arguments.long_video
    rendered_frames = frames_of(frames, recipe, long_video)

    # Encode the inputs once for the full video.
    footage = footage.extended(rendered_frames)
    negative = recipe.negative_prompt if recipe.guidance_scale != 1 else None
    audio = None if samples is None else torch.from_numpy(samples)
    scene = encode_scene(models.encoders, footage, audio, arguments.prompt, negative)

    # Denoise and decode.
    coefficients = IDENTITY if arguments.model is None else WAN_1B3
    renderer = Renderer(
        models.net.to(device), models.encoders, recipe, arguments.cfg, arguments.seed,
        arguments.teacache_threshold, coefficients, device, work_dtype(device),
    )  # fmt: skip
    with progress("generating", steps_of(rendered_frames, recipe, long_video)) as advance:
        render = render_chunks if long_video == "chunked" else render_windows
        pixels = render(renderer, scene, advance)

    # Postprocess: match the colors of the first frame, paste known pixels of the source.
    video = to_frames(pixels[:, :frames].float().cpu())
    if arguments.match_colors:
        video = match_colors(video)
    if arguments.paste_known and arguments.task in LOCAL_TASKS:
        source, known = to_frames(footage.pixels[:, :frames]), footage.known[:frames, 0].numpy()
        video = paste_known(video, source, known)
    return video
