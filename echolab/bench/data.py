"""`echolab bench data`: how fast shards are read here, beside plain webdataset and the disk."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from echolab.arguments import parse
from echolab.bench.rows import Row, as_json, as_table, say
from echolab.bench.shards import (
    WANTED,
    decode_encoded,
    decode_raw,
    decoded_of,
    evict,
    members_of,
    sequentially,
    shards_of,
    tensors_of,
    webdataset_of,
    write_encoded,
    write_raw,
)
from echolab.data.batch_sampler import Plan, Source
from echolab.data.collate import read_fp32
from echolab.data.shard_reader import ShardDataset, open_dataset
from echolab.errors import ConfigError

OURS, PEER, LIMIT = "echolab", "webdataset", "sequential read"
RESUME_AT, RESUME_SHARDS, RESUME_MS = 10**6, 2000, 50.0
PLANNED, PLANNED_SHARDS, PLAN_SECONDS, PLAN_MB = 10**8, 10**5, 2.0, 200.0
BATCH = 64
COMPARED = 4  # samples

Way = Callable[[], Iterable[object]]  # goes through all samples once


@dataclass(frozen=True)
class DataArguments:
    """Read shards in turns with plain webdataset, and with nothing but reads of the same bytes.

    One process and one thread each, as a worker has it; medians of the rounds.  Ours reads in the
    order of training and checks every byte; webdataset reads tar after tar and decodes to the same
    tensors.  `cold` is after the files left the page cache.  The plan's figures are of simulated
    datasets, and their aims are beside them.
    """

    clips: Path | None = field(
        default=None, metadata={"help": "an encoded dataset; none draws random clips"}
    )
    raw: Path | None = field(default=None, metadata={"help": "a raw dataset; none draws one"})
    gigabytes: float = field(default=0.5, metadata={"help": "of random encoded clips"})
    raw_clips: int = field(default=4, metadata={"help": "number of drawn raw clips"})
    frames: int = field(default=81, metadata={"help": "of a drawn clip, 4n+1"})
    height: int = field(default=480, metadata={"help": "pixels, of 16"})
    width: int = field(default=832, metadata={"help": "pixels, of 16"})
    rounds: int = field(default=5, metadata={"help": "runs of each"})
    scratch: Path | None = field(
        default=None, metadata={"help": "folder for what is drawn; none is the system's"}
    )
    format: Literal["table", "json"] = field(default="table", metadata={"help": "of the answer"})


def main(argv: list[str]) -> None:
    """Measure and print."""
    arguments = parse(DataArguments, argv, command="echolab bench data")
    if arguments.rounds < 1 or arguments.raw_clips < 1 or not arguments.gigabytes > 0:
        raise ConfigError("rounds=, raw_clips= and gigabytes= must be above 0")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        rows = list(bench(arguments))
    finally:
        torch.set_num_threads(threads)
    print(as_json(rows) if arguments.format == "json" else as_table(rows))


def bench(arguments: DataArguments) -> Iterator[Row]:
    """All rows."""
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
    yield from plan_rows()


def opened(folder: Path, kind: str) -> ShardDataset:
    """A dataset of a kind, of at least one sample; raises DataError, ConfigError."""
    dataset = open_dataset(folder)
    if dataset.kind != kind or not len(dataset):
        raise ConfigError(f"{folder}: {len(dataset)} {dataset.kind} samples; need {kind} ones")
    return dataset


def encoded_rows(folder: Path, rounds: int) -> Iterator[Row]:
    """The tensors that one clip of training needs, then every tensor."""
    dataset = opened(folder, "encoded")
    yield Row("encoded/sample", sum(s.bytes for s in dataset.shards) / len(dataset) / 1e6, "MB")
    yield Row("encoded/difference", difference(dataset), "largest", PEER)
    for name, wanted in (("encoded", WANTED), ("encoded/every_tensor", None)):
        ways: dict[str, Way] = {
            OURS: partial(tensors_of, dataset, wanted),
            PEER: partial(webdataset_of, dataset, partial(decode_encoded, wanted=wanted)),
            LIMIT: partial(sequentially, dataset),
        }
        yield from speed_rows(name, dataset, ways, rounds)


def raw_rows(folder: Path, rounds: int) -> Iterator[Row]:
    """Decoded, where the video's decoder takes the time, and as bytes."""
    dataset = opened(folder, "raw")
    yield Row("raw/sample", sum(s.bytes for s in dataset.shards) / len(dataset) / 1e6, "MB")
    limit = partial(sequentially, dataset)
    decoded = partial(webdataset_of, dataset, decode_raw)
    ways: dict[str, Way] = {OURS: partial(decoded_of, dataset), PEER: decoded, LIMIT: limit}
    yield from speed_rows("raw", dataset, ways, rounds)
    plain = partial(webdataset_of, dataset, dict)
    ways = {OURS: partial(members_of, dataset), PEER: plain, LIMIT: limit}
    yield from speed_rows("raw/bytes", dataset, ways, rounds)


