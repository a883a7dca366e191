"""`echolab bench data`: speed of reading shards, compared with plain webdataset and the disk."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from safetensors.torch import load, save
from torch import Tensor

from echolab.bench.commands import DataArguments
from echolab.bench.measure import Row, say
from echolab.data.batch_sampler import epoch_order
from echolab.data.collate import FEATURES, read_fp32
from echolab.data.media import decode_flac, decode_mp4, decode_tracks, encode_flac, encode_mp4
from echolab.data.media import encode_tracks as encode_boxes
from echolab.data.shard_reader import ShardDataset, open_dataset
from echolab.data.shard_writer import ShardWriter
from echolab.errors import ConfigError
from echolab.geometry import WAN
from echolab.tasks.table import DEFAULT_TASK, KNOWN_TASKS

OURS, PEER, LIMIT = "echolab", "webdataset", "sequential read"
COMPARED = 4  # samples whose tensors are compared
TASK = DEFAULT_TASK
WANTED = ("latents", "weight", *FEATURES, f"known.{TASK}", f"known_latents.{TASK}")
SHARD_BYTES = 2**28
TEXT, IMAGE, AUDIO = (512, 4096), (257, 1280), 768  # as the released encoders give them
CHUNK = 2**20


Reader = Callable[[], Iterable[object]]  # reads all samples once


def rows_of(arguments: DataArguments) -> list[Row]:
    """Return the rows of the benchmark that the arguments request."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        return list(bench(arguments))
    finally:
        torch.set_num_threads(threads)


def bench(arguments: DataArguments) -> Iterator[Row]:
    """Yield all rows."""
    size = (arguments.frames, arguments.height, arguments.width)
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="bench-data-") as name:
        folder = Path(name)
        if arguments.clips is None:
            say(f"drawing {arguments.gigabytes:g} GB of encoded clips")
            write_encoded(folder / "encoded", size, arguments.gigabytes * 1e9)
        if arguments.raw is None:
            say(f"drawing {arguments.raw_clips} raw clips")
            write_raw(folder / "raw", size, arguments.raw_clips)
        yield from encoded_rows(arguments.clips or folder / "encoded", arguments.rounds)
        yield from raw_rows(arguments.raw or folder / "raw", arguments.rounds)
        yield from memory_rows(arguments.clips or folder / "encoded")


def opened(folder: Path, kind: str) -> ShardDataset:
    """Open a dataset.  Raise ConfigError if it is of another kind or empty."""
    # Speed cannot be measured on an empty dataset or on another kind.
    dataset = open_dataset(folder)
    if dataset.kind != kind or not len(dataset):
        raise ConfigError(f"{folder}: {len(dataset)} {dataset.kind} samples; need {kind} ones")
    return dataset


def encoded_rows(folder: Path, rounds: int) -> Iterator[Row]:
    """Yield rows for the tensors of a clip that training needs, then for all tensors."""
    dataset = opened(folder, "encoded")
    yield Row("encoded/sample", sum(s.bytes for s in dataset.shards) / len(dataset) / 1e6, "MB")
    yield Row("encoded/difference", difference(dataset), "largest", PEER)
    for name, wanted in (("encoded", WANTED), ("encoded/every_tensor", None)):
        # The three readers return the same tensors, or the same bytes.
        readers: dict[str, Reader] = {
            OURS: partial(tensors_of, dataset, wanted),
            PEER: partial(webdataset_of, dataset, partial(decode_encoded, wanted=wanted)),
            LIMIT: partial(sequentially, dataset),
        }
        yield from speed_rows(name, dataset, readers, rounds)


def raw_rows(folder: Path, rounds: int) -> Iterator[Row]:
    """Yield rows for decoded clips, where video decoding dominates, and for undecoded bytes."""
    dataset = opened(folder, "raw")
    yield Row("raw/sample", sum(s.bytes for s in dataset.shards) / len(dataset) / 1e6, "MB")
    limit = partial(sequentially, dataset)
    decoded = partial(webdataset_of, dataset, decode_raw)
    readers: dict[str, Reader] = {OURS: partial(decoded_of, dataset), PEER: decoded, LIMIT: limit}
    yield from speed_rows("raw", dataset, readers, rounds)
    plain = partial(webdataset_of, dataset, dict)
    readers = {OURS: partial(members_of, dataset), PEER: plain, LIMIT: limit}
    yield from speed_rows("raw/bytes", dataset, readers, rounds)


