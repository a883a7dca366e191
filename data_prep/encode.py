"""Encode a raw dataset: latents and conditions of every clip, computed once.

Released encoders run one after another: all texts, then all images, audio tracks and videos, so
that only one encoder is in memory at a time.  The tensors of each encoder are stored in OUT/.work,
one file per sample, until the shards are written; the same command resumes an interrupted run.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import load, load_file, save
from torch import Tensor

from data_prep.options import EncodeOptions
from echolab.atomic_io import lock_folder, make_folder, write_atomic
from echolab.data.index import INDEX
from echolab.data.media import decode_flac, decode_mp4, decode_tracks
from echolab.data.shard_reader import ShardDataset, open_dataset
from echolab.data.shard_writer import ShardWriter
from echolab.encoders.demo import CausalAutoencoder
from echolab.encoders.encode import Encoders, demo_encoders, encode_clip, encode_pixels
from echolab.encoders.loading import find_released, released_encoders
from echolab.encoders.umt5 import as_written, cleaned
from echolab.errors import ConfigError, DataError, EcholabError
from echolab.fitting import load_net
from echolab.geometry import WAN
from echolab.progress import progress
from echolab.tasks.masks import gray_out, known_pixels, latent_known
from echolab.tasks.table import KNOWN_TASKS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CLEAN = {"no": as_written, "wan": cleaned}
WORK = ".work"

Members = dict[str, bytes]
Settings = dict[str, str | bool]  # settings besides the encoders that affect the tensors
Stage = Callable[[Members], dict[str, Tensor]]


def encode_and_report(options: EncodeOptions) -> None:
    """Encode a dataset and print a summary."""
    # Released encoders run one after another; the small demo encoders all run on each clip.
    if options.encoders == "released":
        encoders = _load_released(options)
    else:
        encoders = demo_encoders(load_net(options.required_path("vae"), CausalAutoencoder))

    # Add tasks to an encoded dataset, or encode everything; released encoders run in stages.
    settings: Settings = {}
    if options.encoders == "released":
        settings = {"dtype": options.dtype, "tiling": options.tiling}
    if options.encoded is not None:
        clips = add_tasks(options.source, options.encoded, options.out, encoders, settings)
    elif options.encoders == "released":
        clips = encode_in_stages(options.source, options.out, encoders, settings)
    else:
        with progress("encoding clips", len(open_dataset(options.source))) as advance:
            clips = encode_dataset(
                options.source, options.out, encoders, lambda done: advance(done, "")
            )
    figures = {"out": str(options.out), "clips": clips, "encoders": encoders.fingerprints}
    plain = f"{options.out}: {clips} encoded clips"
    print(json.dumps(figures) if options.format == "json" else plain)


def _load_released(options: EncodeOptions) -> Encoders:
    """Return the released encoders on the requested device; raise ConfigError if it is missing."""
    # torch detects a missing device only at the first allocation.
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        line = str(error).splitlines()[0]
        raise ConfigError(
            f"device={options.device}: not on this machine ({line}); give device=cpu"
        ) from error
    # Check that all files exist before loading the first network.
    files = find_released(options.required_path("encoder_dir"), options.required_path("wav2vec"))
    return released_encoders(
        files,
        device,
        DTYPES[options.dtype],
        speech=options.speech,
        clean=CLEAN[options.clean],
        tiling=options.tiling,
    )


# Members of a raw sample, decoded


def open_raw(source: Path) -> ShardDataset:
    """Open a dataset of raw samples; raise DataError for a dataset of another kind."""
    dataset = open_dataset(source)
    if dataset.kind != "raw":
        raise DataError(f"{source}: holds {dataset.kind} samples; give a dataset of the raw kind")
    return dataset


def caption_of(members: Members) -> str:
    """Return the caption of a sample; raise DataError if it has none."""
    try:
        return str(json.loads(members["json"])["caption"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"json: holds no caption ({error!r}); make the sample again") from error


def audio_of(members: Members) -> Tensor:
    """Return audio [n] in [-1, 1] at 16 kHz."""
    return torch.from_numpy(decode_flac(members["flac"]))


def boxes_of(members: Members) -> tuple[Tensor, Tensor]:
    """Return face boxes and lip boxes, [T, 4] each, in pixels."""
    tracks = decode_tracks(members["tracks.npz"])
    return torch.from_numpy(tracks.face), torch.from_numpy(tracks.lips)


def pixels_of(members: Members) -> Tensor:
    """Return pixels [3, T, Y, X] in [-1, 1].

    Raise DataError for a size at which an encoder would drop frames or edges.
    """
    frames = torch.from_numpy(decode_mp4(members["mp4"]))
    count, height, width = frames.shape[:3]
    side = WAN.token_pixels
    if not WAN.is_clip_length(count) or height % side or width % side:
        raise DataError(
            f"mp4: {count} frames of {height} x {width}; need {WAN.clip_lengths} frames and sides "
            f"that are multiples of {side}; cut the source again with `python -m data_prep run`"
        )
    return frames.permute(3, 0, 1, 2).float() / 127.5 - 1


def to_safetensors(key: str, tensors: dict[str, Tensor]) -> bytes:
    """Serialize a sample's tensors in fp16; raise DataError for a value out of range."""
    # A value beyond the fp16 range becomes infinite; otherwise only training would refuse it.
    halves = {name: value.half().contiguous() for name, value in tensors.items()}
    for name, value in halves.items():
        if not bool(value.isfinite().all()):
            raise DataError(f"sample {key}: {name} is not finite in fp16; encode with dtype=fp32")
    return save(halves)


