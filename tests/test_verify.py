"""`echolab data verify`: all damage of a shard, an index or a folder is reported with its position.

Every fault must name the shard, a byte offset and, if the shard has samples, a sample.
"""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
from safetensors.numpy import save

from echolab.cli.__main__ import main
from echolab.data.index import REQUIRED, Sample, Shard, fingerprint
from echolab.data.media import encode_flac, encode_mp4
from echolab.data.shard_writer import ShardWriter
from echolab.data.tars import read_tar
from echolab.data.verify import Fault, find_faults, verify

SAMPLES = foreign.raw_samples(6)
RNG = np.random.default_rng(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "d", kind="raw", samples_per_shard=2) as writer:
        for key, members in SAMPLES.items():
            writer.write(key, members)
    assert verify(tmp_path / "d") == []
    return tmp_path / "d"


def regions(path: Path) -> dict[str, list[int]]:
    """Return every byte of a shard by its role."""
    offsets: dict[str, list[int]] = {name: [] for name in ("header", "checksum", "data", "padding")}
    end = 0
    for member in read_tar(path)[0]:
        checksum = range(member.header + 148, member.header + 156)
        offsets["checksum"] += checksum
        offsets["header"] += [b for b in range(member.header, member.offset) if b not in checksum]
        stop = member.offset + member.size
        end = stop + -stop % 512
        offsets["data"] += range(member.offset, stop)
        offsets["padding"] += range(stop, end)
    return offsets | {"end": list(range(end, path.stat().st_size))}


def all_placed(faults: list[Fault], shard: str, what: object) -> None:
    assert faults, what
    for fault in faults:
        assert fault.file == shard and fault.byte is not None and fault.sample in SAMPLES, (
            what,
            fault,
        )
        assert "\n" not in fault.line(Path())


def test_every_cut_is_detected(folder: Path) -> None:
    path = folder / "raw-000001.tar"
    original = path.read_bytes()
    for size in [*range(0, len(original), 512), *RNG.integers(0, len(original), 200)]:
        path.write_bytes(original[:size])
        faults = find_faults(folder)
        all_placed(faults, path.name, size)
        assert min(fault.byte or 0 for fault in faults) <= size


def owners(path: Path) -> Callable[[int], str]:
    starts = [(m.header, m.name.split(".")[0]) for m in read_tar(path)[0]]
    return lambda byte: [key for header, key in starts if header <= byte][-1]


@pytest.mark.parametrize("region", ["header", "checksum", "data", "padding", "end"])
def test_every_flipped_byte_is_detected(folder: Path, region: str) -> None:
    path = folder / "raw-000001.tar"
    original, owner = path.read_bytes(), owners(path)
    for at in RNG.choice(regions(path)[region], 120):
        damaged = bytearray(original)
        damaged[at] ^= int(RNG.integers(1, 256))
        path.write_bytes(damaged)
        faults = find_faults(folder)
        all_placed(faults, path.name, (region, at))
        # The first line names the sample whose byte it is, within that member or header.
        assert faults[0].sample == owner(int(at)), (region, at, faults)
        assert faults[0].byte is not None and faults[0].byte <= at


def test_one_flipped_byte_of_data_gives_one_line(folder: Path) -> None:
    path = folder / "raw-000001.tar"
    member = read_tar(path)[0][6]
    damaged = bytearray(path.read_bytes())
    damaged[member.offset] ^= 1
    path.write_bytes(damaged)
    key, kind = member.name.split(".", 1)
    assert verify(folder) == [
        f"{path}: byte {member.offset}: sample {key}: {kind} does not match its checksum"
    ]


def test_a_changed_header_that_keeps_its_checksum_is_detected(folder: Path) -> None:
    path = folder / "raw-000001.tar"
    member = read_tar(path)[0][3]
    damaged = bytearray(path.read_bytes())
    mode = damaged[member.header + 100 : member.header + 107].rstrip(b"\0")
    at = next(i for i in range(len(mode) - 1) if mode[i] != mode[i + 1])
    first = member.header + 100 + at  # digits that change places keep the sum
    damaged[first], damaged[first + 1] = damaged[first + 1], damaged[first]
    path.write_bytes(damaged)
    (fault,) = find_faults(folder)
    assert (fault.byte, fault.sample) == (first, member.name.split(".")[0])


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_rearranged_members_are_detected(folder: Path, form: int) -> None:
    path = folder / "raw-000001.tar"
    data = path.read_bytes()
    members = [(m.name, data[m.offset : m.offset + m.size]) for m in read_tar(path)[0]]
    half = len(members) // 2
    damages: dict[str, list[tuple[str, bytes]]] = {
        f"order {i}": [members[j] for j in RNG.permutation(len(members))] for i in range(20)
    }
    damages |= {f"double {i}": [*members[: i + 1], *members[i:]] for i in range(len(members))}
    damages |= {f"lacks {i}": members[:i] + members[i + 1 :] for i in range(len(members))}
    damages["interleaved"] = [
        m for pair in zip(members[:half], members[half:], strict=True) for m in pair
    ]
    damages["samples swapped"] = members[half:] + members[:half]
    damages["dotted"] = [(n.replace(".mp4", ".v1.mp4"), d) for n, d in members]
    damages["renamed"] = [(n.replace("clip-002", "clip-009"), d) for n, d in members]
    damages["more"] = [*members, ("clip-003.txt", b"more")]
    damages["folder"] = [(f"in/{n}", d) for n, d in members]
    damages["no dot"] = [*members, ("README", b"")]
    for name, damage in damages.items():
        if damage != members:
            foreign.pack(path, damage, form)
            faults = find_faults(folder)
            assert faults, name
            for fault in faults:
                assert fault.file == path.name and fault.byte is not None and fault.sample, name


