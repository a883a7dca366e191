"""I3D and FVD: the architecture, released archives, preprocessing, and two published values."""

import math
from collections import OrderedDict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEModel

from echolab.errors import ConfigError, MissingWeightsError, WeightsError
from echolab.metrics.frechet import frechet_distance, kernel_distance
from echolab.metrics.fvd import (
    FVD,
    VideoMAEFeatures,
    fvd,
    fvd_network,
    prepare,
    random_fvd_network,
    random_videomae_network,
    videomae_network,
)
from echolab.metrics.metric import VideoClip
from echolab.metrics.networks.i3d import BLOCKS, I3d, Unit3d, convert_i3d, pad_same
from echolab.metrics.setup import Setup
from echolab.metrics.weights import Network, random_network, read_network


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def network() -> Network:
    return random_fvd_network()


# -- the architecture ------------------------------------------------------------------------------


def test_the_network_has_the_published_size(network: Network) -> None:
    """I3D of RGB video with 400 logits has 12 697 264 parameters, in 57 units and a head."""
    assert sum(p.numel() for p in network.net.parameters()) == 12_697_264
    units = [module for module in network.net.modules() if isinstance(module, Unit3d)]
    assert len(units) == 58
    assert all(m.eps == 1e-3 for m in network.net.modules() if isinstance(m, nn.BatchNorm3d))


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
    assert network.net(torch.zeros(1, 3, 16, 224, 224)).shape == (1, 400)
    for hook in hooks:
        hook.remove()
    expected = {
        "Conv3d_1a_7x7": (64, 8, 112, 112), "Conv3d_2c_3x3": (192, 8, 56, 56),
        "Mixed_3b": (256, 8, 28, 28), "Mixed_3c": (480, 8, 28, 28), "Mixed_4b": (512, 4, 14, 14),
        "Mixed_4f": (832, 4, 14, 14), "Mixed_5c": (1024, 2, 7, 7), "logits": (400, 1, 1, 1),
    }  # fmt: skip
    assert {name: shapes[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [(16, 7, 2, (2, 3)), (15, 7, 2, (3, 3)), (15, 3, 2, (1, 1)), (14, 3, 2, (0, 1)),
     (7, 2, 2, (0, 1)), (8, 2, 2, (0, 0)), (5, 3, 1, (1, 1)), (5, 1, 1, (0, 0))],
)  # fmt: skip
def test_padding_is_that_of_tensorflow(
    size: int, kernel: int, stride: int, padding: tuple[int, int]
) -> None:
    """SAME gives ceil(size / stride) outputs; an odd element of padding comes at the end."""
    x = torch.ones(1, 1, size, 1, 1)
    padded = pad_same(x, (kernel, 1, 1), (stride, 1, 1))[0, 0, :, 0, 0]
    before, after = padding
    assert padded.tolist() == [0] * before + [1] * size + [0] * after
    assert (len(padded) - kernel) // stride + 1 == math.ceil(size / stride)


# -- released archives -----------------------------------------------------------------------------


class Foreign(nn.Module):
    """The tensors of I3D under other names, in the order of the graph."""

    def __init__(self, source: I3d) -> None:
        super().__init__()

        def unit(module: Unit3d) -> nn.Module:
            layers = OrderedDict(conv3d=module.conv3d)
            if module.bn is not None:
                layers["batch3d"] = module.bn
            return nn.Sequential(layers)

        self.add_module("conv3d_1a_7x7", unit(source.Conv3d_1a_7x7))
        self.add_module("conv3d_2b_1x1", unit(source.Conv3d_2b_1x1))
        self.add_module("conv3d_2c_3x3", unit(source.Conv3d_2c_3x3))
        for name in BLOCKS:
            block = getattr(source, name)
            branches = OrderedDict(
                branch_0=unit(block.b0),
                branch_1=nn.Sequential(unit(block.b1a), unit(block.b1b)),
                branch_2=nn.Sequential(unit(block.b2a), unit(block.b2b)),
                branch_3=nn.Sequential(nn.ReLU(), unit(block.b3b)),
            )
            self.add_module(name.lower(), nn.Sequential(branches))
        self.add_module("conv3d_0c_1x1", unit(source.logits))

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.slow
def test_an_archive_with_other_names_fills_the_network(tmp_path: Path) -> None:
    net = I3d()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_()
            module.running_var.uniform_()
    torch.jit.script(Foreign(net)).save(tmp_path / "i3d_torchscript.pt")
    converted = convert_i3d(read_network(tmp_path / "i3d_torchscript.pt"))
    assert set(converted) == set(net.state_dict())
    for name, value in net.state_dict().items():
        assert torch.equal(converted[name], value), name


def test_other_networks_are_refused() -> None:
    with pytest.raises(WeightsError, match="1 convolutions in the file, need 58"):
        convert_i3d({"conv.weight": torch.zeros(4, 3, 7, 7, 7)})


# -- the metric ------------------------------------------------------------------------------------


def test_frames_are_resized_and_scaled_to_one() -> None:
    """The oracle is OpenCV's bilinear resize; black is -1 and white 1."""
    frames = noise(3, 3, 300, 260)
    video = prepare(frames)
    assert video.shape == (1, 3, 3, 224, 224)
    oracle = cv2.resize(frames[1].permute(1, 2, 0).numpy().astype(np.float32), (224, 224))
    assert np.allclose(video[0, :, 1].permute(1, 2, 0), oracle / 127.5 - 1, atol=2e-3)
    black = prepare(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert float(black.min()) == float(black.max()) == -1
    white = prepare(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8))
    assert float(white.min()) == pytest.approx(1, abs=1e-6)


class Pooled(nn.Module):
    """A fast network with as many outputs as I3D, which sees all frames."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(3 * 16, 400)

    def forward(self, video: Tensor) -> Tensor:
        return self.project(video.mean((3, 4)).flatten(1))


def test_fvd_is_of_the_first_frames_with_the_covariance_of_the_population() -> None:
    network = random_network(Pooled(), "pooled")
    metric = FVD(5, network, counts=(3,), draws=5)
    videos = [noise(20, 3, 20, 24, seed=seed) for seed in range(8)]
    for index in range(4):
        metric.update(index, VideoClip(str(index), videos[index]))
    metric.update(4, VideoClip("short", videos[4][:15]))
    with torch.no_grad():
        features = torch.cat([network.net(prepare(frames[:16])) for frames in videos])
    metric.set_reference(features[4:, None], "noise")
    scores = metric.compute()
    expected = frechet_distance(features[:4], features[4:], unbiased=False)
    assert scores["fvd"].value == pytest.approx(expected, rel=1e-5)
    assert scores["fvd"].value != pytest.approx(frechet_distance(features[:4], features[4:]))
    assert scores["kvd"].value == pytest.approx(
        kernel_distance(features[:4], features[4:]), rel=1e-3
    )
    assert scores["fvd"].flags == {"fewer frames than the score needs": 1}
    card = metric.cards()["fvd"]
    assert card.settings["covariance"] == "1 / N" and card.settings["stride"] == 1
    # With a stride of two, 31 frames are needed.
    strided = FVD(1, network, stride=2)
    strided.update(0, VideoClip("30", noise(30, 3, 20, 24)))
    assert strided.compute()["fvd"].flags["fewer frames than the score needs"] == 1


@pytest.mark.slow
def test_fvd_of_the_real_architecture_with_random_weights(network: Network) -> None:
    metric = FVD(2, network, draws=0)
    for index in range(2):
        metric.update(index, VideoClip(str(index), noise(16, 3, 64, 64, seed=index)))
    metric.set_reference(metric.all_features(), "itself")
    scores = metric.compute()
    assert 0 <= scores["fvd"].value < 1e-9 and metric.cards()["fvd"].weights == "random"


def test_settings_of_fvd_are_checked_before_files_are_read(tmp_path: Path) -> None:
    setup = Setup(2, 16, tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="features=c3d: unknown; use one of i3d, videomae"):
        fvd(setup, features="c3d")
    with pytest.raises(MissingWeightsError, match="i3d_torchscript.pt: not in a folder"):
        fvd(setup)
    with pytest.raises(MissingWeightsError, match="videomae-base-finetuned-kinetics: not in a fol"):
        fvd(setup, features="videomae")


TINY = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
}  # fmt: skip


def test_videomae_is_another_score_and_loads_from_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "videomae-base-finetuned-kinetics"
    VideoMAEModel(VideoMAEConfig(**TINY)).save_pretrained(folder)
    network = videomae_network(tmp_path)
    assert len(network.weights) == 64 and network.license == "CC-BY-NC-4.0"
    metric = FVD(2, network, draws=0)
    metric.update(0, VideoClip("0", noise(16, 3, 30, 30)))
    # transformers' own preprocessing of a frame of the right size is the oracle.
    frames = noise(16, 3, 224, 224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    values = (frames / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    model = VideoMAEModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(values[None]).last_hidden_state.mean(1)
        assert torch.allclose(network.net(prepare(frames)), expected, atol=1e-4)
    assert set(metric.compute()) == {"fvd_videomae", "kvd_videomae"}
    assert metric.cards()["fvd_videomae"].network.startswith("VideoMAE")


def test_random_videomae_depends_on_the_seed_alone() -> None:
    first, second = (
        random_videomae_network(0, VideoMAEConfig(**TINY)).net.state_dict() for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert isinstance(random_videomae_network(0, VideoMAEConfig(**TINY)).net, VideoMAEFeatures)


# -- published values ------------------------------------------------------------------------------


def released() -> nn.Module:
    """Return I3D with its released weights, or skip the test."""
    try:
        return fvd_network().net
    except MissingWeightsError as error:
        pytest.skip(str(error))


@pytest.mark.needs_weights
def test_black_against_white_is_the_published_distance() -> None:
    """8 clips of 30 frames of zeros against ones: 151.256, without any covariance."""
    net = released()
    with torch.no_grad():
        black, white = (
            net(prepare(torch.full((30, 3, 64, 64), value, dtype=torch.uint8)))
            for value in (0, 255)
        )
    assert float((black - white).square().sum()) == pytest.approx(151.256, abs=1)


@pytest.mark.needs_weights
@pytest.mark.slow
def test_noise_against_noise_is_the_published_distance() -> None:
    """128 clips of RandomState(1) against RandomState(2), in [0, 1] as published: 10.13808."""
    net = released()

    def features(seed: int) -> Tensor:
        state = np.random.RandomState(seed)
        rows = []
        with torch.no_grad():
            for _ in range(128):
                clip = state.rand(16, 224, 224, 3).astype(np.float32)
                rows.append(net(torch.from_numpy(clip).permute(3, 0, 1, 2)[None]))
        return torch.cat(rows)

    assert frechet_distance(features(1), features(2)) == pytest.approx(10.13808, abs=0.02)
