"""Reading tars: files of every writer are read as they are, and damage is detected."""

import hashlib
import io
import subprocess
import tarfile
import zlib
from pathlib import Path

import foreign
import numpy as np
import pytest
import webdataset

from echolab.data.tars import HashingReader, TarError, read_tar, walk

LONG = "folder/" * 30 + "a" * 90
MEMBERS = [*foreign.files(foreign.raw_samples(3)), (f"{LONG}.json", b"{}"), ("ümlaut.txt", b"")]
FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}


def contents(path: Path) -> list[tuple[str, bytes]]:
    data = path.read_bytes()
    content, sha256, size = read_tar(path)
    assert (sha256, size) == (hashlib.sha256(data).hexdigest(), len(data))
    for member in content:
        assert member.crc32 == zlib.crc32(data[member.offset : member.offset + member.size])
    return [(m.name, data[m.offset : m.offset + m.size]) for m in content]


@pytest.mark.parametrize("form", FORMATS)
def test_tars_of_tarfile_are_read(tmp_path: Path, form: str) -> None:
    assert contents(foreign.pack(tmp_path / "a.tar", MEMBERS, FORMATS[form])) == MEMBERS


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar", "v7", "oldgnu"])
def test_tars_of_the_program_tar_are_read(tmp_path: Path, form: str) -> None:
    members = MEMBERS if form in ("gnu", "pax", "oldgnu") else MEMBERS[:-2]
    assert contents(foreign.gnu_tar(tmp_path / "a.tar", members, tmp_path / "s", form)) == members


def test_tars_of_webdataset_are_read(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        for key, members in foreign.raw_samples().items():
            writer.write({"__key__": key, **members})
    written = dict(foreign.files(foreign.raw_samples()))
    assert dict(contents(tmp_path / "a.tar")) == written


def test_folders_are_distinguished_from_files(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    foreign.gnu_tar(tmp_path / "a.tar", [("in/a.txt", b"1")], tmp_path / "s")
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.add(tmp_path / "s", "top")
    names = [member.name for member in read_tar(tmp_path / "b.tar")[0]]
    assert names == ["top/", "top/in/", "top/in/a.txt"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_entries_without_data_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a.txt")
        info.type, info.linkname = kind, "b.txt"
        tar.addfile(info)
    with pytest.raises(TarError, match="not a plain file"):
        read_tar(tmp_path / "a.tar")


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with (tmp_path / "s" / "a.bin").open("wb") as file:
        file.truncate(2**20)
        file.seek(2**20)
        file.write(b"1")
    for form in ("gnu", "pax"):
        words = ["tar", f"--format={form}", "--sparse", "-cf", "a.tar", "-C", "s", "a.bin"]
        subprocess.run(words, check=True, cwd=tmp_path)
        with pytest.raises(TarError, match="holes|plain"):
            read_tar(tmp_path / "a.tar")


@pytest.mark.parametrize("form", FORMATS)
def test_every_cut_and_flip_under_a_checksum_is_detected(tmp_path: Path, form: str) -> None:
    """A foreign tar has no other record: only damage under its own checksums can be detected."""
    path = foreign.pack(tmp_path / "a.tar", MEMBERS[:6], FORMATS[form])
    original, (members, sha256, _) = path.read_bytes(), read_tar(path)
    end = members[-1].offset + members[-1].size
    rng = np.random.default_rng(0)
    for size in [*range(0, end, 512), *rng.integers(0, end, 50), end, len(original) - 9217]:
        if size < end + 1024:
            with pytest.raises(TarError):
                list(walk(HashingReader(io.BytesIO(original[:size]))))
    for at in rng.integers(0, len(original), 300):
        flipped = bytearray(original)
        flipped[at] ^= 1 << int(rng.integers(8))
        tar = HashingReader(io.BytesIO(flipped))
        try:
            walked = list(walk(tar))
        except TarError as fault:
            assert 0 <= fault.offset <= len(original)
        else:
            changed = [m for m, n in zip(walked, members, strict=True) if m != n]
            assert tar.sha256.hexdigest() != sha256 and len(changed) <= 1


@pytest.mark.parametrize(
    "damage", [b"19 path=a.txt\n", b"999 path=a.txt\n", b"path=a\n", b"\0" * 9]
)
def test_damaged_extended_headers_are_reported(tmp_path: Path, damage: bytes) -> None:
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, len(damage)
    data = info.tobuf() + damage.ljust(512, b"\0") + bytes(1024)
    with pytest.raises(TarError, match="damaged extended header"):
        list(walk(HashingReader(io.BytesIO(data))))


def test_an_extended_header_without_its_file_is_reported() -> None:
    record = b"14 path=a.txt\n"
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    data = info.tobuf() + record.ljust(512, b"\0") + bytes(1024)
    with pytest.raises(TarError, match="without its file"):
        list(walk(HashingReader(io.BytesIO(data))))
