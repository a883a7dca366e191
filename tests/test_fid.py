"""FID-Inception and FID: the architecture, the two preprocessings, and a published value."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_prep.draw import draw_dataset
from data_prep.options import DrawOptions
from echolab.config.metrics import metrics_named
from echolab.data.media import decode_mp4
from echolab.data.shard_reader import open_dataset
from echolab.errors import ConfigError, DataError, MissingWeightsError
from echolab.evaluation.choice import build_metrics
from echolab.metrics.fid import (
    FID,
    fid,
    fid_network,
    prepare,
    prepare_clean,
    random_fid_network,
    spread_frames,
)
from echolab.metrics.frechet import frechet_distance, kernel_distance
from echolab.metrics.metric import VideoClip
from echolab.metrics.networks.inception import (
    BasicConv2d,
    FidInception,
    InceptionA,
    InceptionC,
    InceptionE,
    halve,
)
from echolab.metrics.setup import Setup
from echolab.metrics.weights import Network


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def network() -> Network:
    return random_fid_network()


# -- the architecture ------------------------------------------------------------------------------


def test_the_network_has_the_published_size_and_names() -> None:
    """Inception-v3 without auxiliary head has 23 834 568 parameters for 1000 classes."""
    with torch.device("meta"):
        net = FidInception()
    assert sum(p.numel() for p in net.parameters()) == 23_834_568 + 8 * 2049
    units = [name for name, module in net.named_modules() if isinstance(module, BasicConv2d)]
    assert len(units) == 94
    names = {name for name in net.state_dict() if not name.endswith("num_batches_tracked")}
    expected = {
        f"{unit}.{part}"
        for unit in units
        for part in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    }
    assert names == expected | {"fc.weight", "fc.bias"}
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6c.branch7x7dbl_2.conv.weight": (160, 160, 7, 1),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch1x1.conv.weight": (320, 2048, 1, 1),
        "fc.weight": (1008, 2048),
    }
    state = net.state_dict()
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert all(m.eps == 1e-3 for m in net.modules() if isinstance(m, nn.BatchNorm2d))


def test_layers_have_the_published_shapes(network: Network) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = [
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: shapes.update(
                {name: tuple(output.shape[1:])}
            )
        )
        for name, module in network.net.named_children()
    ]
    features = network.net(torch.zeros(1, 3, 299, 299))
    for hook in hooks:
        hook.remove()
    assert features.shape == (1, 2048)
    expected = {
        "Conv2d_1a_3x3": (32, 149, 149), "Conv2d_2a_3x3": (32, 147, 147),
        "Conv2d_2b_3x3": (64, 147, 147), "Conv2d_3b_1x1": (80, 73, 73),
        "Conv2d_4a_3x3": (192, 71, 71), "Mixed_5b": (256, 35, 35), "Mixed_5d": (288, 35, 35),
        "Mixed_6a": (768, 17, 17), "Mixed_6e": (768, 17, 17), "Mixed_7a": (1280, 8, 8),
        "Mixed_7b": (2048, 8, 8), "Mixed_7c": (2048, 8, 8),
    }  # fmt: skip
    assert {name: shapes[name] for name in expected} == expected
    assert "fc" not in shapes


def pool_alone(block: nn.Module) -> nn.Module:
    """Return a block whose pool branch passes its first channel through, without other branches."""
    block.eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        for name, module in block.named_modules():
            if name == "branch_pool":
                module.conv.weight[0, 0] = 1
                module.bn.weight[0] = (1 + 1e-3) ** 0.5
    return block


def test_average_pools_ignore_their_padding_and_the_last_block_pools_the_maximum() -> None:
    x = torch.rand(1, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    constant = torch.ones(1, 8, 5, 5)
    for block, offset in (
        (InceptionA(8, 4), 224), (InceptionC(8, 4), 576), (InceptionE(8, last=False), 1856),
    ):  # fmt: skip
        pooled = pool_alone(block)(constant)[0, offset]
        assert torch.allclose(pooled, torch.ones(5, 5)), "the border counts padding"
        expected = torch.stack([
            torch.stack([
                x[0, 0, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean() for j in range(5)
            ]) for i in range(5)
        ])  # fmt: skip
        assert torch.allclose(block(x)[0, offset], expected, atol=1e-6)
    largest = pool_alone(InceptionE(8, last=True))(x)[0, 1856].detach()
    assert float(largest[2, 2]) == pytest.approx(float(x[0, 0, 1:4, 1:4].max()))
    assert float(largest[0, 0]) == pytest.approx(float(x[0, 0, :2, :2].max()))


# -- preprocessing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(120, 90), (512, 410)])
def test_frames_are_resized_as_pytorch_fid_does(size: tuple[int, int]) -> None:
    """The oracle is OpenCV's bilinear resize, which has half-pixel centers and no antialiasing."""
    frames = noise(2, 3, *size)
    prepared = prepare(frames)
    assert prepared.shape == (2, 3, 299, 299)
    oracle = cv2.resize(frames[0].permute(1, 2, 0).numpy().astype(np.float32), (299, 299))
    assert np.allclose(prepared[0].permute(1, 2, 0), oracle / 127.5 - 1, atol=2e-3)
    assert float(prepare(frames * 0).max()) == -1
    assert float(prepare(frames * 0 + 255).min()) == pytest.approx(1, abs=1e-6)


