"""`echolab data index`: tars of any writer become datasets that verify, shuffling and reading
accept.
"""

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import encoded
import foreign
import pytest
from safetensors.torch import save

from echolab.cli.__main__ import main
from echolab.data import index_tars as module
from echolab.data.index import PARTIAL_INDEX
from echolab.data.index_tars import TENSORS, index_folder
from echolab.data.shard_reader import open_dataset
from echolab.data.shard_writer import ShardWriter
from echolab.data.verify import verify
from echolab.errors import DataError

IMAGES = {
    f"train/{i:04d}": {"jpg": b"\xff" * (i + 1), "cls": b"%d" % i, "txt": b"a cat"}
    for i in range(7)
}


def written_by_us(folder: Path, kind: str) -> Path:
    if kind == "raw":
        with ShardWriter(
            folder, kind="raw", samples_per_shard=2, description={"source": "x"}
        ) as writer:
            for key, members in foreign.raw_samples().items():
                writer.write(key, members)
        return folder
    with ShardWriter(
        folder, kind=kind, encoders={"video": "a" * 64}, samples_per_shard=2
    ) as writer:
        for i in range(5):
            one = encoded.tensors(i)
            if kind == "preference":
                one |= {"chosen": one["latents"] + 1, "rejected": one.pop("latents")}
                one |= {
                    "known": one["known.i2v"] + 1,
                    "known_latents": one["known_latents.i2v"] + 1,
                }
            writer.write(f"clip-{i}", {"safetensors": save(one), "json": b"{}"})
    return folder


