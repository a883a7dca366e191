"""Crops, mouth opening, PSNR and the rows of the score table."""

from pathlib import Path

import drawn
import numpy as np
import pytest
import torch
from batch_scores import Judges, psnr, score_clips

from echolab.errors import DataError
from echolab.metrics.demo import features_of, sync_of
from echolab.metrics.demo_networks import (
    CROP_HEIGHT,
    CROP_MARGIN,
    CROP_WIDTH,
    ClipFeatures,
    FrameFeatures,
    SyncNetDemo,
    contrastive_loss,
    crop_lips,
    fit_clip_features,
    fit_frame_features,
    fit_sync,
    talker_labels,
)
from echolab.metrics.fidelity import PERFECT_PSNR
from echolab.metrics.mfcc import cepstra_of
from echolab.metrics.motion import correlation, mouth_darkness


def judges() -> Judges:
    torch.manual_seed(0)
    frame, clip = FrameFeatures(labels=6, size=64), ClipFeatures(labels=12, size=64)
    real = drawn.clips(8, first=200).float_pixels()
    nets = SyncNetDemo().eval(), frame.eval(), clip.eval()
    return Judges(*nets, *features_of(frame, clip, real))


def test_psnr_equals_the_value_by_hand() -> None:
    still = torch.zeros(2, 3, 8, 8)
    noisy = still.clone()
    noisy[0] += 0.2  # peak to peak is 2: 10 log10(4 / 0.04)
    assert psnr(still, noisy).tolist() == pytest.approx([20, PERFECT_PSNR], abs=1e-4)
    assert torch.equal(psnr(still, noisy), psnr(noisy, still))


def test_correlation_of_curves_equals_the_value_by_hand() -> None:
    curve = np.sin(np.arange(25, dtype=np.float32))
    assert correlation(curve, 3 * curve + 1) == pytest.approx(1)
    assert correlation(curve, -curve) == pytest.approx(-1)
    for level in (0.0, 0.1, 0.3, 1.0):
        assert correlation(curve, np.full(25, level, np.float32)) == 0


def test_a_crop_is_the_box_with_its_margin_in_any_batch() -> None:
    """The frame is a ramp, so the crop's value gives the position it was taken from."""
    across = ((torch.arange(64) + 0.5) / 32 - 1).expand(64, 64)
    pixels = torch.stack([across, across.T, torch.zeros(64, 64)])[None, :, None]  # [1, 3, 1, Y, X]
    boxes = torch.tensor([[20.0, 30.0, 40.0, 50.0]])
    crop = crop_lips(pixels, boxes)
    assert crop.shape == (1, 1, 3, CROP_HEIGHT, CROP_WIDTH)
    positions = (crop[0, 0] + 1) * 32  # back to pixels
    half = CROP_MARGIN * 10
    torch.testing.assert_close(positions[0, 5], torch.linspace(30 - half, 30 + half, CROP_WIDTH))
    torch.testing.assert_close(
        positions[1, :, 5], torch.linspace(40 - half, 40 + half, CROP_HEIGHT)
    )
    pair = crop_lips(torch.cat([pixels, pixels.flip(-1)]), boxes.repeat(2, 1))
    torch.testing.assert_close(pair[:1], crop)


def test_the_measured_mouth_opening_equals_the_true_one() -> None:
    clips = drawn.clips(24, first=300)
    assert clips.visemes is not None
    seen = mouth_darkness(clips.float_pixels(), clips.lips[:, 0]).numpy()
    true = clips.visemes[..., 0].numpy()
    fit = [correlation(a, b) for a, b in zip(seen, true, strict=True)]
    assert np.mean(fit) > 0.8 and min(fit) > 0.4
    others = [correlation(a, b) for a, b in zip(seen, np.roll(true, 1, 0), strict=True)]
    assert abs(np.mean(others)) < 0.3


@torch.no_grad()
def test_windows_of_lips_and_audio_equal_those_of_the_original() -> None:
    net = SyncNetDemo().eval()
    clips = drawn.clips(2)
    seen = net.embed_lips(crop_lips(clips.float_pixels(), clips.lips[:, 0]))
    embeddings = net.embed_audio(cepstra_of(clips))
    assert seen.shape == (2, 21, 64) and embeddings.shape == (2, 20, 64)
    torch.testing.assert_close(seen.norm(dim=-1), torch.ones(2, 21))
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(2, 20))
    # A window depends on its five frames and its twenty audio columns alone.
    other = clips.float_pixels()
    other[:, :, 10:] = 0
    changed = (net.embed_lips(crop_lips(other, clips.lips[:, 0])) - seen).abs().amax(-1)
    assert changed[:, :6].max() < 1e-5 and changed[:, 6:].min() > 1e-4
    cepstra = cepstra_of(clips)
    cepstra[:, 40:] = 0
    changed = (net.embed_audio(cepstra) - embeddings).abs().amax(-1)
    assert changed[:, :6].max() < 1e-5 and changed[:, 6:].min() > 1e-4


