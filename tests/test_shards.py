"""Shards: samples are read as written, damage is always detected, partial files never look
complete.
"""

import errno
import io
import json
import pickle
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset

from echolab.atomic_io import lock_folder
from echolab.data import shard_writer
from echolab.data.index import INDEX, MEMBERS, REQUIRED
from echolab.data.index_tars import index_folder
from echolab.data.shard_reader import open_dataset
from echolab.data.shard_writer import ShardWriter
from echolab.data.verify import verify
from echolab.errors import BusyError, DataError, DiskFullError

RNG = np.random.default_rng(0)


def arrays(count: int) -> bytes:
    file = io.BytesIO()
    np.savez(file, boxes=RNG.random(count))
    return file.getvalue()


SAMPLES = {
    f"clip-{i:03d}": {
        "mp4": RNG.bytes(700 + 300 * i),
        "flac": RNG.bytes(512),  # no padding at all
        "tracks.npz": arrays(1 + i),
        "json": json.dumps({"caption": f"talker {i}"}).encode(),
    }
    for i in range(5)
}


def write(folder: Path, per_shard: int = 2) -> Path:
    with ShardWriter(folder, kind="raw", samples_per_shard=per_shard) as writer:
        for key, members in SAMPLES.items():
            writer.write(key, members)
    return folder


def test_samples_are_read_as_written(tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path))
    assert {key: dataset.read(i) for i, key in enumerate(dataset.keys)} == SAMPLES
    assert (len(dataset), dataset.samples_by_shard, dataset.kind) == (5, [2, 2, 1], "raw")
    assert verify(tmp_path) == []


def test_webdataset_reads_the_same(tmp_path: Path) -> None:
    urls = [str(path) for path in sorted(write(tmp_path).glob("*.tar"))]
    read = webdataset.WebDataset(urls, shardshuffle=False)
    samples = {s["__key__"]: {k: v for k, v in s.items() if k[0] != "_"} for s in read}
    assert samples == SAMPLES


def test_same_samples_give_same_bytes(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        write(folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    other = open_dataset(write(tmp_path / "c", per_shard=3))
    assert other.fingerprint != open_dataset(tmp_path / "a").fingerprint


def test_a_dataset_is_copied_into_workers(tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path))
    assert pickle.loads(pickle.dumps(dataset)).read(3) == SAMPLES["clip-003"]  # noqa: S301


def test_every_cut_is_detected(tmp_path: Path) -> None:
    path = write(tmp_path) / "raw-000001.tar"
    original = path.read_bytes()
    for size in [*range(0, len(original), 512), *RNG.integers(0, len(original), 50)]:
        path.write_bytes(original[:size])
        assert any(path.name in fault for fault in verify(tmp_path)), size
        with pytest.raises(DataError, match=r"raw-000001\.tar"):
            open_dataset(tmp_path)


def test_every_flipped_bit_is_detected(tmp_path: Path) -> None:
    path = write(tmp_path) / "raw-000000.tar"
    original = path.read_bytes()
    for at in RNG.integers(0, len(original), 200):
        flipped = bytearray(original)
        flipped[at] ^= 1 << int(RNG.integers(8))
        path.write_bytes(flipped)
        faults = verify(tmp_path)
        assert faults and all(path.name in fault and "\n" not in fault for fault in faults), at


def test_a_damaged_sample_is_named_with_its_byte(tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path))
    sample = dataset.sample(2)
    offset = sample.members["mp4"][0]
    path = tmp_path / sample.shard
    damaged = bytearray(path.read_bytes())
    damaged[offset + 5] ^= 1
    path.write_bytes(damaged)
    named = rf"{sample.shard}.*{sample.key}.*byte {offset}"
    with pytest.raises(DataError, match=named):
        dataset.read(2)
    assert dataset.read(3) == SAMPLES["clip-003"]
    assert len(verify(tmp_path)) == 1 and f"byte {offset}" in verify(tmp_path)[0]


@pytest.mark.parametrize(
    "order", [[0, 4, 1, 5, 2, 3, 6, 7], [0, 1, 2, 3, 3, 4, 5, 6, 7], [1, 2, 3]]
)
def test_rearranged_members_are_detected(tmp_path: Path, order: list[int]) -> None:
    path = write(tmp_path) / "raw-000000.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member)) for member in tar.getmembers()]
        with tarfile.open(tmp_path / "new", "w", format=tarfile.USTAR_FORMAT) as new:
            for i in order:
                member, data = members[i]
                assert data is not None
                data.seek(0)
                new.addfile(member, data)
    (tmp_path / "new").replace(path)
    assert any("byte" in fault for fault in verify(tmp_path))


