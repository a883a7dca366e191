"""Sample candidates: several clips for the same conditions, with different noise and guidance.

Candidates with equal guidance differ only by chance, and training would memorize the noise in
preferences between them.  Candidates with audio guidance from none to strong differ in lip sync, on
which the preference is based.

Each batch of prompts becomes one safetensors file; interrupted sampling resumes with the first
missing file.
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

from echolab.atomic_io import write_atomic
from echolab.data.collate import collate_clips, read_clip
from echolab.data.shard_reader import ShardDataset
from echolab.diffusion.guidance import Net
from echolab.diffusion.pipeline import generate
from echolab.errors import ConfigError, DataError
from echolab.tasks.table import DEFAULT_TASK
from echolab.types import Batch

# Name of the file with the sampling arguments of all candidates of a folder.
REQUEST = "request.json"
TASK = DEFAULT_TASK  # the candidates' task: an image and its audio


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
    """Sample candidates for the first `prompts` clips of an encoded dataset.

    Candidate i has audio guidance `audio_scales[i % len]`.  `weights` names the checkpoint of
    `net`; `report` receives the number of prompts done.  Raise ConfigError for a folder of
    candidates that were sampled with other arguments.
    """
    if not 0 < prompts <= len(dataset):
        raise DataError(f"{dataset.folder}: {len(dataset)} clips, prompts={prompts}; ask for fewer")
    folder.mkdir(parents=True, exist_ok=True)
    request = {
        "prompts": prompts, "candidates": candidates, "batch": batch, "steps": steps,
        "shift": shift, "audio_scales": list(audio_scales), "seed": seed,
        "clips": dataset.fingerprint, "weights": weights, "encoders": dict(dataset.encoders),
    }  # fmt: skip
    record_request(folder / REQUEST, request)
    sample = partial(generate, net, steps=steps, shift=shift, seed=seed, dtype=dtype)
    scales = list(islice(cycle(audio_scales), candidates))
    for first in range(0, prompts, batch):
        path = folder / f"candidates-{first:06d}.safetensors"
        if not path.exists():  # files that exist are complete
            indices = range(first, min(first + batch, prompts))
            clips = collate_clips(dataset, [read_clip(dataset, i, TASK) for i in indices])
            write_atomic(path, save(sample_each_scale(sample, clips, scales)))
        report(min(first + batch, prompts))


def sample_each_scale(
    sample: Callable[..., Tensor], clips: Batch, scales: Sequence[float]
) -> dict[str, Tensor]:
    """Return one clip for each prompt and guidance scale, under the name `key/candidate`."""
    # The candidate index also selects the noise.
    samples = {}
    for candidate, scale in enumerate(scales):
        latents = sample(clips.conditions, clips.keys, audio_scale=scale, draw_index=candidate)
        for key, clip in zip(clips.keys, latents, strict=True):
            samples[f"{key}/{candidate}"] = clip.half().contiguous()
    return samples


def record_request(path: Path, request: dict[str, object]) -> None:
    """Record the sampling arguments of a folder; raise ConfigError if other ones are recorded."""
    # The first run records its arguments.
    if not path.exists():
        write_atomic(path, json.dumps(request, indent=1).encode())
        return
    # Refuse other arguments, since such candidates cannot be compared.
    recorded = json.loads(path.read_text())
    for name, value in request.items():
        if name == "encoders" and name not in recorded:
            continue  # not recorded by earlier versions; the dataset fingerprint covers them
        if recorded.get(name) != value:
            raise ConfigError(
                f"{path.parent}: its candidates were sampled with {name}={recorded.get(name)}, not "
                f"{value}; give another folder"
            )


def read_request(folder: Path) -> dict[str, Any]:
    """Return the sampling arguments of a folder of candidates; {} if unknown."""
    path = folder / REQUEST
    # Folders of earlier versions have no such file.
    try:
        request: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); sample in another folder") from error
    return request


def read_candidates(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield each prompt's key and its candidates [K, C, F, H, W], in the order of sampling.

    Raise DataError if there are no candidates, or for a damaged file.
    """
    paths = sorted(folder.glob("candidates-*.safetensors"))
    if not paths:
        raise DataError(f"{folder}: holds no candidates; run `echolab pairs sample` first")
    for path in paths:
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise DataError(
                f"{path}: damaged ({error}); remove the file and sample again"
            ) from error
        # Names are KEY/INDEX; stack the clips of each prompt.
        by_prompt: dict[str, dict[int, Tensor]] = {}
        for name, clip in tensors.items():
            key, _, candidate = name.rpartition("/")
            if not key or not candidate.isdecimal():
                raise DataError(
                    f"{path}: {name!r} is not a candidate; remove the file and sample again"
                )
            by_prompt.setdefault(key, {})[int(candidate)] = clip.float()
        for key in sorted(by_prompt):
            candidates = by_prompt[key]
            yield key, torch.stack([candidates[index] for index in sorted(candidates)])
