"""Candidates of a prompt: several clips for the same conditions, from other noise and guidance.

Candidates of one guidance differ by chance alone, and a preference between them is mostly noise
that training learns by heart.  Over several strengths of guidance by sound, from none on, they
differ in what the preference is about.

Each batch of prompts becomes one safetensors file, so that sampling can be stopped and goes on
with the first file that is missing.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from echolab.atomic_io import write_whole
from echolab.data.collate import collate_clips, read_clip
from echolab.data.shard_reader import ShardDataset
from echolab.diffusion.guidance import Net
from echolab.diffusion.pipeline import generate
from echolab.errors import ConfigError, DataError
from echolab.tasks.table import DEFAULT_TASK
from echolab.types import Batch

REQUEST = "request.json"
TASK = DEFAULT_TASK  # what the candidates are asked for: a picture and its sound


def sample_candidates(
    net: Net,
    dataset: ShardDataset,
    folder: Path,
    *,
    prompts: int,
    candidates: int,
    batch: int,
    steps: int,
    shift: float,
    audio_scales: Sequence[float],
    seed: int,
    weights: str,
    dtype: torch.dtype,
    report: Callable[[int], None],
) -> None:
    """Sample for the first `prompts` clips of an encoded dataset; `report` gets prompts done.

    Candidate i is guided by `audio_scales[i % len]`.  `weights` says which checkpoint `net` is.  A
    folder goes on only with the same request.
    """
    if not 0 < prompts <= len(dataset):
        raise DataError(f"{dataset.folder}: {len(dataset)} clips, prompts={prompts}; ask for fewer")
    folder.mkdir(parents=True, exist_ok=True)
    request = {
        "prompts": prompts, "candidates": candidates, "batch": batch, "steps": steps,
        "shift": shift, "audio_scales": list(audio_scales), "seed": seed,
        "clips": dataset.fingerprint, "weights": weights, "encoders": dict(dataset.encoders),
    }  # fmt: skip
    keep_request(folder / REQUEST, request)
    one_each = partial(generate, net, steps=steps, shift=shift, seed=seed, dtype=dtype)
    scales = list(islice(cycle(audio_scales), candidates))
    for first in range(0, prompts, batch):
        path = folder / f"candidates-{first:06d}.safetensors"
        if not path.exists():
            numbers = range(first, min(first + batch, prompts))
            clips = collate_clips(dataset, [read_clip(dataset, i, TASK) for i in numbers])
            write_whole(path, save(several(one_each, clips, scales)))
        report(min(first + batch, prompts))


def several(
    one_each: Callable[..., Tensor], clips: Batch, scales: Sequence[float]
) -> dict[str, Tensor]:
    """A clip of each guidance for each of some prompts, by `key/number`."""
    found = {}
    for candidate, scale in enumerate(scales):
        latents = one_each(clips.conditions, clips.keys, audio_scale=scale, draw_index=candidate)
        for key, clip in zip(clips.keys, latents, strict=True):
            found[f"{key}/{candidate}"] = clip.half().contiguous()
    return found


def keep_request(path: Path, request: dict[str, object]) -> None:
    """Note what a folder of candidates was asked for; ConfigError where it was something else."""
    if not path.exists():
        write_whole(path, json.dumps(request, indent=1).encode())
        return
    kept = json.loads(path.read_text())
    for name, value in request.items():
        if name == "encoders" and name not in kept:
            continue  # sampled before they were noted; the dataset's fingerprint covers them
        if kept.get(name) != value:
            raise ConfigError(
                f"{path.parent}: its candidates were sampled with {name}={kept.get(name)}, not "
                f"{value}; give another folder"
            )


def read_request(folder: Path) -> dict[str, Any]:
    """Return what the candidates of a folder were sampled with; {} if nothing says so."""
    path = folder / REQUEST
    try:
        request: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); sample in another folder") from error
    return request


def read_candidates(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Each prompt's key and its candidates [K, C, F, H, W], in the order of sampling."""
    paths = sorted(folder.glob("candidates-*.safetensors"))
    if not paths:
        raise DataError(f"{folder}: holds no candidates; run `echolab pairs sample` first")
    for path in paths:
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise DataError(f"{path}: damaged ({error}); remove it and sample again") from error
        by_prompt: dict[str, dict[int, Tensor]] = {}
        for name, clip in tensors.items():
            key, _, number = name.rpartition("/")
            if not key or not number.isdecimal():
                raise DataError(f"{path}: {name!r} is no candidate; remove it and sample again")
            by_prompt.setdefault(key, {})[int(number)] = clip.float()
        for key in sorted(by_prompt):
            found = by_prompt[key]
            yield key, torch.stack([found[number] for number in sorted(found)])
