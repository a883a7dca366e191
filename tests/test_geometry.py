"""The geometry of latents: its arithmetic, and that encoders, network and datasets agree on it."""

import json
from pathlib import Path

import encoded
import pytest
import tiny
import torch

from echolab.data.index import fingerprint
from echolab.data.shard_reader import open_dataset
from echolab.data.shard_writer import ShardWriter
from echolab.encoders.demo import CausalAutoencoder
from echolab.encoders.encode import covered, demo_encoders, encode_pixels
from echolab.errors import ConfigError, DataError
from echolab.geometry import WAN, LatentGeometry, geometry_of
from echolab.models.transformer import EchoTransformer
from echolab.tasks.masks import face_tokens, latent_known
from echolab.training.config import check_dataset

WAN_2_2 = LatentGeometry(channels=48, time_stride=4, space_stride=16, patch=2)
ODD = LatentGeometry(channels=3, time_stride=2, space_stride=4, patch=4)


@pytest.mark.parametrize("geometry", [WAN, WAN_2_2, ODD])
def test_lengths_and_latent_frames_are_inverse(geometry: LatentGeometry) -> None:
    for latent_frames in range(1, 40):
        frames = geometry.frames(latent_frames)
        assert geometry.is_clip_length(frames)
        assert geometry.latent_frames(frames) == latent_frames
        assert geometry.covering_latent_frames(frames) == latent_frames
        assert geometry.covering_latent_frames(frames + 1) == latent_frames + 1
    assert geometry.is_clip_length(geometry.near_clip_length(50))


def test_wan_has_its_published_geometry() -> None:
    assert WAN.latent_grid(81, 480, 832) == (21, 60, 104)
    assert WAN.tokens(60, 104) == 1560 and WAN.token_pixels == 16
    assert geometry_of({"out_channels": 48, "space_stride": 16}) == WAN_2_2
    assert tiny.net().geometry == WAN._replace(channels=tiny.CHANNELS)


def test_masks_and_tokens_follow_the_geometry() -> None:
    known = torch.zeros(5, 1, 16, 32, dtype=torch.bool)
    known[3] = True
    small = latent_known(known, ODD)
    assert small.shape == (2, 3, 4, 8)
    assert small.flatten(2).amax(2).nonzero().tolist() == [[0, 2]]  # frame 3 is the first of two
    boxes = torch.tensor([[0.0, 0, 32, 16]]).expand(5, 4)
    assert face_tokens(boxes, 4, 8, ODD).tolist() == [1, 1]
    assert covered(boxes, 4, 8, ODD).shape == (1, 3, 4, 8)


def test_encoders_carry_the_geometry_of_their_autoencoder() -> None:
    encoders = demo_encoders(CausalAutoencoder(channels=8))
    assert encoders.geometry == WAN._replace(channels=8)
    boxes = torch.tensor([[4.0, 4, 28, 28]]).expand(5, 4)
    tensors = encode_pixels(encoders, torch.zeros(3, 5, 32, 32), boxes, boxes)
    assert tensors["latents"].shape == (8, *WAN.latent_grid(5, 32, 32))


@pytest.mark.parametrize("layers", [None, 2])
def test_a_network_of_another_geometry_runs(layers: int | None) -> None:
    """At half the time stride there are two mask channels, and half the audio tokens a latent
    frame.
    """
    sizes = {**tiny.SIZES, "time_stride": 2, "in_channels": 2 * tiny.CHANNELS + 2}
    net = EchoTransformer(**{**sizes, "audio_layers": layers})
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    frames = net.geometry.frames(tiny.LATENT_FRAMES)
    audio = (1, frames, layers) if layers else (1, 2 * frames)
    conditions = tiny.conditions(1)
    conditions = conditions._replace(
        known=conditions.known[:, :2], audio=torch.randn(*audio, tiny.SIZES["audio_dim"])
    )
    velocity = net(tiny.latents(1), torch.tensor([500.0]), conditions)
    assert velocity.shape == tiny.latents(1).shape and velocity.isfinite().all()
    with pytest.raises(DataError, match="encode the audio"):
        net(tiny.latents(1), torch.tensor([500.0]), tiny.conditions(1))


def test_datasets_record_their_geometry(tmp_path: Path) -> None:
    clips, pairs = encoded.write(tmp_path, count=1)
    for folder in (clips, pairs):
        index = json.loads((folder / "dataset.json").read_text())
        assert index["format"] == 2 and index["geometry"] == WAN._asdict()
        assert open_dataset(folder).geometry == WAN


def test_datasets_of_the_first_format_are_read_as_wans(tmp_path: Path) -> None:
    """They keep their fingerprint, and with it the order of their samples."""
    clips, _ = encoded.write(tmp_path, count=2)
    path = clips / "dataset.json"
    index = json.loads(path.read_text())
    del index["geometry"]
    path.write_text(json.dumps({**index, "format": 1}))
    dataset = open_dataset(clips)
    assert dataset.geometry == WAN and dataset.fingerprint == index["fingerprint"]


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        (None, "geometry"),
        ({**WAN._asdict(), "time_stride": 0}, "above 0"),
        ({**WAN._asdict(), "stride": 8}, "stride"),
        ({**WAN._asdict(), "space_stride": 16}, "was changed after it was written"),
    ],
)
def test_a_geometry_that_is_missing_or_changed_is_refused(
    tmp_path: Path, geometry: dict[str, int] | None, message: str
) -> None:
    clips, _ = encoded.write(tmp_path, count=1)
    path = clips / "dataset.json"
    index = json.loads(path.read_text())
    index.pop("geometry")
    path.write_text(json.dumps(index | ({"geometry": geometry} if geometry else {})))
    with pytest.raises(DataError, match=message):
        open_dataset(clips)


def test_another_geometry_changes_the_fingerprint() -> None:
    names = {fingerprint("encoded", {}, [], [], one) for one in (WAN, WAN_2_2, ODD)}
    assert len(names) == 3 and fingerprint("encoded", {}, [], []) in names


def test_a_network_refuses_clips_of_another_geometry(tmp_path: Path) -> None:
    clips, _ = encoded.write(tmp_path, count=1)
    source = open_dataset(clips)
    with ShardWriter(
        tmp_path / "wide", kind="encoded", geometry=WAN._replace(space_stride=16)
    ) as writer:
        writer.write("clip-0", source.read(0))
    check_dataset(source, "encoded", encoded.ARCHITECTURE)
    with pytest.raises(ConfigError, match="space_stride is 8, the clips .* have 16"):
        check_dataset(open_dataset(tmp_path / "wide"), "encoded", encoded.ARCHITECTURE)
