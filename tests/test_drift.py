"""Drift and seams of clips whose drift and seams are known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scored import constant_frames, flags_of, noise_frames, scores_of, video_frames

from echolab.metrics.drift import ENDS, ColorDrift, IdentityDrift, Seams, seam_ratio, to_lab
from echolab.metrics.identity import FaceEmbedder
from echolab.metrics.metric import VideoClip
from echolab.metrics.one_face import OneFace


def lightness(level: float) -> float:
    """Return L* of a gray sRGB level, by the formulas of sRGB and CIE 1976."""
    value = level / 255
    linear = value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
    return 116 * linear ** (1 / 3) - 16 if linear > 216 / 24389 else linear * 24389 / 27


def test_the_drift_of_a_gray_ramp_is_its_change_of_lightness() -> None:
    levels = [50 + 2 * k for k in range(40)]
    scores = scores_of(ColorDrift(1), VideoClip("a", constant_frames(levels)))
    start, end = (np.mean([lightness(x) for x in part]) for part in (levels[:12], levels[-12:]))
    assert scores["color_drift"].value == pytest.approx(end - start, abs=1e-6)
    assert scores["brightness_drift"].value == pytest.approx(end - start, abs=1e-6)
    assert scores["saturation_drift"].value == pytest.approx(0, abs=1e-6)


def test_colors_equal_published_values() -> None:
    """Lab of the sRGB primaries and white, D65."""
    primaries = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
    expected = [[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86],
                [100, 0, 0]]  # fmt: skip
    np.testing.assert_allclose(to_lab(primaries)[0], expected, atol=0.02)


def test_more_saturated_and_darker_colors_have_their_signs() -> None:
    gray = constant_frames([128] * 24)
    red = gray.clone()
    red[12:, 1:] = 80  # less green and blue
    scores = scores_of(ColorDrift(1), VideoClip("a", red))
    assert scores["saturation_drift"].value > 10 and scores["brightness_drift"].value < -3
    back = scores_of(ColorDrift(1), VideoClip("a", red.flip(0)))
    assert back["saturation_drift"].value == pytest.approx(-scores["saturation_drift"].value)
    assert back["color_drift"].value == pytest.approx(scores["color_drift"].value)
    still = scores_of(ColorDrift(1), VideoClip("a", gray))
    assert [score.value for score in still.values()] == pytest.approx([0, 0, 0], abs=1e-4)


def test_short_clips_have_no_drift() -> None:
    assert flags_of(ColorDrift, VideoClip("a", noise_frames(5))) == {"fewer than 24 frames"}
    assert scores_of(ColorDrift(1), VideoClip("a", noise_frames(2 * ENDS)))["color_drift"].clips


def panning(frames: int, speed: int = 2, seed: int = 0) -> torch.Tensor:
    """Return a view [T, 3, 128, 128] that moves over a smooth texture."""
    import cv2

    coarse = np.random.default_rng(seed).uniform(0, 255, (12, 24)).astype(np.float32)
    wide = cv2.resize(coarse, (24 * 12, 12 * 12), interpolation=cv2.INTER_CUBIC).clip(0, 255)
    views = [wide[:128, speed * k : speed * k + 128] for k in range(frames)]
    return torch.from_numpy(np.stack(views)).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)


def test_a_cut_at_a_border_is_a_seam_and_elsewhere_is_none() -> None:
    steady = panning(24)
    cut = torch.cat([panning(12), panning(12, seed=1)])
    at_cut = scores_of(Seams(1), VideoClip("a", cut, borders=(12,)))
    elsewhere = scores_of(Seams(1), VideoClip("a", cut, borders=(6,)))
    none = scores_of(Seams(1), VideoClip("a", steady, borders=(12,)))
    for name in ("seam_pixels", "seam_motion"):
        assert at_cut[name].value > 4, name
        assert elsewhere[name].value == pytest.approx(1, abs=0.25), name
        assert none[name].value == pytest.approx(1, abs=0.25), name


def test_motion_that_stops_at_a_border_is_a_seam_of_motion() -> None:
    moving = panning(12)
    stopped = torch.cat([moving, moving[-1:].expand(12, -1, -1, -1)])
    scores = scores_of(Seams(1), VideoClip("a", stopped, borders=(12,)))
    assert scores["seam_motion"].value > 5 and scores["seam_pixels"].value < 1


def test_the_seam_ratio_equals_the_value_by_hand() -> None:
    changes = np.array([1.0, 2.0, 9.0, 2.0, 3.0, 7.0])
    assert seam_ratio(changes, [2, 5], [2, 5], 0.1) == pytest.approx(8 / 2)
    assert seam_ratio(np.zeros(4), [1], [1], 0.25) == 0
    assert seam_ratio(np.array([0, 1.0, 0, 0]), [1], [1], 0.25) == pytest.approx(4)


def test_clips_without_usable_borders_are_flagged() -> None:
    frames = noise_frames(5)
    assert flags_of(Seams, VideoClip("a", frames)) == {"no window border"}
    assert flags_of(Seams, VideoClip("a", frames, borders=(0, 5))) == {"no window border"}
    crowded = VideoClip("a", frames, borders=(2, 3))
    assert flags_of(Seams, crowded) == {"too few frames between the borders"}


@pytest.mark.media
def test_the_identity_of_a_clip_drifts_only_if_the_person_changes(
    media: Path, weights: Path
) -> None:
    face = OneFace(weights / "yunet_n_640_640.onnx")
    embedder = FaceEmbedder(face, weights / "mobilefacenet_arcface.onnx")
    speaker = video_frames(media / "video" / "th_may5s.mp4", 24)
    other = video_frames(media / "video" / "th_lp_d10.mp4", 12)
    same, changed = (
        scores_of(IdentityDrift(1, embedder), VideoClip("a", frames))["identity_drift"].value
        for frames in (speaker, torch.cat([speaker[:12], other]))
    )
    assert 0 < same < 0.2 and changed > 0.75
    # A face that is lost at the end has no drift.
    lost = torch.cat([speaker[:12], torch.zeros_like(speaker[:12])])
    assert flags_of(lambda n: IdentityDrift(n, embedder), VideoClip("a", lost)) == {"no face"}
    short = VideoClip("a", speaker[:5])
    assert flags_of(lambda n: IdentityDrift(n, embedder), short) == {"fewer than 24 frames"}
