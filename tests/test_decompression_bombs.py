"""Small files that unpack to large ones, and files that name other files: refused, in bounded
memory.
"""

import io
import json
import struct
import warnings
import zipfile
from pathlib import Path

import av
import fault_server
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import save_file

from data_prep.encode import caption_of
from echolab.data import media, samples
from echolab.data.decoding import open_media
from echolab.data.verify import find_content_fault
from echolab.encoders.files import weights_in
from echolab.errors import DataError, MediaError, WeightsError
from echolab.fitting import load_net
from echolab.models.loading import read_tensors
from echolab.preference.candidates import read_candidates
from echolab.preference.pack import read_verdicts


def npy(shape: tuple[int, ...], data: bytes, dtype: str = "<f4") -> bytes:
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + data


def npz(method: int = zipfile.ZIP_DEFLATED, **arrays: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


BOXES = npy((2, 4), bytes(32))
ZEROS = npy((2**22,), bytes(2**24))


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], ids=["zip", "bz2", "xz"]
)
def test_tracks_have_a_bound_on_their_unpacked_size(
    method: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = npz(method, face=BOXES, lips=BOXES, extra=ZEROS)
    assert len(bomb) < 2**16 and len(media.decode_tracks(bomb).extra["extra"]) == 2**22
    monkeypatch.setattr(samples, "MAX_ARRAY_BYTES", 2**20)
    with pytest.raises(MediaError, match=r"arrays of \d+ bytes, at most 1048576"):
        media.decode_tracks(bomb)
    fault = find_content_fault("tracks.npz", lambda at, n: bomb[at : at + n], len(bomb))
    assert fault and "at most" in fault


def test_entries_that_share_bytes_are_each_counted() -> None:
    """The directory names one packed entry a thousand times."""
    one = npz(face=npy((2**18,), bytes(2**20)))
    end = one.rfind(b"PK\x05\x06")
    size, offset = struct.unpack("<II", one[end + 12 : end + 20])
    entry = one[offset : offset + size]
    tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1000, 1000, size * 1000, offset, 0)
    with pytest.raises(MediaError, match="at most"):
        media.decode_tracks(one[:offset] + entry * 1000 + tail)


def test_a_directory_with_false_sizes_is_detected() -> None:
    bomb = npz(face=BOXES, lips=BOXES, extra=ZEROS)
    at = bomb.rfind(b"PK\x01\x02")
    lying = bomb[: at + 24] + struct.pack("<I", 1000) + bomb[at + 28 :]
    with pytest.raises(MediaError, match="tracks of"):
        media.decode_tracks(lying)


@pytest.mark.parametrize("shape", [(2**40,), (2**31, 2**31), (2**20, 2**20), (3,), ()])
def test_an_array_must_be_as_long_as_its_header_says(shape: tuple[int, ...]) -> None:
    for data in (npy(shape, bytes(8)), npy(shape, bytes(8), "|O")):
        with pytest.raises(MediaError):
            media.decode_tracks(npz(face=data, lips=data))
        assert find_content_fault("npy", lambda at, n, d=data: d[at : at + n], len(data))


def test_hours_of_audio_in_a_few_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MAX_AUDIO_VALUES", 16000 * 60)
    file = io.BytesIO()
    soundfile.write(file, np.zeros(16000 * 61, np.int16), 16000, format="FLAC")
    with pytest.raises(MediaError, match="samples, at most 960000"):
        media.decode_flac(file.getvalue())


@pytest.mark.parametrize("samples", [0, 2**35, 2**36 - 1])
def test_audio_with_a_false_header_is_refused(samples: int) -> None:
    data = bytearray(media.encode_flac(np.zeros(16000, np.float32)))
    at = 8 + 10 + 3  # magic, block header; then 36 bits that count samples end 5 bytes on
    count = int.from_bytes(data[at : at + 5], "big") >> 36 << 36 | samples
    data[at : at + 5] = count.to_bytes(5, "big")

    with pytest.raises(MediaError, match="samples, at most"):  # 0: not known
        media.decode_flac(bytes(data))