def difference(dataset: ShardDataset) -> float:
    """The largest difference of any wanted tensor between ours and webdataset's; 0 it should be."""
    theirs = webdataset_of(dataset, partial(decode_encoded, wanted=WANTED))
    found = 0.0
    for i, tensors in zip(range(COMPARED), theirs, strict=False):  # samples stand as in the tars
        mine = read_fp32(dataset, i, WANTED)
        found = max(found, *(float((mine[name] - tensors[name]).abs().max()) for name in WANTED))
    return found


def speed_rows(
    name: str, dataset: ShardDataset, ways: dict[str, Way], rounds: int
) -> Iterator[Row]:
    """Samples and bytes a second, warm and cold; the processor's time is free of what others do."""
    samples, megabytes = len(dataset), sum(shard.bytes for shard in dataset.shards) / 1e6
    for state in ("warm", "cold"):
        say(f"measuring {name}, {state}")
        why = evict(shards_of(dataset)) if state == "cold" else None
        if why:
            say(f"{name}/cold: skipped, {why}")
            return
        prepare = partial(evict, shards_of(dataset)) if state == "cold" else None
        wall, processor = in_turns(ways, rounds, prepare)
        here = f"{name}/{state}"
        yield Row(f"{here}/samples", samples / wall[OURS], "1/s", PEER, samples / wall[PEER])
        speed = {way: megabytes / seconds for way, seconds in wall.items()}
        yield Row(f"{here}/bytes", speed[OURS], "MB/s", LIMIT, speed[LIMIT])
        for other in (PEER, LIMIT):
            cost = {way: 1e3 * seconds / samples for way, seconds in processor.items()}
            label = f"{here}/processor_time/{other.replace(' ', '_')}"
            yield Row(label, cost[OURS], "ms/sample", other, cost[other])


def in_turns(
    ways: dict[str, Way], rounds: int, prepare: Callable[[], object] | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each way, by the wall's clock and of this process.

    Each is first in turn, so that what disturbs one disturbs all.
    """
    for way in ways.values():  # decoders at work, and all in the page cache
        exhaust(way)
    wall: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if prepare is not None:
                prepare()
            start, busy = time.perf_counter(), time.process_time()
            exhaust(ways[name])
            wall[name].append(time.perf_counter() - start)
            processor[name].append(max(time.process_time() - busy, 1e-9))
    middle = statistics.median
    return {n: middle(t) for n, t in wall.items()}, {n: middle(t) for n, t in processor.items()}


def exhaust(way: Way) -> None:
    """Go through all samples."""
    for _ in way():
        pass


def memory_rows(folder: Path) -> Iterator[Row]:
    """What a worker that reads takes above what it takes to start."""
    grown = alone(reading_growth, folder, OURS)
    yield Row("memory/worker", grown, "MB", PEER, alone(reading_growth, folder, PEER))


def reading_growth(folder: Path, which: str) -> float:
    """MB by which this process grew while it read a dataset."""
    before = high_water()
    dataset = open_dataset(folder)
    decode = partial(decode_encoded, wanted=WANTED)
    exhaust(
        partial(tensors_of, dataset, WANTED)
        if which == OURS
        else partial(webdataset_of, dataset, decode)
    )
    return high_water() - before


def plan_rows() -> Iterator[Row]:
    """The cost of a resume, and of a plan of very many samples; the aims stand as baselines."""
    say("planning simulated datasets")
    took = [resume_seconds() for _ in range(5)]
    yield Row(
        f"resume/at_sample_{RESUME_AT}", 1e3 * statistics.median(took), "ms", "aim", RESUME_MS
    )
    seconds, grown = alone(plan_cost)
    name = f"plan/{PLANNED:.0e}_samples"
    yield Row(f"{name}/time", seconds, "s", "aim", PLAN_SECONDS)
    yield Row(f"{name}/memory", grown, "MB", "aim", PLAN_MB)


def simulated(samples: int, shards: int) -> Plan:
    """A plan of shards of nearly equal size."""
    counts = np.full(shards, samples // shards)
    return Plan([Source("simulated", "0" * 64, counts)], batch_size=BATCH, seed=0)


def resume_seconds() -> float:
    """From nothing to the list of samples of the global batch in which a sample stands."""
    start = time.perf_counter()
    drawn = simulated(2 * RESUME_AT, RESUME_SHARDS).batch(RESUME_AT // BATCH)
    assert len(drawn) == BATCH
    return time.perf_counter() - start


def plan_cost() -> tuple[float, float]:
    """Seconds and MB of the plan of an epoch, to its first batch and its last."""
    before, start = high_water(), time.perf_counter()
    plan = simulated(PLANNED, PLANNED_SHARDS)
    assert plan.batch(0) and plan.batch(PLANNED // BATCH - 1)
    return time.perf_counter() - start, high_water() - before


def alone(work: Callable[..., Any], *given: object) -> Any:
    """What `work` gives in a process of its own, so that its memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def high_water() -> float:
    """The most MB that this process had in memory since its start."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3