def test_frames_are_resized_as_clean_fid_does() -> None:
    """The oracle is torch's bicubic kernel with antialiasing, which equals that of PIL."""
    frames = noise(2, 3, 512, 410)
    oracle = functional.interpolate(frames.float(), (299, 299), mode="bicubic", antialias=True)
    clean = prepare_clean(frames)
    assert torch.allclose(clean, (oracle.clamp(0, 255) - 128) / 128, atol=1e-3)
    # Stripes of one pixel alias without a wide filter.
    stripes = (torch.arange(512) % 2 * 255).to(torch.uint8).expand(1, 3, 512, 512)
    assert float(prepare(stripes).std()) > 5 * float(prepare_clean(stripes)[..., 9:-9].std())


def test_frames_are_spread_evenly() -> None:
    assert spread_frames(25, 4) == [0, 8, 16, 24]
    assert spread_frames(8, 8) == list(range(8))
    assert spread_frames(9, 1) == [0]


# -- the metric ------------------------------------------------------------------------------------


def video(seed: int, frames: int = 4) -> VideoClip:
    return VideoClip(str(seed), noise(frames, 3, 40, 40, seed=seed))


def test_fid_of_clips_is_the_distance_of_their_frames(network: Network) -> None:
    metric = FID(4, network, frames_per_clip=2, counts=(2, 8), draws=3)
    reference = FID(3, network, frames_per_clip=2)
    for index in range(3):
        reference.update(index, video(10 + index))
        metric.update(index, video(index))
    metric.update(3, video(9, frames=1))
    metric.set_reference(reference.all_features(), "noise")
    scores = metric.compute()
    # Compute the features once more, outside the metric.
    ours = torch.cat([network.net(prepare(video(i).frames[[0, 3]])) for i in range(3)])
    theirs = torch.cat([network.net(prepare(video(10 + i).frames[[0, 3]])) for i in range(3)])
    assert scores["fid"].value == pytest.approx(frechet_distance(ours, theirs), rel=1e-6)
    assert scores["kid"].value == pytest.approx(kernel_distance(ours, theirs), rel=1e-6)
    assert scores["fid"].clips == 3
    assert scores["fid"].flags == {"fewer frames than the score needs": 1}
    assert scores["fid"].low <= scores["fid"].high
    assert scores["fid_n2"].value > 0 and math.isnan(scores["fid_n8"].value)
    metric.set_reference(metric.all_features(), "itself")
    assert 0 <= metric.compute()["fid"].value < 1e-9