def test_dotted_and_interleaved_members_are_named_as_such(folder: Path) -> None:
    path = folder / "raw-000001.tar"
    data = path.read_bytes()
    members = [(m.name, data[m.offset : m.offset + m.size]) for m in read_tar(path)[0]]
    foreign.pack(path, [(n.replace(".mp4", ".v1.mp4"), d) for n, d in members])
    assert any("key with dots" in fault for fault in verify(folder))
    foreign.pack(path, members[:3] + members[5:] + members[3:5])
    assert any("after another sample began" in fault for fault in verify(folder))
    foreign.pack(path, members + members[-1:])
    assert any(f"a second {members[-1][0].partition('.')[2]}" in fault for fault in verify(folder))


def test_swapped_missing_and_extra_shards_are_detected(folder: Path) -> None:
    first, second = folder / "raw-000000.tar", folder / "raw-000001.tar"
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    assert {fault.file for fault in find_faults(folder)} == {first.name, second.name}
    second.rename(folder / "x")
    first.rename(second)
    assert all("No such file" in fault for fault in verify(folder))
    (folder / "x").rename(first)
    assert verify(folder) == []
    for name in ("raw-000009.tar", "other.tar.gz", "raw-000003.tar.partial"):
        (folder / name).write_bytes(first.read_bytes())
        assert [fault.file for fault in find_faults(folder)] == [name]
        (folder / name).unlink()


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change dataset.json, and its fingerprint with it."""
    path = folder / "dataset.json"
    index = json.loads(path.read_text())
    change(index)
    index["fingerprint"] = fingerprint(
        index["kind"], index["encoders"], index["shards"], index["samples"]
    )
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["samples"].pop(2),
        lambda index: index["samples"].append(index["samples"][0]),
        lambda index: index["samples"].reverse(),
        lambda index: index["samples"][2]["members"].pop("json"),
        lambda index: index["samples"][2].update(shard="raw-000002.tar"),
        lambda index: index["samples"][2].update(key="another"),
        lambda index: index["shards"].pop(1),
        lambda index: index["shards"][1].update(samples=1),
        lambda index: index["shards"][1].update(bytes=1),
        lambda index: index["shards"][1].update(sha256="0" * 64),
        lambda index: index["shards"][1].update(name="../raw-000001.tar"),
        lambda index: index["samples"][2]["members"]["mp4"].__setitem__(2, 0),
        lambda index: index["samples"][2]["members"].update(mp4="none"),
        lambda index: index["samples"].append(None),
    ],
)
def test_a_wrong_index_is_detected(
    folder: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    rewrite(folder, change)
    faults = verify(folder)
    assert faults and all("\n" not in fault for fault in faults)


@pytest.mark.parametrize(
    ("member", "data"),
    [
        ("json", b"{"),
        ("json", b'{"a": "\xff"}'),
        ("json", b"[" * 100_000),
        ("safetensors", b""),
        ("safetensors", save({"a": np.zeros(3, np.float32)})[:-1]),
        ("safetensors", save({"a": np.zeros(3, np.float32)}) + b"\0"),
        ("safetensors", (2).to_bytes(8, "little") + b"[]"),
        ("safetensors", b"\xff" * 40),
        ("safetensors", (60).to_bytes(8, "little")
            + b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}'.ljust(60) + bytes(4)),
        ("tracks.npz", b"PK"),
        ("tracks.npz", SAMPLES["clip-000"]["tracks.npz"][:-30]),
    ],
)  # fmt: skip
def test_samples_that_were_written_broken_are_detected(
    tmp_path: Path, member: str, data: bytes
) -> None:
    with ShardWriter(tmp_path, kind="raw") as writer:
        for key, members in SAMPLES.items():
            writer.write(key, {**members, member: data} if key == "clip-001" else members)
    (fault,) = find_faults(tmp_path)
    assert (fault.file, fault.sample) == ("raw-000000.tar", "clip-001")
    assert f"{member} cannot be decoded" in fault.what and fault.byte


def test_pickled_arrays_are_not_loaded(tmp_path: Path) -> None:
    with (tmp_path / "a.npz").open("wb") as file:
        np.savez(file, face=np.array([print], object))
    with ShardWriter(tmp_path / "d", kind="raw") as writer:
        arrays = (tmp_path / "a.npz").read_bytes()
        writer.write("a", {**SAMPLES["clip-000"], "tracks.npz": arrays})
    assert "cannot be decoded" in verify(tmp_path / "d")[0]


def test_deep_decodes_media_and_values(tmp_path: Path) -> None:
    frames = np.zeros((5, 32, 32, 3), np.uint8)
    good = {**SAMPLES["clip-000"], "mp4": encode_mp4(frames)}
    good["flac"] = encode_flac(np.zeros(3200, np.float32))
    bad = save({"a": np.array([1, np.nan], np.float16)})
    with ShardWriter(tmp_path, kind="raw") as writer:
        writer.write("good", good)
        writer.write("video", {**good, "mp4": good["mp4"][:200]})
        writer.write("sound", {**good, "flac": good["flac"][:30]})
        writer.write("values", {**good, "safetensors": bad})
    assert verify(tmp_path) == []
    assert [f.sample for f in find_faults(tmp_path, deep=True)] == ["video", "sound", "values"]


def foreign_dataset(folder: Path, path: Path, kind: str = "foreign") -> None:
    """Write dataset.json by hand: the index that `echolab data index` writes is another test's
    subject.
    """
    members, sha256, size = read_tar(path)
    samples: dict[str, Any] = {}
    for m in members:
        if not m.name.endswith("/"):
            key, _, member = m.name.partition(".")
            samples.setdefault(key, {})[member] = (m.offset, m.size, m.crc32)
    shards = [Shard(path.name, sha256, size, len(samples))._asdict()]
    listed = [Sample(key, path.name, sample)._asdict() for key, sample in samples.items()]
    index = {
        "format": 1, "kind": kind, "encoders": {}, "description": {}, "shards": shards,
        "samples": listed, "fingerprint": fingerprint(kind, {}, shards, listed),
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", sorted(REQUIRED))
def test_a_sample_that_lacks_a_member_is_detected(tmp_path: Path, kind: str) -> None:
    """Two drivers on one folder once wrote such a sample: json alone, with a dataset.json that
    agrees.
    """
    original = foreign.raw_samples(3)
    for name in REQUIRED[kind]:
        folder = tmp_path / name
        folder.mkdir()
        kept = {member: data for member, data in original["clip-001"].items() if member != name}
        path = folder / "raw-000000.tar"
        foreign.pack(path, foreign.files({**original, "clip-001": kept}))
        foreign_dataset(folder, path, kind)
        (fault,) = find_faults(folder)
        assert (fault.file, fault.sample) == (path.name, "clip-001")
        assert fault.what == f"has no {name}, which {kind} samples have"


@pytest.mark.parametrize("form", ["pax", "gnu", "ustar", "tar gnu", "tar pax", "tar v7"])
def test_foreign_tars_give_no_false_alarm(tmp_path: Path, form: str) -> None:
    """A flipped byte in them is detected as well."""
    long = "a" * 60 if form in ("ustar", "tar v7") else "folder/" * 30 + "a" * 90
    members = [*foreign.files(foreign.raw_samples(2)), (f"{long}/b.jpg", b"1"), ("c.cls", b"3")]
    folder, path = tmp_path / "d", tmp_path / "d" / "train_00.tar"
    folder.mkdir()
    if form.startswith("tar "):
        foreign.gnu_tar(path, members, tmp_path / "s", form[4:])
    else:
        forms = {
            "pax": tarfile.PAX_FORMAT,
            "gnu": tarfile.GNU_FORMAT,
            "ustar": tarfile.USTAR_FORMAT,
        }
        foreign.pack(path, members, forms[form])
    foreign_dataset(folder, path)
    assert verify(folder, deep=False) == []
    original = path.read_bytes()
    for at in RNG.integers(0, len(original), 100):
        damaged = bytearray(original)
        damaged[at] ^= int(RNG.integers(1, 256))
        path.write_bytes(damaged)
        for fault in (faults := find_faults(folder)):
            assert fault.file == path.name and fault.byte is not None and fault.sample
        assert faults, at


def test_the_command_reports_by_its_exit_code(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "verify", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: complete\n"
    path = folder / "raw-000001.tar"
    path.write_bytes(path.read_bytes()[:1024])
    assert main(["data", "verify", str(folder), "workers=2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == verify(folder) and all(f"{path}: byte " in line for line in lines)
    assert main(["data", "verify", str(folder), "format=json", "deep=true"]) == 1
    report = json.loads(capsys.readouterr().out)
    broken_media = [line for line in report["faults"] if "cannot be decoded" in line]
    assert set(report["faults"]) - set(broken_media) == set(lines) and broken_media
    assert report["details"][0] == find_faults(folder, deep=True)[0]._asdict()
    assert main(["data", "verify", str(folder), "workers=0"]) == 1


def test_several_processes_report_the_same_faults(folder: Path) -> None:
    for name in ("raw-000000.tar", "raw-000002.tar"):
        data = bytearray((folder / name).read_bytes())
        data[700] ^= 1
        (folder / name).write_bytes(data)
    done: list[int] = []
    alone = verify(folder, advance=lambda count, note: done.append(count))
    assert done == [1, 2, 3] and len(alone) == 2
    assert verify(folder, workers=2) == alone