# All encoders on each sample


def encode_dataset(
    source: Path, out: Path, encoders: Encoders, report: Callable[[int], None]
) -> int:
    """Encode every sample of `source` into the new dataset `out`; return the number of samples.

    All encoders process each sample; an interrupted run starts from the beginning.
    """
    dataset = open_raw(source)
    with ShardWriter(
        out,
        kind="encoded",
        encoders=encoders.fingerprints,
        geometry=encoders.geometry,
        description={"source": dataset.fingerprint},
    ) as writer:
        for i, key in enumerate(dataset.keys):
            members = dataset.read(i)
            tensors = encode_members(encoders, members)
            sample = {"safetensors": to_safetensors(key, tensors), "json": members["json"]}
            writer.write(key, sample)
            report(i + 1)
    return len(dataset)


def encode_members(encoders: Encoders, members: Members) -> dict[str, Tensor]:
    """Return the encoded tensors of one raw sample."""
    face, lips = boxes_of(members)
    return encode_clip(
        encoders, pixels_of(members), audio_of(members), caption_of(members), face, lips
    )


# One encoder after another


def encode_in_stages(source: Path, out: Path, encoders: Encoders, settings: Settings) -> int:
    """Encode every sample of `source` into the new dataset `out`; return the number of samples."""
    dataset = open_raw(source)
    description = {"source": dataset.fingerprint, **settings}
    _run_stages(dataset, out, stages_of(encoders), encoders, description)
    return len(dataset)


def stages_of(encoders: Encoders) -> dict[str, Stage]:
    """Return the encoding function of each stage for a raw sample, the largest network first."""

    def audio(members: Members) -> dict[str, Tensor]:
        return {"audio": encoders.audio(audio_of(members), len(boxes_of(members)[0]))}

    return {
        "text": lambda members: {"text": encoders.text(caption_of(members))},
        "image": lambda members: {"image": encoders.image(pixels_of(members)[:, 0])},
        "audio": audio,
        "video": lambda members: encode_pixels(encoders, pixels_of(members), *boxes_of(members)),
    }


