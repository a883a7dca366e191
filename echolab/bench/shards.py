"""Shards to read, and ways to read them, for `echolab bench data`."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from safetensors.torch import load, save
from torch import Tensor

from echolab.data.collate import FEATURES, read_fp32
from echolab.data.media import decode_flac, decode_mp4, decode_tracks, encode_flac, encode_mp4
from echolab.data.media import encode_tracks as encode_boxes
from echolab.data.shard_reader import ShardDataset, ShardWriter
from echolab.data.shuffle import epoch_order
from echolab.errors import ConfigError
from echolab.geometry import WAN
from echolab.tasks.table import DEFAULT_TASK, KNOWN_TASKS

TASK = DEFAULT_TASK
WANTED = ("latents", "weight", *FEATURES, f"known.{TASK}", f"known_latents.{TASK}")
SHARD_BYTES = 2**28
TEXT, IMAGE, AUDIO = (512, 4096), (257, 1280), 768  # as the released encoders give them
CHUNK = 2**20


def draw_clip(size: tuple[int, int, int], seed: int) -> dict[str, Tensor]:
    """One random encoded clip in fp16 of (frames, height, width) pixels."""
    frames, height, width = size
    side = WAN.token_pixels
    if not WAN.is_clip_length(frames) or height % side or width % side or min(size) < 1:
        lengths = WAN.clip_lengths
        raise ConfigError(f"{frames} frames of {width}x{height}: need {lengths}, sides of {side}")
    generator = torch.Generator().manual_seed(seed)
    places = WAN.latent_grid(frames, height, width)
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (WAN.channels, *places),
        "weight": (1, *places),
    }
    shapes |= {"text": TEXT, "image": IMAGE, "audio": (2 * frames, AUDIO)}
    shapes["face"] = (WAN.tokens(*places[1:]),)
    for task in KNOWN_TASKS:
        shapes |= {f"known.{task}": (WAN.time_stride, *places)}
        shapes |= {f"known_latents.{task}": (WAN.channels, *places)}
    made = {k: torch.randn(v, generator=generator).half() for k, v in shapes.items()}
    shares = (name for name in made if name == "weight" or name.startswith("known."))
    return made | {name: made[name].abs().clamp(max=1) for name in shares}


def write_encoded(folder: Path, size: tuple[int, int, int], total_bytes: float) -> None:
    """Random encoded clips, of about so many bytes."""
    one = len(save(draw_clip(size, 0)))
    count = max(2, round(total_bytes / one))
    each = max(1, SHARD_BYTES // one)
    with ShardWriter(folder, kind="encoded", samples_per_shard=each) as writer:
        for i in range(count):
            about = json.dumps({"caption": f"clip {i}"}).encode()
            writer.write(f"clip-{i}", {"safetensors": save(draw_clip(size, i)), "json": about})


def write_raw(folder: Path, size: tuple[int, int, int], count: int) -> None:
    """The same moving picture and sound again and again, as raw clips."""
    frames, height, width = size
    wave = (
        np.add.outer(np.arange(height), np.arange(width))[None]
        + 3 * np.arange(frames)[:, None, None]
    )
    pixels = np.stack([(wave * k % 256).astype(np.uint8) for k in (1, 2, 3)], -1)
    boxes = np.tile(np.array([0, 0, width, height], np.float32), (frames, 1))
    members = {
        "mp4": encode_mp4(pixels),
        "flac": encode_flac(np.sin(np.arange(640 * frames, dtype=np.float32) / 20)),
        "tracks.npz": encode_boxes(boxes, boxes),
        "json": b'{"caption": "a moving picture"}',
    }
    with ShardWriter(folder, kind="raw", samples_per_shard=max(1, count // 2)) as writer:
        for i in range(count):
            writer.write(f"clip-{i}", members)


def decode_raw(members: dict[str, bytes]) -> tuple[Any, ...]:
    """Frames, sound, boxes and caption, by strict decoders."""
    return (
        decode_mp4(members["mp4"]), decode_flac(members["flac"]),
        decode_tracks(members["tracks.npz"]), json.loads(members["json"]),
    )  # fmt: skip


def decode_encoded(members: dict[str, bytes], wanted: Iterable[str] | None) -> dict[str, Tensor]:
    """Tensors in fp32, as anyone would who has the bytes: safetensors copies each of them once."""
    tensors = load(members["safetensors"])
    return {name: tensors[name].float() for name in wanted or sorted(tensors)}


def training_order(dataset: ShardDataset) -> list[int]:
    """The samples as an epoch has them."""
    counts = dataset.samples_by_shard
    order: list[int] = epoch_order(counts, dataset.fingerprint, seed=0, epoch=0).tolist()
    return order


def tensors_of(
    dataset: ShardDataset, wanted: tuple[str, ...] | None
) -> Iterator[dict[str, Tensor]]:
    """Every sample's tensors in fp32, by us."""
    return (read_fp32(dataset, i, wanted) for i in training_order(dataset))


def members_of(dataset: ShardDataset) -> Iterator[dict[str, bytes]]:
    """Every sample's bytes, by us."""
    return (dataset.read(i) for i in training_order(dataset))


def decoded_of(dataset: ShardDataset) -> Iterator[tuple[Any, ...]]:
    """Every raw sample decoded, by us."""
    return map(decode_raw, members_of(dataset))


def webdataset_of(
    dataset: ShardDataset, decode: Callable[[dict[str, bytes]], object]
) -> Iterator[Any]:
    """Every sample by plain webdataset, in the order of the tars, decoded the same strict way."""
    read = webdataset.WebDataset([str(path) for path in shards_of(dataset)], shardshuffle=False)
    yield from read.map(decode)


def sequentially(dataset: ShardDataset) -> Iterator[int]:
    """The same bytes in the order of the tars, in pieces, into the same memory: their sizes."""
    memory = bytearray(CHUNK)
    for path in shards_of(dataset):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(memory):
                yield count


def shards_of(dataset: ShardDataset) -> list[Path]:
    """The files of a dataset in a folder."""
    return [Path(dataset.folder) / shard.name for shard in dataset.shards]


def evict(paths: list[Path]) -> str | None:
    """Ask that files leave the page cache; why they are still there, or None."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.preadv(file, [bytearray(512)], path.stat().st_size // 2, os.RWF_NOWAIT)
            return f"{path.name} stays in the page cache"
        except BlockingIOError:
            continue  # it would have to come from the disk: as wanted
        except OSError as error:
            return f"nobody can tell what is in the page cache ({error.strerror})"
        finally:
            os.close(file)
    return None