def difference(dataset: ShardDataset) -> float:
    """Return the largest difference of a tensor between both readers; it should be 0."""
    # Compare the first samples value by value.
    theirs = webdataset_of(dataset, partial(decode_encoded, wanted=WANTED))
    largest = 0.0
    for i, tensors in zip(range(COMPARED), theirs, strict=False):  # both in tar order
        ours = read_fp32(dataset, i, WANTED)
        largest = max(
            largest, *(float((ours[name] - tensors[name]).abs().max()) for name in WANTED)
        )
    return largest


def speed_rows(
    name: str, dataset: ShardDataset, readers: dict[str, Reader], rounds: int
) -> Iterator[Row]:
    """Yield samples and bytes per second, warm and cold, and the processor time per sample."""
    samples, megabytes = len(dataset), sum(shard.bytes for shard in dataset.shards) / 1e6
    for state in ("warm", "cold"):
        say(f"measuring {name}, {state}")
        # Cold: the shards leave the page cache before each round.
        reason = evict(shards_of(dataset)) if state == "cold" else None
        if reason:
            say(f"{name}/cold: skipped, {reason}")
            return
        prepare = partial(evict, shards_of(dataset)) if state == "cold" else None
        wall, processor = in_turns(readers, rounds, prepare)
        label = f"{name}/{state}"
        yield Row(f"{label}/samples", samples / wall[OURS], "1/s", PEER, samples / wall[PEER])
        speed = {reader: megabytes / seconds for reader, seconds in wall.items()}
        yield Row(f"{label}/bytes", speed[OURS], "MB/s", LIMIT, speed[LIMIT])
        # Compare with webdataset, and with the disk alone.
        for baseline in (PEER, LIMIT):
            cost = {reader: 1e3 * seconds / samples for reader, seconds in processor.items()}
            row = f"{label}/processor_time/{baseline.replace(' ', '_')}"
            yield Row(row, cost[OURS], "ms/sample", baseline, cost[baseline])