def test_a_changed_index_is_detected(tmp_path: Path) -> None:
    path = write(tmp_path) / "dataset.json"
    index = json.loads(path.read_text())
    index["samples"][0]["key"] = "another"
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match="changed after it was written"):
        open_dataset(tmp_path)
    path.write_text("{")
    assert "cannot be read" in verify(tmp_path)[0]
    path.unlink()
    assert "not there" in verify(tmp_path)[0]


@pytest.mark.parametrize(
    ("key", "member"), [("a.b", "mp4"), ("", "mp4"), ("../a", "mp4"), ("a", "pkl"), ("a", "x.json")]
)
def test_names_outside_the_contract_are_refused(tmp_path: Path, key: str, member: str) -> None:
    with pytest.raises(DataError), ShardWriter(tmp_path, kind="raw") as writer:
        writer.write(key, {member: b"1"})
    assert not (tmp_path / "dataset.json").exists()


def test_an_exception_leaves_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, kind="raw") as writer:
        writer.write("a", SAMPLES["clip-000"])
        raise KeyboardInterrupt
    with pytest.raises(DataError, match="no complete dataset"):
        open_dataset(tmp_path)
    write(tmp_path)  # clears what was left
    assert verify(tmp_path) == []
    with pytest.raises(DataError, match="already holds a dataset"):
        write(tmp_path)


def test_a_key_is_written_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="written before"), ShardWriter(tmp_path, kind="raw") as w:
        w.write("a", SAMPLES["clip-000"])
        w.write("a", SAMPLES["clip-000"])


def test_a_full_disk_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFullError) as caught, ShardWriter(tmp_path, kind="raw") as writer:
        monkeypatch.setattr(shard_writer._Partial, "write", full)
        writer.write("a", {**SAMPLES["clip-000"], "mp4": bytes(100_000)})
    monkeypatch.undo()
    message = str(caught.value)
    assert "No space left" in message and "raw-000000.tar" in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_a_real_file_size_limit_leaves_nothing(tmp_path: Path) -> None:
    script = f"""
import resource, sys
from pathlib import Path
from echolab.data.shard_writer import ShardWriter
from echolab.errors import DiskFullError
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    with ShardWriter(Path({str(tmp_path)!r}), kind="encoded") as writer:
        for i in range(100):
            writer.write(f"clip{{i}}", {{"safetensors": bytes(5000)}})
except DiskFullError as error:
    sys.exit(str(error))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and "could not be written" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", sorted(REQUIRED))
def test_a_sample_has_the_members_of_its_kind(tmp_path: Path, kind: str) -> None:
    for name in REQUIRED[kind]:
        members = {other: b"{}" for other in MEMBERS if other != name}
        with (
            pytest.raises(DataError, match=f"sample a has no {name}, which {kind} samples have"),
            ShardWriter(tmp_path / name, kind=kind) as writer,
        ):
            writer.write("a", members)
        assert not (tmp_path / name / INDEX).exists()


def test_one_writer_at_a_time_is_accepted(tmp_path: Path) -> None:
    """Writers in other processes are refused, and the first writer ends undisturbed."""
    alone = write(tmp_path / "alone")
    script = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_shards import SAMPLES, ShardWriter
with ShardWriter(Path({str(tmp_path / "out")!r}), kind="raw", samples_per_shard=2) as writer:
    for number, (key, members) in enumerate(SAMPLES.items()):
        writer.write(key, members)
        print(number, flush=True)
        sys.stdin.readline()
"""
    command = [sys.executable, "-c", script]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        who = rf"out: process {process.pid} on \S+ is writing there; wait"
        with pytest.raises(BusyError, match=who):
            write(tmp_path / "out")
        with pytest.raises(BusyError, match=who):
            index_folder(tmp_path / "out")
        process.kill()
    assert not (tmp_path / "out" / INDEX).exists()
    write(tmp_path / "out")  # the lock went with its holder
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}.keys() == {
        path.name for path in alone.iterdir()
    }
    assert verify(tmp_path / "out") == []


def test_a_lock_excludes_other_threads_too(tmp_path: Path) -> None:
    with lock_folder(tmp_path), lock_folder(tmp_path):
        with ThreadPoolExecutor(1) as pool, pytest.raises(BusyError):
            pool.submit(write, tmp_path).result()
    write(tmp_path)
    assert not (tmp_path / ".lock").exists()


def test_a_lock_that_is_a_link_touches_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / ".lock").symlink_to(tmp_path / "mine")
    write(tmp_path / "d")
    assert (tmp_path / "mine").read_text() == "precious"


def test_an_empty_dataset_is_complete(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, kind="raw"):
        pass
    assert len(open_dataset(tmp_path)) == 0 and verify(tmp_path) == []
