"""Tensors read in pieces equal those that safetensors reads; damage is always detected."""

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from echolab.data import collate
from echolab.data import samples as module
from echolab.data.collate import DTYPES, read_fp32, take_fp32
from echolab.data.samples import MemberError, MemberReader
from echolab.data.shard_reader import ShardDataset, open_dataset
from echolab.data.shard_writer import ShardWriter
from echolab.errors import DataError

TENSORS = {
    "half": torch.randn(3, 50, 7).half(),
    "single": torch.randn(400),
    "brain": torch.randn(2, 33).bfloat16(),
    "whole": torch.arange(-5, 70),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "flags": torch.tensor([True, False]),
    "double": torch.randn(9, dtype=torch.float64),
}


def dataset_of(folder: Path, data: bytes) -> ShardDataset:
    with ShardWriter(folder, kind="encoded") as writer:
        writer.write("a", {"json": b'{"caption": "x"}', "safetensors": data})
    return open_dataset(folder)


@pytest.mark.parametrize("chunk", [16, 64, 2**20])
def test_tensors_equal_those_of_safetensors(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(collate, "CHUNK", chunk)
    dataset = dataset_of(tmp_path, save(TENSORS))
    tensors = read_fp32(dataset, 0)
    assert set(tensors) == set(TENSORS)
    for name, tensor in load(dataset.read(0)["safetensors"]).items():
        assert tensors[name].dtype == torch.float32 and torch.equal(
            tensors[name], tensor.float()
        ), name


def test_only_requested_tensors_are_allocated(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, save(TENSORS))
    tensors = read_fp32(dataset, 0, ("brain", "single", "nothing"))
    assert set(tensors) == {"brain", "single"}
    again = read_fp32(dataset, 0, ("single",))
    again["single"].zero_()  # of their own memory
    assert torch.equal(tensors["single"], TENSORS["single"])


def test_every_flipped_and_cut_byte_is_detected(tmp_path: Path) -> None:
    """Damage in the header, in tensors that are not requested and at a file's end is detected
    too.
    """
    dataset = dataset_of(tmp_path, save(TENSORS))
    path = tmp_path / "encoded-000000.tar"
    original = path.read_bytes()
    offset, size, _ = dataset.sample(0).members["safetensors"]
    rng = np.random.default_rng(0)
    for at in [*range(offset, offset + 24), *rng.integers(offset, offset + size, 100)]:
        damaged = bytearray(original)
        damaged[at] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"sample a, byte {offset}: .*checksum") as caught:
            read_fp32(dataset, 0, ("half",))
        assert "\n" not in str(caught.value)
    for end in rng.integers(offset, offset + size, 30):
        path.write_bytes(original[:end])
        with pytest.raises(DataError, match=f"is cut at {end - offset}"):
            read_fp32(dataset, 0, ("half",))


def test_members_that_were_written_broken_are_reported(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, save(TENSORS)[:-1])
    with pytest.raises(DataError, match="sample a: tensors end at byte"):
        read_fp32(dataset, 0)


def test_an_unsupported_dtype_is_reported(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, save({"a": torch.zeros(2, dtype=torch.uint16)}))
    with pytest.raises(DataError, match="sample a: tensor a: U16 cannot be read"):
        read_fp32(dataset, 0)
    assert "U16" not in DTYPES and issubclass(MemberError, ValueError)


@given(
    st.lists(st.integers(0, 900), max_size=8),
    st.integers(0, 400),
    st.integers(0, 2000),
    st.sampled_from([64, 1000, 2**20]),
)
def test_pieces_have_the_members_bytes_and_checksum(
    sizes: list[int], offset: int, size: int, chunk: int
) -> None:
    data = np.random.default_rng(size).bytes(1500)
    file = os.memfd_create("pieces")
    usual, module.CHUNK = module.CHUNK, chunk
    try:
        os.write(file, data)
        pieces = MemberReader(file, offset, size)
        position, end = offset, min(len(data), offset + size)
        for i, count in enumerate(sizes):
            if i % 3 == 2:
                pieces.skip(count)
            else:
                assert pieces.take(count).tobytes() == data[position : min(position + count, end)]
            position = min(position + count, end)
            assert pieces.position == position - offset
            assert pieces.crc32 == zlib.crc32(data[offset:position])
        assert pieces.rest() == data[position:end]
        assert (pieces.position, pieces.crc32) == (end - offset, zlib.crc32(data[offset:end]))
    finally:
        module.CHUNK = usual
        os.close(file)


def test_pieces_of_a_cut_member_are_undecodable(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(save(TENSORS)[:-8])
    with path.open("rb") as file, pytest.raises(MemberError):
        take_fp32(MemberReader(file.fileno(), 0, len(save(TENSORS))))