def in_turns(
    readers: dict[str, Reader], rounds: int, prepare: Callable[[], object] | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the median seconds of each reader: wall time, and processor time of this process.

    Each round begins with another reader, so that disturbances affect all readers equally.
    """
    # Warm up, then alternate the order from round to round.
    for reader in readers.values():  # initializes decoders and fills the page cache
        exhaust(reader)
    wall: dict[str, list[float]] = {name: [] for name in readers}
    processor: dict[str, list[float]] = {name: [] for name in readers}
    names = list(readers)
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            if prepare is not None:
                prepare()
            start, busy = time.perf_counter(), time.process_time()
            exhaust(readers[name])
            wall[name].append(time.perf_counter() - start)
            processor[name].append(max(time.process_time() - busy, 1e-9))
    median = statistics.median
    return {n: median(t) for n, t in wall.items()}, {n: median(t) for n, t in processor.items()}


def exhaust(reader: Reader) -> None:
    """Read all samples."""
    for _ in reader():
        pass


def memory_rows(folder: Path) -> Iterator[Row]:
    """Yield the memory of a worker that reads, above its memory at the start."""
    grown = alone(reading_growth, folder, OURS)
    yield Row("memory/worker", grown, "MB", PEER, alone(reading_growth, folder, PEER))


def reading_growth(folder: Path, reader: str) -> float:
    """Return the MB by which this process grew while it read a dataset."""
    before = high_water()
    dataset = open_dataset(folder)
    decode = partial(decode_encoded, wanted=WANTED)
    exhaust(
        partial(tensors_of, dataset, WANTED)
        if reader == OURS
        else partial(webdataset_of, dataset, decode)
    )
    return high_water() - before


def alone(work: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a new process, so that its memory can be measured alone."""
    # The peak of a process never decreases, so every measurement needs a new process.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def high_water() -> float:
    """Return the peak memory of this process since its start, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


# -- shards to read ------------------------------------------------------------------------------


def draw_clip(size: tuple[int, int, int], seed: int) -> dict[str, Tensor]:
    """Draw one random encoded clip in fp16 of (frames, height, width) pixels."""
    frames, height, width = size
    generator = torch.Generator().manual_seed(seed)
    # Members and shapes of an encoded sample.
    grid = WAN.latent_grid(frames, height, width)
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (WAN.channels, *grid),
        "weight": (1, *grid),
    }
    shapes |= {"text": TEXT, "image": IMAGE, "audio": (2 * frames, AUDIO)}
    shapes["face"] = (WAN.tokens(*grid[1:]),)
    for task in KNOWN_TASKS:
        shapes |= {f"known.{task}": (WAN.time_stride, *grid)}
        shapes |= {f"known_latents.{task}": (WAN.channels, *grid)}
    # Masks and weights are in [0, 1], all other values are normal.
    made = {k: torch.randn(v, generator=generator).half() for k, v in shapes.items()}
    fractions = (name for name in made if name == "weight" or name.startswith("known."))
    return made | {name: made[name].abs().clamp(max=1) for name in fractions}


def write_encoded(folder: Path, size: tuple[int, int, int], total_bytes: float) -> None:
    """Write random encoded clips of about `total_bytes` in total."""
    sample_bytes = len(save(draw_clip(size, 0)))
    count = max(2, round(total_bytes / sample_bytes))
    per_shard = max(1, SHARD_BYTES // sample_bytes)
    # Draw samples until the size is reached.
    with ShardWriter(folder, kind="encoded", samples_per_shard=per_shard) as writer:
        for i in range(count):
            about = json.dumps({"caption": f"clip {i}"}).encode()
            writer.write(f"clip-{i}", {"safetensors": save(draw_clip(size, i)), "json": about})


def write_raw(folder: Path, size: tuple[int, int, int], count: int) -> None:
    """Write raw clips, all with the same video and audio."""
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
        "json": b'{"caption": "a moving image"}',
    }
    with ShardWriter(folder, kind="raw", samples_per_shard=max(1, count // 2)) as writer:
        for i in range(count):
            writer.write(f"clip-{i}", members)


def decode_raw(members: dict[str, bytes]) -> tuple[Any, ...]:
    """Decode frames, audio, boxes and caption with the strict decoders of training."""
    return (
        decode_mp4(members["mp4"]), decode_flac(members["flac"]),
        decode_tracks(members["tracks.npz"]), json.loads(members["json"]),
    )  # fmt: skip


def decode_encoded(members: dict[str, bytes], wanted: Iterable[str] | None) -> dict[str, Tensor]:
    """Decode tensors to fp32 without optimization: safetensors copies each tensor once."""
    tensors = load(members["safetensors"])
    return {name: tensors[name].float() for name in wanted or sorted(tensors)}


# -- readers --------------------------------------------------------------------------------------


def training_order(dataset: ShardDataset) -> list[int]:
    """Return the samples in the order of an epoch."""
    counts = dataset.samples_by_shard
    order: list[int] = epoch_order(counts, dataset.fingerprint, seed=0, epoch=0).tolist()
    return order


def tensors_of(
    dataset: ShardDataset, wanted: tuple[str, ...] | None
) -> Iterator[dict[str, Tensor]]:
    """Read every sample's tensors in fp32 with our reader."""
    return (read_fp32(dataset, i, wanted) for i in training_order(dataset))


def members_of(dataset: ShardDataset) -> Iterator[dict[str, bytes]]:
    """Read every sample's bytes with our reader."""
    return (dataset.read(i) for i in training_order(dataset))


def decoded_of(dataset: ShardDataset) -> Iterator[tuple[Any, ...]]:
    """Read and decode every raw sample with our reader."""
    return map(decode_raw, members_of(dataset))


def webdataset_of(
    dataset: ShardDataset, decode: Callable[[dict[str, bytes]], object]
) -> Iterator[Any]:
    """Read every sample with plain webdataset, in tar order, with the same strict decoding."""
    read = webdataset.WebDataset([str(path) for path in shards_of(dataset)], shardshuffle=False)
    yield from read.map(decode)


def sequentially(dataset: ShardDataset) -> Iterator[int]:
    """Read the same bytes in tar order into one buffer, and yield the sizes of the pieces."""
    memory = bytearray(CHUNK)
    for path in shards_of(dataset):
        # Unbuffered reads of large pieces: the limit of the disk.
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(memory):
                yield count


def shards_of(dataset: ShardDataset) -> list[Path]:
    """Return the files of a dataset in a folder."""
    return [Path(dataset.folder) / shard.name for shard in dataset.shards]


def evict(paths: list[Path]) -> str | None:
    """Drop files from the page cache; return why that failed, or None."""
    for path in paths:
        # Ask the kernel to drop the pages of the file.
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.preadv(file, [bytearray(512)], path.stat().st_size // 2, os.RWF_NOWAIT)
            return f"{path.name} stays in the page cache"
        except BlockingIOError:
            continue  # not in the page cache, as intended
        except OSError as error:
            return f"the page cache cannot be read ({error.strerror})"
        finally:
            os.close(file)
    return None
