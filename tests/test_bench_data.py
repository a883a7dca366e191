"""`echolab bench data`: its rows, on synthetic and on given shards."""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from echolab.bench import data
from echolab.bench.data import (
    WANTED,
    decode_encoded,
    decode_raw,
    decoded_of,
    draw_clip,
    evict,
    members_of,
    sequentially,
    shards_of,
    tensors_of,
    webdataset_of,
    write_encoded,
    write_raw,
)
from echolab.cli.__main__ import main
from echolab.data.collate import read_clip
from echolab.data.shard_reader import ShardDataset, open_dataset
from echolab.data.verify import verify
from echolab.errors import ConfigError

SIZE = (5, 32, 32)


@pytest.fixture
def encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardDataset:
    # Features of the released encoders' sizes are most of a clip this small.
    monkeypatch.setattr(data, "TEXT", (4, 8))
    monkeypatch.setattr(data, "IMAGE", (3, 8))
    monkeypatch.setattr(data, "SHARD_BYTES", 200_000)
    write_encoded(tmp_path / "encoded", SIZE, 600_000)
    assert verify(tmp_path / "encoded") == []
    return open_dataset(tmp_path / "encoded")


@pytest.fixture
def raw(tmp_path: Path) -> ShardDataset:
    write_raw(tmp_path / "raw", SIZE, 3)
    assert verify(tmp_path / "raw", deep=True) == []
    return open_dataset(tmp_path / "raw")


def test_drawn_clips_are_readable_by_training(encoded: ShardDataset) -> None:
    assert len(encoded) > 4 and len(encoded.shards) > 1
    assert abs(sum(shard.bytes for shard in encoded.shards) / 600_000 - 1) < 0.3
    clip = read_clip(encoded, 1, "i2v")
    assert torch.equal(clip.latents, draw_clip(SIZE, 1)["latents"].float())


def test_every_reader_reads_the_same_samples(encoded: ShardDataset) -> None:
    """The sums over all samples are equal for both readers; the limit reads every byte."""

    def total(read: Iterable[Any]) -> float:
        parts = [{k: v for k, v in part.items() if k != "__key__"} for part in read]
        assert len(parts) == len(encoded)
        return sum(float(tensor.double().sum()) for part in parts for tensor in part.values())

    for wanted in (WANTED, None):
        theirs = webdataset_of(encoded, partial(decode_encoded, wanted=wanted))
        assert total(tensors_of(encoded, wanted)) == pytest.approx(total(theirs), rel=1e-9)
    assert data.difference(encoded) == 0
    size = sum(shard.bytes for shard in encoded.shards)
    assert sum(sequentially(encoded)) == size


def test_both_readers_decode_the_same_raw_clips(raw: ShardDataset) -> None:
    ours = list(decoded_of(raw))
    theirs = list(webdataset_of(raw, decode_raw))
    assert len(ours) == len(theirs) == 3
    assert (ours[0][0] == theirs[0][0]).all() and ours[0][0].shape == (5, 32, 32, 3)
    plain = [
        {k: v for k, v in sample.items() if k[0] != "_"} for sample in webdataset_of(raw, dict)
    ]  # type: ignore[attr-defined]
    assert sorted(map(str, members_of(raw))) == sorted(map(str, plain))


def test_a_file_leaves_the_page_cache_or_the_reason_is_given(raw: ShardDataset) -> None:
    why = evict(shards_of(raw))
    assert why is None or "page cache" in why
    assert verify(Path(raw.folder)) == []


def test_bench_data_writes_all_rows(
    encoded: ShardDataset,
    raw: ShardDataset,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(data, "alone", lambda work, *given: work(*given))
    words = [f"clips={encoded.folder}", f"raw={raw.folder}", "rounds=1", "format=json"]
    assert main(["bench", "data", *words]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    for subject in ("encoded", "encoded/every_tensor", "raw", "raw/bytes"):
        samples, size = rows[f"{subject}/warm/samples"], rows[f"{subject}/warm/bytes"]
        assert (samples["unit"], samples["baseline"]) == ("1/s", "webdataset")
        assert (size["unit"], size["baseline"]) == ("MB/s", "sequential read")
        assert samples["ratio"] == pytest.approx(samples["value"] / samples["baseline_value"])
        # The same run is counted in samples and in bytes.
        each = rows[f"{subject.split('/')[0]}/sample"]["value"]
        assert size["value"] == pytest.approx(samples["value"] * each)
    assert rows["encoded/difference"]["value"] == 0
    assert "memory/worker" in rows


@pytest.mark.parametrize("word", ["rounds=0", "gigabytes=0", "raw_clips=0", "frames=4"])
def test_impossible_arguments_are_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "data", word]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) <= 2


def test_datasets_of_another_kind_are_refused(raw: ShardDataset) -> None:
    with pytest.raises(ConfigError, match="3 raw samples; need encoded"):
        data.opened(Path(raw.folder), "encoded")
