"""Remote shards: the samples of the local folder, or a typed error in time; never partial
samples.
"""

import contextlib
import hashlib
import io
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fault_server import (
    Answer,
    Fault,
    FaultServer,
    from_the_start,
    longer,
    new_tag,
    other_part,
    reset,
    serving,
    silent,
    slow,
    stall,
    status,
    stubborn,
    trickle,
    truncated,
    wrong,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from echolab.data import shard_cache as caches
from echolab.data.download import FetchError, RetryPolicy, fetch, join_url, parse_url, public_url
from echolab.data.shard_cache import ShardCache, file_lock
from echolab.data.shard_reader import ShardDataset, open_dataset
from echolab.data.shard_writer import ShardWriter
from echolab.errors import ConfigError, DataError

# Where nothing stalls, time must not matter: these machines are busy.
QUICK = RetryPolicy(4, 20.0, 60.0, 0.001, 0.002)
STALLING = QUICK._replace(attempts=10, stall_seconds=0.2)
RNG = np.random.default_rng(0)
SAMPLES = {f"clip-{i:03d}": {"safetensors": RNG.bytes(20_000 + 7 * i)} for i in range(12)}
SHARD = "encoded-000001.tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("dataset")
    with ShardWriter(place, kind="encoded", samples_per_shard=3) as writer:
        for key, members in SAMPLES.items():
            writer.write(key, members)
    return place


@pytest.fixture
def server(folder: Path) -> Iterator[FaultServer]:
    with serving(folder) as made:
        yield made


def remote(server: FaultServer, cache: Path, patience: RetryPolicy = QUICK) -> ShardDataset:
    return open_dataset(server.url, cache_dir=cache, retry_policy=patience)


def stream(dataset: ShardDataset) -> dict[str, dict[str, bytes]]:
    return {key: dataset.read(i) for i, key in enumerate(dataset.keys)}


def names(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_remote_samples_equal_local_ones(server: FaultServer, folder: Path, tmp_path: Path) -> None:
    here, there = open_dataset(folder), remote(server, tmp_path)
    assert stream(there) == stream(here) == SAMPLES
    assert (there.fingerprint, there.samples_by_shard) == (here.fingerprint, here.samples_by_shard)
    stream(remote(server, tmp_path))  # all of it is here by now
    assert {server.asked[shard.name] for shard in here.shards} == {1}
    assert names(tmp_path) == sorted(f"{shard.sha256}.tar" for shard in here.shards)


@pytest.mark.parametrize(
    "fault",
    [truncated, reset, stall, silent, wrong, longer, slow, new_tag, status(500), status(503),
     status(429), status(408)],
)  # fmt: skip
@pytest.mark.parametrize("name", [SHARD, "dataset.json"])
def test_a_transient_fault_changes_no_sample(
    server: FaultServer, tmp_path: Path, fault: Fault, name: str
) -> None:
    server.faults[name] = deque([fault, fault])
    stalls = fault in (stall, silent)
    assert stream(remote(server, tmp_path, STALLING if stalls else QUICK)) == SAMPLES
    assert stalls or server.asked[name] == (1 if fault is slow else 3)
    assert not server.faults[name] or fault is slow
    assert not [path for path in names(tmp_path) if not path.endswith(".tar")]


@pytest.mark.parametrize(
    ("fault", "words", "asked"),
    [
        (truncated, "cut at byte", 4),
        (reset, "connection broke", 4),
        (stall, "no byte for 0.2 s", 4),
        (silent, "no byte for 0.2 s", 4),
        (wrong, "wrong bytes: sha256", 4),
        (longer, "dataset.json says", 4),
        (other_part, "wrong bytes", 4),
        (status(500), "HTTP 500", 4),
        (status(404), "HTTP 404", 1),
        (status(403), "credentials", 1),
    ],
)
def test_a_persistent_fault_is_a_typed_error(
    server: FaultServer, tmp_path: Path, fault: Fault, words: str, asked: int
) -> None:
    dataset = remote(server, tmp_path)
    server.always[SHARD] = fault
    if fault in (stall, silent):
        dataset = remote(server, tmp_path, STALLING._replace(attempts=asked))
    with pytest.raises(FetchError, match=words) as caught:
        dataset.read(4)
    message = str(caught.value)
    assert f"{server.url}/{SHARD}: " in message and "\n" not in message and ";" in message
    assert server.asked[SHARD] == asked
    assert names(tmp_path) == []
    server.always.clear()
    assert stream(dataset) == SAMPLES


def test_an_endless_answer_is_cut_at_the_deadline(server: FaultServer, tmp_path: Path) -> None:
    server.always[SHARD] = trickle
    dataset = remote(server, tmp_path, QUICK._replace(deadline_seconds=0.3))
    with pytest.raises(FetchError, match="too slow|no byte"):
        dataset.read(4)
    assert names(tmp_path) == []


def test_received_bytes_are_not_requested_again(server: FaultServer, tmp_path: Path) -> None:
    dataset = remote(server, tmp_path)
    size = dataset.shards[1].bytes
    server.faults[SHARD] = deque([truncated, truncated])
    assert dataset.read(3) == SAMPLES["clip-003"]
    assert server.resumed == [size // 2, size // 2 + (size - size // 2) // 2]


def test_a_server_without_ranges_is_enough(server: FaultServer, tmp_path: Path) -> None:
    server.faults[SHARD] = deque([truncated, from_the_start])
    assert remote(server, tmp_path).read(3) == SAMPLES["clip-003"]
    assert server.asked[SHARD] == 2


def test_parts_of_two_versions_are_never_joined(server: FaultServer, tmp_path: Path) -> None:
    server.faults[SHARD] = deque([truncated, other_part, truncated, new_tag])
    assert remote(server, tmp_path, QUICK._replace(attempts=6)).read(3) == SAMPLES["clip-003"]


def test_the_rest_of_another_version_is_refused(tmp_path: Path) -> None:
    first, second = RNG.bytes(5000), RNG.bytes(5000)
    (tmp_path / "a").write_bytes(first)

    def replaced(answer: Answer) -> None:
        truncated(answer)
        (tmp_path / "a").write_bytes(second)
        answer.server.tags["a"] = '"2"'

    with serving(tmp_path) as server:
        server.faults["a"] = deque([replaced, stubborn])
        file = io.BytesIO()
        fetch(f"{server.url}/a", file, None, QUICK)
        assert server.resumed == [2500]
    assert file.getvalue() == second


def test_an_unreachable_server_is_a_one_line_error(folder: Path, tmp_path: Path) -> None:
    with serving(folder) as server:
        url = server.url
    with pytest.raises(FetchError, match=r"dataset\.json: no connection .*gave up after 4"):
        open_dataset(url, cache_dir=tmp_path, retry_policy=QUICK)


def read_all(url: str, cache: Path, order: list[int], asked: "multiprocessing.Queue[bool]") -> None:
    dataset = open_dataset(url, cache_dir=cache, retry_policy=QUICK)
    keys = list(SAMPLES)
    asked.put(all(dataset.read(i) == SAMPLES[keys[i]] for i in order))


def test_many_ranks_share_one_download(server: FaultServer, tmp_path: Path) -> None:
    for number in range(4):
        server.always[f"encoded-{number:06d}.tar"] = slow
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue[bool] = context.Queue()
    orders = [[(i + 3 * rank) % 12 for i in range(12)] for rank in range(4)]
    ranks = [
        context.Process(target=read_all, args=(server.url, tmp_path, order, answers))
        for order in orders
    ]
    for rank in ranks:
        rank.start()
    assert all(answers.get(timeout=60) for _ in ranks)
    for rank in ranks:
        rank.join()
    assert [server.asked[f"encoded-{number:06d}.tar"] for number in range(4)] == [1] * 4


def crowd(url: str, cache: Path, limit: float, seed: int) -> None:
    dataset = open_dataset(url, cache_dir=cache, cache_gb=limit, retry_policy=QUICK)
    keys = list(SAMPLES)
    for i in np.random.default_rng(seed).integers(0, len(keys), 40).tolist():
        assert dataset.read(i) == SAMPLES[keys[i]]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_kill_leaves_no_partial_file_under_a_final_name(
    server: FaultServer, tmp_path: Path
) -> None:
    server.faults[SHARD] = deque([stall])
    victim = multiprocessing.get_context("fork").Process(
        target=crowd, args=(server.url, tmp_path, 1.0, 0)
    )
    victim.start()
    while not (server.asked[SHARD] and list(tmp_path.glob("*.partial"))):
        assert victim.is_alive()
        time.sleep(0.01)
    victim.kill()
    victim.join()
    complete = [name for name in names(tmp_path) if name.endswith(".tar")]
    assert all(sha256(tmp_path / name) == name.removesuffix(".tar") for name in complete)
    assert {Path(name).suffix for name in names(tmp_path)} >= {".partial", ".lock"}
    dataset = remote(server, tmp_path)  # clears what was left
    assert names(tmp_path) == complete
    assert stream(dataset) == SAMPLES


def test_a_corrupt_cached_copy_is_downloaded_again(server: FaultServer, tmp_path: Path) -> None:
    dataset = remote(server, tmp_path)
    sample = dataset.sample(4)
    dataset.read(4)
    path = tmp_path / f"{dataset.shards[1].sha256}.tar"
    rotten = bytearray(path.read_bytes())
    rotten[sample.members["safetensors"][0] + 9] ^= 1
    path.write_bytes(rotten)
    assert dataset.read(4) == SAMPLES["clip-004"]
    path.write_bytes(bytes(rotten)[:-512])
    assert dataset.read(4) == SAMPLES["clip-004"]
    assert server.asked[SHARD] == 3


@settings(max_examples=15, deadline=None)
@example(reads=[0, 3, 0, 6], room=2)  # read again: not the oldest any more
@given(reads=st.lists(st.integers(0, 11), max_size=20), room=st.integers(1, 4))
def test_the_cache_stays_within_its_size(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, reads: list[int], room: int
) -> None:
    place = tmp_path_factory.mktemp("cache")
    largest = max(shard.bytes for shard in open_dataset(folder).shards)
    limit = room * largest / 1e9 + 1e-9
    dataset = open_dataset(f"file://{folder}", cache_dir=place, cache_gb=limit, retry_policy=QUICK)
    last: list[int] = []  # shards, the one read last at the end
    for i in reads:
        assert dataset.read(i) == SAMPLES[f"clip-{i:03d}"]
        assert sum(path.stat().st_size for path in place.iterdir()) <= limit * 1e9
        last = [*(shard for shard in last if shard != i // 3), i // 3]
        assert (place / f"{dataset.shards[i // 3].sha256}.tar").exists()
    kept = {path.stem for path in place.glob("*.tar")}
    assert kept == {dataset.shards[shard].sha256 for shard in last[-room:]}  # the oldest went


@pytest.mark.parametrize("room", [1, 2])
def test_many_processes_keep_the_cache_within_its_size(
    folder: Path, tmp_path: Path, room: int
) -> None:
    limit = room * max(shard.bytes for shard in open_dataset(folder).shards)
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=crowd, args=(f"file://{folder}", tmp_path, limit / 1e9, seed))
        for seed in range(3)
    ]
    for rank in ranks:
        rank.start()
    while any(rank.is_alive() for rank in ranks):
        sizes, there = {}, sorted(tmp_path.iterdir())
        for path in there:
            with contextlib.suppress(FileNotFoundError):
                sizes[path.stem] = path.stat().st_size  # one file before and after its renaming
        if there == sorted(tmp_path.iterdir()):  # else they were never there together
            assert sum(sizes.values()) <= limit
        time.sleep(0.005)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert {path.suffix for path in tmp_path.iterdir()} == {".tar"}


def test_a_shard_in_use_is_not_evicted(folder: Path, tmp_path: Path) -> None:
    shards = open_dataset(folder).shards
    limit = max(shard.bytes for shard in shards)
    cache = ShardCache(tmp_path, limit, QUICK._replace(deadline_seconds=0.2))
    urls = [f"file://{folder}/{shard.name}" for shard in shards]
    context = multiprocessing.get_context("fork")
    with cache.open(shards[0], urls[0]) as file:
        child = context.Process(target=time.sleep, args=(60,))  # has all that is open here
        child.start()
        with (
            pytest.raises(ConfigError, match="all shards in it are being read"),
            cache.open(shards[1], urls[1]),
        ):
            pass
        assert os.pread(file, limit, 0) == (folder / shards[0].name).read_bytes()
    with cache.open(shards[1], urls[1]):
        child.kill()
        child.join()
        assert names(tmp_path) == [f"{shards[1].sha256}.tar"]


def test_a_shard_larger_than_the_cache_gives_a_warning(folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(
        f"file://{folder}", cache_dir=tmp_path, cache_gb=1e-5, retry_policy=QUICK
    )
    with pytest.raises(ConfigError, match=r"does not fit in cache_gb=1e-05; raise it"):
        dataset.read(0)
    with pytest.raises(ConfigError, match="cache_gb=0"):
        open_dataset(f"file://{folder}", cache_dir=tmp_path, cache_gb=0)


def hold(path: Path, ready: Any) -> None:
    with file_lock(path, 0.0):
        ready.set()
        time.sleep(60)


def test_the_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=hold, args=(path, ready))
    holder.start()
    assert ready.wait(600)
    with file_lock(path, 0.05) as held:
        assert not held
    holder.kill()
    holder.join()
    with file_lock(path, 0.0) as held:
        assert held
    assert not path.exists()


def test_a_forked_child_does_not_keep_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with file_lock(path, 0.0) as held:
        assert held
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
    with file_lock(path, 0.0) as held:
        assert held
    child.kill()
    child.join()


def test_any_fsspec_url_is_read(folder: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/set", recursive=True)
    try:
        dataset = open_dataset("memory://bucket/set", cache_dir=tmp_path, retry_policy=QUICK)
        assert stream(dataset) == SAMPLES
        memory.rm("/bucket/set/dataset.json")
        with pytest.raises(FetchError, match="upload was finished"):
            open_dataset("memory://bucket/set", cache_dir=tmp_path, retry_policy=QUICK)
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_file_system_that_hangs_or_fails_is_retried(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = type(fsspec.filesystem("file"))
    original_info = local.info
    faults = deque([lambda: time.sleep(1), lambda: 1 / 0])

    def info(self: object, path: str, **words: object) -> object:
        if faults and path.endswith(SHARD):
            faults.popleft()()
        return original_info(self, path, **words)

    dataset = open_dataset(f"file://{folder}", cache_dir=tmp_path, retry_policy=STALLING)
    monkeypatch.setattr(local, "info", info)
    assert stream(dataset) == SAMPLES and not faults


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"s3://.* pip install s3fs"):
        open_dataset("s3://bucket/set", cache_dir=tmp_path, retry_policy=QUICK)
    with pytest.raises(ConfigError, match="strange://"):
        open_dataset("strange://bucket/set", cache_dir=tmp_path, retry_policy=QUICK)


def test_the_cache_comes_from_the_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(caches.FOLDER_VARIABLE, str(tmp_path / "there"))
    open_dataset(f"file://{folder}", retry_policy=QUICK).read(0)
    assert [path.suffix for path in (tmp_path / "there").iterdir()] == [".tar"]


def test_expected_shards_are_prefetched(server: FaultServer, tmp_path: Path) -> None:
    size = max(shard.bytes for shard in remote(server, tmp_path).shards)
    room = 4.1 * size / 1e9  # half of it is for what comes next
    dataset = open_dataset(server.url, cache_dir=tmp_path, cache_gb=room, retry_policy=QUICK)
    dataset.expect([4, 5, 0, 11])
    wanted = [tmp_path / f"{dataset.shards[number].sha256}.tar" for number in (1, 0)]
    until = time.monotonic() + 20
    while not all(path.exists() for path in wanted):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert server.asked["encoded-000003.tar"] == 0  # so far ahead nobody looks
    assert stream(dataset) == SAMPLES
    assert server.asked[SHARD] == 1


@pytest.mark.parametrize(
    ("place", "url"),
    [
        ("https://a/b/", "https://a/b"),
        (Path("https://a/b"), "https://a/b"),
        ("s3://bucket/set", "s3://bucket/set"),
        ("file:///tmp/a", "file:///tmp/a"),
        (Path("file:///tmp/a"), "file://tmp/a"),
        ("/data/set", None),
        ("data/a:b", None),
        ("pipe:curl http://a", None),
    ],
)
def test_urls_are_distinguished_from_paths(place: Path | str, url: str | None) -> None:
    assert parse_url(place) == url


def test_errors_show_no_secrets() -> None:
    url = join_url("https://user:word@host:1/a?token=1", "b.tar")
    assert url == "https://user:word@host:1/a/b.tar?token=1"
    assert public_url(url) == "https://host:1/a/b.tar"
    with pytest.raises(ConfigError, match="chained"):
        parse_url("simplecache::s3://a/b")


def test_a_shard_list_with_foreign_paths_is_refused(folder: Path, tmp_path: Path) -> None:
    text = (folder / "dataset.json").read_text()
    for old, new in (
        ("encoded-000001.tar", "../../etc/a.tar"),
        (text[text.index('"sha256":"') + 10 :][:64], "../x"),
    ):
        (tmp_path / "dataset.json").write_text(text.replace(old, new))
        with pytest.raises(DataError, match=r"dataset\.json: .*not a tar's name"):
            open_dataset(tmp_path)