def test_the_contrastive_loss_is_least_for_matching_windows() -> None:
    generator = torch.Generator().manual_seed(0)
    lips = torch.nn.functional.normalize(torch.randn(3, 10, 32, generator=generator), dim=-1)
    sharp = torch.tensor(50.0)
    own = contrastive_loss(lips, lips, sharp)
    assert own < 0.01
    assert contrastive_loss(lips, lips.roll(1, 1), sharp) > own + 1  # other windows of the clip
    assert contrastive_loss(lips, lips.roll(1, 0), sharp) > own + 1  # other clips
    torch.testing.assert_close(contrastive_loss(lips, 2 * lips, sharp / 2), own)


def test_a_syncnet_learns_sync_in_a_few_steps(tmp_path: Path) -> None:
    """Fitted on eight talkers, it maps their lips nearer to their own audio than to others'."""
    clips = drawn.clips(8)
    losses: list[float] = []
    net = fit_sync(
        clips.pixels, clips.lips, cepstra_of(clips), steps=60, seed=0, batch=8,
        progress=tmp_path / "state", report=lambda step, steps, loss: losses.append(loss),
    )  # fmt: skip
    assert losses[-1] < losses[0]
    own = sync_of(net, clips.float_pixels(), clips.lips[:, 0], cepstra_of(clips))
    wrong = sync_of(net, clips.float_pixels(), clips.lips[:, 0], cepstra_of(clips).roll(1, 0))
    assert np.mean([s.distance for s in own]) < np.mean([s.distance for s in wrong])


def test_labels_are_standardized() -> None:
    clips = drawn.clips(8)
    assert clips.visemes is not None
    labels = talker_labels(clips.face, clips.visemes)
    assert labels.shape == (8, 25, 6)
    torch.testing.assert_close(labels.flatten(0, 1).mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(labels.flatten(0, 1).std(0), torch.ones(6), atol=1e-3, rtol=0)


def test_feature_networks_can_be_fitted(tmp_path: Path) -> None:
    clips = drawn.clips(4, frames=9, size=32)
    assert clips.visemes is not None
    labels = talker_labels(clips.face, clips.visemes)
    for fit, shape in ((fit_frame_features, (4, 64)), (fit_clip_features, (4, 128))):
        losses: list[float] = []
        net = fit(
            clips.pixels, labels, steps=80, seed=0, batch=4, progress=tmp_path / "state",
            report=lambda step, steps, loss, reported=losses: reported.append(loss),
        )  # fmt: skip
        assert min(losses) < losses[0]
        pixels = clips.float_pixels()
        with torch.no_grad():
            assert net(pixels if shape[1] == 128 else pixels[:, :, 0]).shape == shape


def test_the_truth_has_a_perfect_psnr_and_mouth_scores_need_visemes() -> None:
    truth = drawn.clips(6)
    scores = score_clips(judges(), truth.float_pixels(), truth, cepstra_of(truth))
    names = {"sync_c_demo", "sync_d_demo", "fid_demo", "fvd_demo", "psnr_first_frame", "mouth_corr"}
    assert set(scores) == names and all(np.isfinite(list(scores.values())))
    assert scores["psnr_first_frame"] == PERFECT_PSNR
    assert scores["mouth_corr"] > 0.8
    without = score_clips(judges(), truth.float_pixels(), truth._replace(visemes=None),
                          cepstra_of(truth))  # fmt: skip
    assert set(without) == names - {"mouth_corr"}


def test_other_audio_changes_sync_alone_and_frozen_lips_lower_the_mouth_score() -> None:
    truth, scoring = drawn.clips(6), judges()
    right = score_clips(scoring, truth.float_pixels(), truth, cepstra_of(truth))
    shuffled = score_clips(scoring, truth.float_pixels(), truth, cepstra_of(truth).roll(1, 0))
    assert {name for name in right if right[name] != shuffled[name]} == {
        "sync_c_demo", "sync_d_demo",
    }  # fmt: skip
    still = truth.float_pixels()[:, :, :1].expand(-1, -1, 25, -1, -1)
    frozen = score_clips(scoring, still, truth, cepstra_of(truth))
    assert frozen["mouth_corr"] == 0
    assert frozen["fvd_demo"] > right["fvd_demo"]


def test_real_clips_have_no_distance_to_themselves() -> None:
    scoring, real = judges(), drawn.clips(8, first=200)
    scores = score_clips(scoring, real.float_pixels(), real, cepstra_of(real))
    assert scores["fid_demo"] == pytest.approx(0, abs=1e-6)
    assert scores["fvd_demo"] == pytest.approx(0, abs=1e-6)


def test_clips_of_unsupported_sizes_are_refused_in_one_line() -> None:
    short = drawn.clips(2, frames=13)
    with pytest.raises(DataError, match="13 frames have 8 windows of sync, need more than 8"):
        sync_of(SyncNetDemo(), short.float_pixels(), short.lips[:, 0], cepstra_of(short))
    enough = drawn.clips(2, frames=17)
    assert len(sync_of(SyncNetDemo(), enough.float_pixels(), enough.lips[:, 0],
                       cepstra_of(enough))) == 2  # fmt: skip
    small = drawn.clips(4, frames=9, size=32).float_pixels()
    scoring = judges()
    for network, pixels in ((scoring.frame, small[:, :, 0]), (scoring.clip, small)):
        with pytest.raises(DataError, match="32 x 32 pixels: .*trained on 64 x 64"):
            network(pixels)
