"""PSNR, SSIM and LPIPS against values by hand and independent implementations."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scored import constant_frames, flags_of, noise_frames, scores_of

from echolab.errors import WeightsError
from echolab.metrics import fidelity
from echolab.metrics.fidelity import (
    AlexNetFeatures,
    Fidelity,
    FirstFrame,
    Lpips,
    LpipsAlex,
    load_lpips,
    lpips_heads,
    psnr_8bit,
    ssim,
)
from echolab.metrics.metric import VideoClip
from echolab.models.loading import read_pickle


def test_psnr_equals_the_value_by_hand() -> None:
    """An error of 16 levels everywhere is 10 log10(255^2 / 256) dB."""
    first, second = constant_frames([100, 100, 0]), constant_frames([116, 100, 255])
    expected = [10 * np.log10(255**2 / 256), 100.0, 0.0]
    assert psnr_8bit(first, second).tolist() == pytest.approx(expected)


def independent_ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Compute SSIM of images [3, Y, X] by scipy's Gaussian filter with mirrored edges."""

    def smooth(channel: np.ndarray) -> np.ndarray:
        return gaussian_filter(channel, 1.5, truncate=5 / 1.5, mode="mirror")

    values = []
    for a, b in zip(first.astype(float), second.astype(float), strict=True):
        mean_a, mean_b = smooth(a), smooth(b)
        var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
        both = smooth(a * b) - mean_a * mean_b
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        values.append(
            (2 * mean_a * mean_b + c1) * (2 * both + c2)
            / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
        )  # fmt: skip
    return float(np.mean(values))


def test_ssim_equals_an_independent_implementation() -> None:
    first = noise_frames(2, 40, 56)
    second = ((first.float() + noise_frames(2, 40, 56, seed=1).float()) / 2).to(torch.uint8)
    ours = ssim(first, second).tolist()
    theirs = [independent_ssim(a.numpy(), b.numpy()) for a, b in zip(first, second, strict=True)]
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert 0.2 < ours[0] < 0.9
    # Of constant images only the term of luminance remains.
    value = float(ssim(constant_frames([100]), constant_frames([120]))[0])
    c1 = (0.01 * 255) ** 2
    assert value == pytest.approx((2 * 100 * 120 + c1) / (100**2 + 120**2 + c1), rel=3e-4)


def test_equal_videos_are_perfect_and_the_mean_is_over_clips() -> None:
    frames = noise_frames(3)
    worse = VideoClip("b", constant_frames([100, 100]), truth=constant_frames([116, 116]))
    scores = scores_of(Fidelity(2), VideoClip("a", frames, truth=frames), worse)
    assert scores["psnr"].value == pytest.approx((100 + 10 * np.log10(255**2 / 256)) / 2)
    assert scores["psnr"].clips == 2 and 0.9 < scores["ssim"].value < 1


def test_the_first_frame_is_compared_with_the_reference_alone() -> None:
    clip = VideoClip("a", constant_frames([100, 0, 0]), reference=constant_frames([116])[0])
    value = scores_of(FirstFrame(1), clip)["psnr_first_frame"].value
    assert value == pytest.approx(10 * np.log10(255**2 / 256))


def test_clips_without_a_fitting_truth_are_flagged() -> None:
    frames = noise_frames(5)
    assert flags_of(Fidelity, VideoClip("a", frames)) == {"no recorded video"}
    short = VideoClip("a", frames, truth=frames[:4])
    assert flags_of(Fidelity, short) == {"recorded video of another length"}
    small = VideoClip("a", frames, truth=noise_frames(5, 32, 32))
    assert flags_of(Fidelity, small) == {"recorded video of another size"}
    tiny = VideoClip("a", frames[..., :8, :8], truth=frames[..., :8, :8])
    assert flags_of(Fidelity, tiny) == {"recorded video of another size"}
    empty = VideoClip("a", frames[:0], truth=frames[:0], reference=frames[0])
    assert flags_of(Fidelity, empty) == flags_of(FirstFrame, empty) == {"no frames"}
    assert flags_of(FirstFrame, VideoClip("a", frames)) == {"no reference image"}
    other = VideoClip("a", frames, reference=frames[0, :, :32])
    assert flags_of(FirstFrame, other) == {"reference image of another size"}


def random_alexnet(path: Path) -> Path:
    """Write an AlexNet with random weights in the format of torchvision's file."""
    torch.manual_seed(0)
    stored = dict(AlexNetFeatures().state_dict())
    stored["classifier.1.weight"] = torch.zeros(2, 2)
    torch.save(stored, path)
    return path


def test_lpips_equals_that_of_torchmetrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchmetrics computes the same from the same AlexNet and its heads."""
    from torchmetrics.functional.image import lpips as theirs

    network = load_lpips(random_alexnet(tmp_path / "alexnet.pth"))
    layers = SimpleNamespace(features=network.net.features)
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_: layers.features)
    oracle = theirs._LPIPS(pretrained=False, pnet_rand=True, net="alex")
    oracle.load_state_dict(read_pickle(lpips_heads()), strict=False)
    first, second = (noise_frames(3, 64, 96, seed).float() / 127.5 - 1 for seed in (0, 1))
    ours = network(first, second)
    torch.testing.assert_close(ours, oracle(first, second).flatten())
    assert ours.min() > 1e-3
    torch.testing.assert_close(ours, network(second, first))
    assert network(first, first).tolist() == [0, 0, 0]


def test_lpips_of_equal_videos_is_zero_and_its_card_names_random_weights() -> None:
    frames, other = noise_frames(6), noise_frames(6, seed=1)
    network = LpipsAlex()
    same = scores_of(Lpips(1, network, "random"), VideoClip("a", frames, truth=frames))
    assert same["lpips"].value == 0
    differ = scores_of(Lpips(1, network, "random"), VideoClip("a", frames, truth=other))
    assert differ["lpips"].value > 0
    card = Lpips(1, network, "random").cards()["lpips"]
    assert card.weights == "random" and len(card.settings["heads"]) == 64
    tiny = VideoClip("a", frames[..., :24, :24], truth=frames[..., :24, :24])
    assert flags_of(lambda n: Lpips(n, network, "random"), tiny) == {fidelity.SIZE}


def test_a_file_that_is_no_alexnet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"no network")
    with pytest.raises(WeightsError, match="a.pth: damaged"):
        load_lpips(tmp_path / "a.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "b.pth")
    with pytest.raises(WeightsError, match="not torchvision's AlexNet; use alexnet-owt"):
        load_lpips(tmp_path / "b.pth")