@pytest.mark.parametrize("kind", ["raw", "encoded", "preference"])
def test_the_index_of_our_own_shards_equals_the_writers(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written_by_us(tmp_path / "d", kind)
    (folder / "dataset.json").rename(tmp_path / "dataset.json")
    before = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    words = ["data", "index", str(folder), f"about={tmp_path / 'dataset.json'}", "workers=1"]
    assert main(words) == 0
    assert (folder / "dataset.json").read_bytes() == (tmp_path / "dataset.json").read_bytes()
    assert {path.name: path.read_bytes() for path in folder.glob("*.tar")} == before
    assert sorted(path.name for path in folder.iterdir()) == ["dataset.json", *sorted(before)]
    assert "written" in capsys.readouterr().out
    assert main([*words, "format=json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["samples"], report["written"]) == (kind, 5, False)


@pytest.mark.parametrize("form", ["pax", "gnu", "ustar", "tar gnu", "tar pax", "tar v7"])
def test_tars_of_others_become_datasets(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    members = foreign.files(IMAGES)
    for name, part in (("a-00.tar", members[:9]), ("b.tar", members[9:])):
        if form.startswith("tar "):
            foreign.gnu_tar(folder / name, part, tmp_path / name, form[4:])
        else:
            foreign.pack(folder / name, part, getattr(tarfile, f"{form.upper()}_FORMAT"))
    summary = index_folder(folder)
    assert (summary.content["kind"], summary.ignored) == ("foreign", [])
    assert verify(folder) == []
    dataset = open_dataset(folder)
    assert dataset.samples_by_shard == [3, 4]
    assert {key: dataset.read(i) for i, key in enumerate(dataset.keys)} == IMAGES


def test_members_that_webdataset_ignores_are_ignored_and_reported(tmp_path: Path) -> None:
    extra = [("train/README", b"1"), ("train/.hidden.txt", b"1"), ("__meta__/a.json", b"{}")]
    (tmp_path / "s" / "train").mkdir(parents=True)
    (tmp_path / "d").mkdir()
    for name, data in [*foreign.files(IMAGES), *extra]:
        (tmp_path / "s" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "s" / name).write_bytes(data)
    words = ["tar", "--sort=name", "-cf", str(tmp_path / "d" / "a.tar"), "-C", str(tmp_path / "s")]
    subprocess.run([*words, "train", "__meta__"], check=True)  # with its folders
    summary = index_folder(tmp_path / "d")
    assert sorted(summary.ignored) == sorted(name for name, _ in extra)
    assert len(summary.content["samples"]) == len(IMAGES)
    assert verify(tmp_path / "d") == []


def packed(tmp_path: Path, members: list[tuple[str, bytes]], name: str = "a.tar") -> Path:
    (tmp_path / "d").mkdir(parents=True, exist_ok=True)
    foreign.pack(tmp_path / "d" / name, members)
    return tmp_path / "d"


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a.v1.mp4", "a.v2.mp4"], r"sample 'a': 'v1.mp4' has a dot.*members=v1.mp4"),
        (["a.txt", "b.txt", "a.jpg"], r"byte 2048: sample 'a': jpg follows after another"),
        (["a.txt", "a.txt"], r"byte 1024: sample 'a': a second txt"),
        (["a.txt", "a.TXT"], r"sample 'a': a second txt"),
        (["a\nb.txt"], r"cannot be printed"),
    ],
)
def test_an_invalid_sample_is_refused_with_its_position(
    tmp_path: Path, names: list[str], says: str
) -> None:
    folder = packed(tmp_path, [(name, b"1") for name in names])
    with pytest.raises(DataError, match=says) as caught:
        index_folder(folder)
    assert "a.tar: byte " in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder / "dataset.json").exists()


def test_a_key_in_two_tars_is_refused(tmp_path: Path) -> None:
    packed(tmp_path, [("a.txt", b"1")], "a.tar")
    with pytest.raises(DataError, match=r"b\.tar: byte \d+: sample a: is in a\.tar too"):
        index_folder(packed(tmp_path, [("a.jpg", b"1")], "b.tar"))


def test_members_with_a_dot_are_indexed_if_named(tmp_path: Path) -> None:
    folder = packed(tmp_path, [("a.seg.PNG", b"1"), ("a.jpg", b"2"), ("a.tracks.npz", b"3")])
    index_folder(folder, compounds=frozenset({"seg.png"}))
    assert set(open_dataset(folder).read(0)) == {"seg.png", "jpg", "tracks.npz"}


def test_a_cut_tar_and_a_broken_member_are_refused(tmp_path: Path) -> None:
    folder = packed(tmp_path, foreign.files(IMAGES))
    original_bytes = (folder / "a.tar").read_bytes()
    (folder / "a.tar").write_bytes(original_bytes[:5120])
    with pytest.raises(DataError, match=r"a\.tar: byte 5120: .*cut.* \(after sample train/0001\)"):
        index_folder(folder)
    packed(tmp_path, [("a.safetensors", b"12345678901")])
    with pytest.raises(DataError, match=r"byte 512: sample a: safetensors cannot be decoded"):
        index_folder(folder)


def test_the_requested_kind_must_be_the_actual_kind(tmp_path: Path) -> None:
    members = foreign.raw_samples(3)
    del members["clip-001"]["json"]
    folder = packed(tmp_path, foreign.files(members))
    with pytest.raises(DataError, match=r"not of kind raw: a\.tar: sample clip-001 has no json"):
        index_folder(folder, kind="raw")
    summary = index_folder(folder)
    assert summary.content["kind"] == "foreign"
    assert summary.misfits["encoded"] == "a.tar: sample clip-000 has no tensor latents"
    original_bytes = packed(tmp_path / "w", foreign.files(foreign.raw_samples(3)))
    assert index_folder(original_bytes).content["kind"] == "raw"
    with pytest.raises(DataError, match="replace=true"):
        index_folder(original_bytes, kind="foreign")
    assert verify(original_bytes) == []  # a refusal leaves the dataset as it was
    assert index_folder(original_bytes, kind="foreign", replace=True).content["kind"] == "foreign"


def test_tars_without_a_sample_have_no_kind(tmp_path: Path) -> None:
    folder = packed(tmp_path, [])
    assert index_folder(folder).content["kind"] == "foreign"
    assert verify(folder) == [] and len(open_dataset(folder)) == 0


def test_another_dataset_json_is_replaced_only_on_request(tmp_path: Path) -> None:
    folder = packed(tmp_path, foreign.files(IMAGES))
    assert index_folder(folder).written and not index_folder(folder).written
    old = (folder / "dataset.json").read_bytes()
    packed(tmp_path, foreign.files(IMAGES)[:6])
    with pytest.raises(DataError, match="replace=true"):
        index_folder(folder)
    assert (folder / "dataset.json").read_bytes() == old and verify(folder)
    assert index_folder(folder, replace=True).written and verify(folder) == []


@pytest.mark.parametrize(
    ("names", "says"),
    [([], "holds no .tar"), (["a.tar.gz"], "compressed"), (["a b.tar"], "a shard's name")],
)
def test_folders_without_plain_tars_are_refused(
    tmp_path: Path, names: list[str], says: str
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=says):
        index_folder(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        index_folder(tmp_path / "nowhere")


def test_a_resumed_index_does_not_read_finished_tars_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written_by_us(tmp_path / "d", "raw")
    original_bytes = (folder / "dataset.json").read_bytes()
    (folder / "dataset.json").unlink()
    read: list[str] = []

    def scan(compounds: frozenset[str], path: Path) -> module.Scan:
        read.append(path.name)
        return original(compounds, path)

    def stop(done: int, note: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    original = module.scan
    monkeypatch.setattr(module, "scan", scan)
    with pytest.raises(KeyboardInterrupt):
        index_folder(folder, advance=stop)
    with (folder / PARTIAL_INDEX).open("a") as notes:
        notes.write('["raw-000002.tar 1')  # as a kill leaves a line
    assert verify(folder) != []
    index_folder(folder, description={"source": "x"})
    assert read == ["raw-000000.tar", "raw-000001.tar", "raw-000002.tar"]
    assert (folder / "dataset.json").read_bytes() == original_bytes
    assert not (folder / PARTIAL_INDEX).exists()


def test_a_tar_that_changed_is_read_again(tmp_path: Path) -> None:
    folder = packed(tmp_path, foreign.files(IMAGES))
    index_folder(folder)
    shutil.rmtree(folder)
    folder = packed(tmp_path, foreign.files(IMAGES)[:9])
    (folder / PARTIAL_INDEX).write_text(json.dumps(["a.tar 1 2 []", [{}, [], {}, []]]) + "\n")
    assert len(index_folder(folder).content["samples"]) == 3


def test_several_processes_write_the_same_index(tmp_path: Path) -> None:
    folder = written_by_us(tmp_path / "d", "encoded")
    about = json.loads((folder / "dataset.json").read_text())
    assert not index_folder(folder, encoders=about["encoders"], workers=2).written


def test_the_requested_tensors_are_those_that_training_reads() -> None:
    one = encoded.tensors(0)
    assert set(TENSORS["encoded"]) == {name for name in one if not name.startswith("known")}
