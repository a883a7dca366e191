"""Encoding a dataset one encoder after another: all texts, then all pictures, sounds and videos.

Only one encoder is in memory at a time.  What each made is kept in OUT/.work, a file a sample,
until the shards are written from it; so the same command goes on where it was stopped.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from data_prep.raw import Members, boxes_of, caption_of, open_raw, pixels_of, sound_of
from echolab.atomic_io import exclusive, make_folder, write_whole
from echolab.data.index import INDEX
from echolab.data.shard_reader import ShardDataset, ShardWriter
from echolab.encoders.encode import Encoders, encode_pixels
from echolab.errors import DataError, EcholabError
from echolab.progress import progress

WORK = ".work"

Stage = Callable[[Members], dict[str, Tensor]]


def encode_in_stages(
    source: Path, out: Path, encoders: Encoders, settings: dict[str, str | bool]
) -> int:
    """Encode every sample of `source` into the new dataset `out`; the number of samples.

    `settings` are what changes the values besides the encoders, such as their precision.
    """
    dataset = open_raw(source)
    make_folder(out)
    with exclusive(out):
        if (out / INDEX).exists():
            raise DataError(f"{out}: already holds a dataset; choose another folder")
        _encode(dataset, out, encoders, settings)
    return len(dataset)


def _encode(
    dataset: ShardDataset, out: Path, encoders: Encoders, settings: dict[str, str | bool]
) -> None:
    work = out / WORK / _identity(dataset, encoders, settings)
    for name, stage in stages_of(encoders).items():
        _run(dataset, work / name, stage, f"encoding {name}")
    description = {"source": dataset.fingerprint, **settings}
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
        for i, key in enumerate(dataset.keys):
            tensors: dict[str, Tensor] = {}
            for name in stages_of(encoders):
                tensors |= load_file(_file(work / name, key))
            writer.write(key, {"safetensors": save(tensors), "json": dataset.read(i)["json"]})
            advance(i + 1, "")
    shutil.rmtree(out / WORK, ignore_errors=True)


def stages_of(encoders: Encoders) -> dict[str, Stage]:
    """What each encoder makes of a raw sample, the one with the largest network first."""

    def sound(members: Members) -> dict[str, Tensor]:
        return {"audio": encoders.audio(sound_of(members), len(boxes_of(members)[0]))}

    return {
        "text": lambda members: {"text": encoders.text(caption_of(members))},
        "image": lambda members: {"image": encoders.image(pixels_of(members)[:, 0])},
        "sound": sound,
        "video": lambda members: encode_pixels(encoders, pixels_of(members), *boxes_of(members)),
    }


def stored(key: str, tensors: dict[str, Tensor]) -> bytes:
    """Tensors as a sample keeps them, in fp16; DataError for a value that it cannot hold."""
    halves = {name: value.half().contiguous() for name, value in tensors.items()}
    for name, value in halves.items():
        if not bool(value.isfinite().all()):
            raise DataError(f"sample {key}: {name} is not finite in fp16; encode with dtype=fp32")
    return save(halves)


def _run(dataset: ShardDataset, folder: Path, stage: Stage, title: str) -> None:
    """Make what is not there yet of one stage; an error names the sample."""
    make_folder(folder)
    with progress(title, len(dataset)) as advance:
        for i, key in enumerate(dataset.keys):
            path = _file(folder, key)
            if not path.is_file():
                try:
                    tensors = stage(dataset.read(i))
                except EcholabError as error:
                    raise type(error)(f"{dataset.folder}: sample {key}: {error}") from error
                write_whole(path, stored(key, tensors))
            advance(i + 1, "")


def _file(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"


def _identity(dataset: ShardDataset, encoders: Encoders, settings: dict[str, str | bool]) -> str:
    """A hash of all that the values depend on: leftovers of other commands are not taken up."""
    content = [dataset.fingerprint, encoders.fingerprints, settings]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