def test_an_image_of_absurd_size_is_refused(tmp_path: Path) -> None:
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    Image.new("1", (13000, 13000)).save(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size < 2**20

    with pytest.raises(MediaError, match=r"a\.png: not a readable image .13000 x 13000"):
        media.read_image(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert find_content_fault("png", lambda at, n: data[at : at + n], len(data), deep=True)


def test_hours_of_video_in_a_few_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_VIDEO_BYTES", 16 * 16 * 3 * 10)
    assert len(media.decode_mp4(media.encode_mp4(np.zeros((10, 16, 16, 3), np.uint8)))) == 10
    with pytest.raises(MediaError, match="too large for a sample"):
        media.decode_mp4(media.encode_mp4(np.zeros((11, 16, 16, 3), np.uint8)))


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile {}\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video 5004 RTP/AVP 96\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011">'
    "<BaseURL>{}</BaseURL></MPD>",
}  # fmt: skip


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("where", ["beside", "address", "absolute"])
def test_a_playlist_is_not_read_as_a_video(tmp_path: Path, kind: str, where: str) -> None:
    """In a file as in a shard, nothing is requested over the network."""
    (tmp_path / "victim.mp4").write_bytes(media.encode_mp4(np.zeros((5, 16, 16, 3), np.uint8)))
    with fault_server.serving(tmp_path) as server:
        reference = {"beside": "victim.mp4", "address": f"{server.url}/victim.mp4",
                 "absolute": str(tmp_path / "victim.mp4")}[where]  # fmt: skip
        text = PLAYLISTS[kind].format(reference).encode()
        evil = tmp_path / "evil.mp4"
        evil.write_bytes(text)
        with pytest.raises((ValueError, av.FFmpegError)), open_media(evil):
            pass
        with pytest.raises(MediaError):
            media.decode_mp4(text)
        with pytest.raises(MediaError):
            media.read_audio_track(evil)
        assert find_content_fault("mp4", lambda at, n: text[at : at + n], len(text), deep=True)
        assert not server.asked


def test_real_images_audio_and_videos_are_still_opened(tmp_path: Path) -> None:
    media.write_video(
        tmp_path / "a.mp4", np.zeros((5, 16, 16, 3), np.uint8), np.zeros(3200, np.float32)
    )
    soundfile.write(tmp_path / "a.wav", np.zeros(1600), 16000)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    for name in ("a.mp4", "a.wav", "a.png"):
        with open_media(tmp_path / name) as container:
            assert container.streams


def saved(tmp_path: Path, tensors: object) -> Path:
    torch.save(tensors, tmp_path / "a.pth")
    return tmp_path / "a.pth"


def test_a_pth_is_not_compressed_and_not_longer_than_its_file(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.zeros(2**20)})
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(WeightsError, match=r"a\.pth: \S+ is compressed"):
        read_tensors(path)
    one = saved(tmp_path, {"a": torch.zeros(2**10)}).read_bytes()
    end = one.rfind(b"PK\x05\x06")
    count, size, offset = struct.unpack("<HII", one[end + 10 : end + 20])
    tail = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 9 * count, 9 * count, 9 * size, offset, 0)
    path.write_bytes(one[:offset] + one[offset : offset + size] * 9 + tail)
    with pytest.raises(WeightsError, match="overlap"):
        read_tensors(path)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(2**50),
        torch.zeros(1).expand(2**20, 2**20),
        torch.zeros(4).expand(2**30, 4),
    ],
)
def test_a_tensor_needs_bytes_for_all_its_values(tmp_path: Path, tensor: torch.Tensor) -> None:
    path = saved(tmp_path, {"patch_embedding.weight": tensor})
    assert path.stat().st_size < 10_000
    with pytest.raises(WeightsError, match=r"patch_embedding.weight is no plain tensor"):
        read_tensors(path)


@pytest.mark.parametrize(
    "shard", ["../a.safetensors", "/etc/passwd", "", ".", "x/../../a", 3, None]
)
def test_an_index_names_only_files_of_its_own_folder(tmp_path: Path, shard: object) -> None:
    folder = tmp_path / "encoder"
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    index = {"weight_map": {"a": shard}}
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
        (folder / f"{name}.index.json").write_text(json.dumps(index))
        with pytest.raises(WeightsError, match=r"index\.json"):
            weights_in(folder)
        with pytest.raises(WeightsError, match=r"index\.json"):
            read_tensors(folder / f"{name}.index.json")


def test_json_that_is_nested_too_deeply_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(WeightsError, match="cannot be read as JSON"):
        read_tensors(tmp_path / "a.safetensors.index.json")


def test_network_settings_are_compared_with_the_tensors_before_the_network_is_built(
    tmp_path: Path,
) -> None:
    """The settings could request a network of any size."""
    config = {"width": 2**20}
    metadata = {"network": "Wide", "config": json.dumps(config)}
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "a.safetensors", metadata)
    made: list[torch.device] = []

    class Wide(torch.nn.Linear):
        def __init__(self, width: int) -> None:
            super().__init__(width, width, bias=False)
            made.append(self.weight.device)

    with pytest.raises(WeightsError, match="its tensors are not those of its config"):
        load_net(tmp_path / "a.safetensors", Wide)
    assert made == [torch.device("meta")]


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"3", b'"x"', b"{}", b"[" * 100_000, b"\xff", b'{"caption"']
)
def test_a_sample_without_a_caption_is_a_data_error(text: bytes) -> None:
    with pytest.raises(DataError, match="json: holds no caption"):
        caption_of({"json": text})


@pytest.mark.parametrize(
    "line",
    ["[]", "3", "{}", '{"key": "a", "candidate": 0, "sync": "x", "identity": 1, "flicker": 1}'],
)
def test_a_verdict_of_another_form_is_a_data_error(tmp_path: Path, line: str) -> None:
    (tmp_path / "verdicts.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"verdicts\.jsonl: not a verdict"):
        read_verdicts(tmp_path / "verdicts.jsonl")


@pytest.mark.parametrize("name", ["a", "a/x", "/0", "a/-1"])
def test_a_candidate_of_another_name_is_a_data_error(tmp_path: Path, name: str) -> None:
    save_file({name: torch.zeros(1, 1, 1, 1)}, tmp_path / "candidates-000000.safetensors")
    with pytest.raises(DataError, match="is not a candidate"):
        list(read_candidates(tmp_path))
