"""A source's files and captions: each file is used as intended, or has a reason for its refusal."""

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
from unruly_jobs import stand_in

from data_prep.__main__ import main
from data_prep.listing import caption_of, list_source
from data_prep.options import RunOptions
from data_prep.run import prepare, read_refused
from echolab.data.shard_reader import open_dataset
from echolab.errors import DataError, MediaError

TEXT = "Elle dit « déjà vu » — 你好"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a source of two files that no model needs to process."""
    monkeypatch.setattr("data_prep.run.find_face_model", lambda *_: tmp_path)
    monkeypatch.setattr("data_prep.run.work", stand_in(()))
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4"):
        (folder / name).write_bytes(name.encode())
    return folder


def captions(out: Path) -> dict[str, str]:
    dataset = open_dataset(out)
    facts = [json.loads(dataset.read(i)["json"]) for i in range(len(dataset))]
    return {fact["source"]: fact["caption"] for fact in facts}


def reasons(out: Path) -> dict[str, str]:
    return {row["source"]: row["reason"] for row in read_refused(out / "refused.jsonl")}


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        f"\r\n  {TEXT.replace(' ', '  ', 1)}\r\n".encode(),
    ],
)
def test_a_caption_is_read_as_it_was_written(source: Path, data: bytes) -> None:
    (source / "a.txt").write_bytes(data)
    assert caption_of("no", source / "a.mp4", source) == TEXT


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("déjà vu".encode("latin-1"), r"a\.txt is not UTF-8 \(byte 1\); save it as UTF-8"),
        ("hello".encode("utf-16-le"), r"a\.txt holds zeros"),
        ("你好".encode("utf-16")[:-1], r"a\.txt is not UTF-16"),
        (b"x" * 2001, r"a\.txt has 2001 characters, at most 2000"),
        (b" \n", r"a\.txt is empty"),
    ],
)
def test_a_caption_that_is_not_plain_text_is_refused_by_name(
    source: Path, tmp_path: Path, data: bytes, said: str
) -> None:
    (source / "a.txt").write_bytes(data)
    with pytest.raises(MediaError, match=said):
        caption_of("no", source / "a.mp4", source)
    prepare(RunOptions(source, tmp_path / "out"))
    assert captions(tmp_path / "out").keys() == {"b.mp4"}
    assert reasons(tmp_path / "out")["a.mp4"].startswith("caption: a.txt ")


def test_the_longest_caption_is_kept(source: Path) -> None:
    (source / "a.txt").write_text("é" * 2000)
    assert caption_of("no", source / "a.mp4", source) == "é" * 2000


def test_an_edited_caption_is_used_until_the_dataset_is_written_then_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RunOptions(source, tmp_path / "out")
    (source / "a.txt").write_bytes("déjà".encode("latin-1"))
    # Until the dataset is written, clips that depend on the text are cut again.
    monkeypatch.setattr("data_prep.run.work", stand_in({"b.mp4"}))
    with pytest.raises(Exception, match="killed"):
        prepare(options)
    (source / "a.txt").write_text("one")
    monkeypatch.setattr("data_prep.run.work", stand_in(()))
    prepare(options)
    assert captions(options.out)["a.mp4"] == "one" and reasons(options.out) == {}
    prepare(options)  # nothing has changed
    (source / "a.txt").write_text("two")
    with pytest.raises(DataError, match=r"captions: 1 were edited since, such as that of a\.mp4"):
        prepare(options)
    (source / "a.txt").write_text("one")
    (source / "b.txt").write_text("a new text")
    with pytest.raises(DataError, match=r"such as that of b\.mp4; choose"):
        prepare(options)


def test_linked_folders_are_followed_and_loops_end(source: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "c.mp4").write_bytes(b"c")
    (elsewhere / "c.txt").write_text("c speaks")
    (source / "deep").mkdir()
    (source / "deep" / "d.mp4").write_bytes(b"d")
    (source / "corpus").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(source)
    (source / "deep" / "up").symlink_to("..")
    (source / "deep" / "self").symlink_to("self")
    (source / "again").symlink_to("deep")
    listing = list_source(source, tmp_path / "out")
    assert [name for _, name in listing.files] == [
        "a.mp4", "b.mp4", "corpus/c.mp4", "deep/d.mp4",
    ]  # fmt: skip
    left_out = dict(listing.left_out)
    assert left_out.keys() == {"again", "corpus/back", "deep/self", "deep/up"}
    assert "a loop" in left_out["deep/up"] and "nowhere" not in left_out["deep/self"]
    prepare(RunOptions(source, tmp_path / "out"))
    assert captions(tmp_path / "out")["corpus/c.mp4"] == "c speaks"
    assert reasons(tmp_path / "out") == left_out


def test_a_caption_that_is_a_link_stays_in_the_source(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("root:x:0:0")
    (source / "a.txt").symlink_to(tmp_path / "secret")
    (source / "shared").mkdir()
    (source / "shared" / "text").write_text("all of them talk")
    (source / "b.txt").symlink_to("shared/text")
    prepare(RunOptions(source, tmp_path / "out"))
    assert captions(tmp_path / "out")["b.mp4"] == "all of them talk"
    assert reasons(tmp_path / "out")["a.mp4"] == (
        "caption: a.txt is a link out of the source; put a copy there"
    )
    for file in (tmp_path / "out").iterdir():
        assert b"root:x" not in file.read_bytes()


def test_every_omitted_file_has_a_row(source: Path, tmp_path: Path) -> None:
    (source / ".DS_Store").write_bytes(b"")
    (source / "gone.mp4").symlink_to("nowhere.mp4")
    os.mkfifo(source / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(source / "s"))
        (source / "out").mkdir()
        prepare(RunOptions(source, source / "out"))
    rows = reasons(source / "out")
    assert {name: reason.partition(":")[0] for name, reason in rows.items()} == {
        ".DS_Store": "hidden", "gone.mp4": "not there", "pipe": "no file", "s": "no file",
    }  # fmt: skip


NAMES: Sequence[bytes] = (
    b"with space.mp4", b"dots.in.name.mp4", b"line\nbreak.mp4", b"\xe9.mp4", b"\xe8.mp4",
    b"#=~(.mp4",     "你好.mp4".encode(), b"http:x.mp4", b"%03d.mp4", b"-x.mp4", b"noending",
)  # fmt: skip


def test_any_file_name_works(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in NAMES:
        with open(os.fsencode(source) + b"/" + name, "wb") as file:
            file.write(b"the same bytes")
    (source / "dots.in.name.txt").write_text("dots")
    prepare(RunOptions(source, tmp_path / "out", caption="{stem}"))
    listing = captions(tmp_path / "out")
    assert len(listing) == 2 + len(NAMES) and listing["dots.in.name.mp4"] == "dots"
    assert "\\udce9.mp4" in listing and "\\udce8.mp4" in listing
    capsys.readouterr()
    broken = tmp_path / "line\nbreak"
    assert main(["run", str(broken), str(tmp_path / "other")]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