def add_tasks(
    source: Path, encoded: Path, out: Path, encoders: Encoders, settings: Settings
) -> int:
    """Copy the dataset `encoded` of `source` to `out`, adding known latents of missing tasks.

    Only the video encoder runs, and only for the missing tasks.  Released encoders, which process
    one clip at a time, reproduce a full encoding byte for byte; demo encoders differ by rounding.

    Return the number of samples.  Raise DataError if `encoded` was made from another source or with
    other encoders or settings, or if no task is missing.
    """
    # The copied tensors must be those that the given encoders would compute.
    dataset, base = open_raw(source), open_dataset(encoded)
    if base.kind != "encoded" or base.description.get("source") != dataset.fingerprint:
        raise DataError(f"encoded={encoded}: was not encoded from {source}; give its own source")
    if base.encoders != encoders.fingerprints:
        raise DataError(f"encoded={encoded}: is of other encoders; give those it was made with")
    for name, value in settings.items():
        if base.description.get(name) != value:
            raise DataError(
                f"encoded={encoded}: was made with {name}={base.description.get(name)}, not "
                f"{value}; give the same {name}="
            )
    # All samples of a dataset have the same tensors, so the first sample shows which are missing.
    present = load(base.read(0)["safetensors"]) if len(base) else {}
    missing = [task for task in KNOWN_TASKS if f"known_latents.{task}" not in present]
    if not missing:
        raise DataError(f"encoded={encoded}: has the known latents of all tasks; use it as it is")

    # A task's mask defines the given pixels; the network sees the latents of only those pixels.
    def known(members: Members) -> dict[str, Tensor]:
        return encode_known(encoders, missing, pixels_of(members), *boxes_of(members))

    _run_stages(
        dataset, out, {f"known {' '.join(missing)}": known}, encoders, base.description, base
    )
    return len(dataset)


@torch.no_grad()
def encode_known(
    encoders: Encoders, tasks: Sequence[str], pixels: Tensor, face: Tensor, lips: Tensor
) -> dict[str, Tensor]:
    """Return masks and known latents of the tasks, for pixels [3, T, Y, X] and boxes [T, 4]."""
    _, frames, height, width = pixels.shape
    # As in `encode_pixels`: the mask, and the latents of the clip with unknown pixels gray.
    tensors = {}
    for task in tasks:
        known = known_pixels(task, frames=frames, height=height, width=width, face=face, lips=lips)
        masked = rearrange(gray_out(rearrange(pixels, "c t y x -> t c y x"), known),
                           "t c y x -> 1 c t y x")  # fmt: skip
        tensors[f"known.{task}"] = latent_known(known, encoders.geometry)
        tensors[f"known_latents.{task}"] = encoders.video.encode(masked)[0]
    return tensors


def _run_stages(
    dataset: ShardDataset,
    out: Path,
    stages: Mapping[str, Stage],
    encoders: Encoders,
    description: dict[str, Any],
    base: ShardDataset | None = None,
) -> None:
    """Run all stages, write the shards from their files and from `base`, then remove the files."""
    make_folder(out)
    with lock_folder(out):
        if (out / INDEX).exists():
            raise DataError(
                f"{out}: already holds a dataset; choose another folder, with encoded={out} if it "
                "lacks a task"
            )
        # Every stage writes one file per sample, so that an interruption loses at most one sample.
        work = out / WORK / _work_hash(dataset, encoders, description)
        for name, stage in stages.items():
            _run_stage(dataset, work / name, stage, f"encoding {name}")
        with (
            ShardWriter(
                out,
                kind="encoded",
                encoders=encoders.fingerprints,
                geometry=encoders.geometry,
                description=description,
            ) as writer,
            progress("writing shards", len(dataset)) as advance,
        ):
            # safetensors sorts the tensors, so their bytes do not depend on the stages.
            for i, key in enumerate(dataset.keys):
                tensors = load(base.read(i)["safetensors"]) if base else {}
                for name in stages:
                    tensors |= load_file(_tensor_path(work / name, key))
                writer.write(key, {"safetensors": save(tensors), "json": dataset.read(i)["json"]})
                advance(i + 1, "")
        shutil.rmtree(out / WORK, ignore_errors=True)


def _run_stage(dataset: ShardDataset, folder: Path, stage: Stage, title: str) -> None:
    """Write the missing files of one stage; name the sample in errors."""
    make_folder(folder)
    with progress(title, len(dataset)) as advance:
        for i, key in enumerate(dataset.keys):
            path = _tensor_path(folder, key)
            if not path.is_file():
                try:
                    tensors = stage(dataset.read(i))
                except EcholabError as error:
                    raise type(error)(f"{dataset.folder}: sample {key}: {error}") from error
                write_atomic(path, to_safetensors(key, tensors))
            advance(i + 1, "")


def _tensor_path(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"


def _work_hash(dataset: ShardDataset, encoders: Encoders, description: Mapping[str, Any]) -> str:
    """Return a hash of all inputs of the tensors, so that no file of another command is reused."""
    content = [dataset.fingerprint, encoders.fingerprints, description]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