def test_cards_say_how_fid_was_made(network: Network) -> None:
    plain, clean = (
        FID(4, network, preprocessing=how, frames_per_clip=2, counts=(2,))
        for how in ("pytorch-fid", "clean")
    )
    cards = plain.cards()
    assert set(cards) == {"fid", "kid", "fid_n2"}
    assert all(card.metric == name and card.weights == "random" for name, card in cards.items())
    assert cards["fid"].settings["covariance"] == "1 / (N - 1)"
    assert cards["fid"].hash != clean.cards()["fid"].hash
    assert cards["fid"].hash != cards["fid_n2"].hash
    plain.set_reference(torch.zeros(5, 2, 2048), "lrs3")
    assert plain.cards()["fid"].settings["reference_clips"] == 5
    with pytest.raises(ValueError, match=r"need \[N, 2, 2048\]"):
        plain.set_reference(torch.zeros(5, 3, 2048), "lrs3")
    with pytest.raises(
        ConfigError, match="preprocessing=tf: unknown; use one of pytorch-fid, clean"
    ):
        FID(4, network, preprocessing="tf")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a raw dataset of three talkers of 17 frames."""
    folder = tmp_path_factory.mktemp("real") / "raw"
    draw_dataset(DrawOptions(folder, num_clips=3, frames=17), lambda done: None)
    return folder


def test_a_configured_fid_compares_with_the_first_real_clips(real: Path, tmp_path: Path) -> None:
    setup = Setup(2, 17, tmp_path, real)
    with pytest.raises(MissingWeightsError, match="pt_inception-2015-12-05"):
        fid(setup)
    metric = fid(setup, frames_per_clip=1, draws=0, real_per_clip=1, weights="random")
    card = metric.cards()["fid"]
    assert card.settings["reference_clips"] == 2
    assert card.settings["reference"] == open_dataset(real).fingerprint[:12]
    for index in range(2):
        frames = torch.from_numpy(decode_mp4(open_dataset(real).read(index)["mp4"]))
        metric.update(index, VideoClip(str(index), frames.permute(0, 3, 1, 2)))
    # The clips are those of the reference.
    assert 0 <= metric.compute()["fid"].value < 1e-9
    assert metric.cards()["fid"].hash == card.hash
    # Real clips that are too short are an error, not a smaller set.
    strict = fid(setup, frames_per_clip=18, draws=0, real_per_clip=1, weights="random")
    for index in range(2):
        strict.update(index, video(index, frames=18))
    with pytest.raises(DataError, match="clip 0 of .*raw: fewer frames .*give longer real clips"):
        strict.compute()
    with pytest.raises(ConfigError, match="weights=none: unknown; use released or random"):
        fid(setup, weights="none")
    with pytest.raises(ConfigError, match="give real=DATASET"):
        fid(setup._replace(real=None), weights="random")


def test_the_shipped_configuration_names_its_scores(real: Path, tmp_path: Path) -> None:
    shipped = metrics_named("released")["scores"]
    targets = ("echolab.metrics.fid:", "echolab.metrics.fvd:")
    scores = [entry for entry in shipped if entry["target"].startswith(targets)]
    metrics, lines = build_metrics(scores, Setup(2, 17, tmp_path, real))
    assert metrics == [] and len(lines) == 3 and all("left out" in line for line in lines)
    # With random weights the same functions build metrics of exactly these names.
    random = [{**entry, "args": {**entry["args"], "weights": "random"}} for entry in scores]
    metrics, lines = build_metrics(random, Setup(2, 17, tmp_path, real))
    assert len(metrics) == 3 and lines == []


@pytest.mark.needs_weights
def test_released_weights_give_the_value_of_torchmetrics() -> None:
    """The documentation of torchmetrics 1.9 gives 12.6388 for 64 features of noise, seed 123."""
    try:
        net = fid_network().net
    except MissingWeightsError as error:
        pytest.skip(str(error))
    torch.manual_seed(123)
    first = torch.randint(0, 200, (100, 3, 299, 299), dtype=torch.uint8)
    second = torch.randint(100, 255, (100, 3, 299, 299), dtype=torch.uint8)

    def features(images: Tensor) -> Tensor:
        # The first max pool has 64 channels.
        assert isinstance(net, FidInception)
        with torch.no_grad():
            x = [
                halve(
                    net.Conv2d_2b_3x3(
                        net.Conv2d_2a_3x3(net.Conv2d_1a_3x3((part.float() - 128) / 128))
                    )
                )
                for part in images.split(10)
            ]
        return torch.cat([part.mean((2, 3)) for part in x])

    assert frechet_distance(features(first), features(second)) == pytest.approx(12.6388, rel=1e-2)
