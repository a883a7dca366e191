"""Face alignment by hand, and CSIM of real clips with a released network."""

import itertools
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scored import flags_of, noise_frames, scores_of, video_frames

from echolab.errors import WeightsError
from echolab.metrics.identity import (
    TEMPLATE,
    Csim,
    CsimTruth,
    FaceEmbedder,
    align_face,
    fit_similarity,
)
from echolab.metrics.metric import VideoClip
from echolab.metrics.one_face import OneFace

# th_aoc and th_retalk3 show the same person, all others different ones.
PEOPLE = ["th_aoc", "th_retalk3", "th_may5s", "th_retalk2", "th_tpsmm", "th_infinitetalk",
          "hb_latentsync1", "th_lp_d10"]  # fmt: skip


def test_the_similarity_transform_is_recovered() -> None:
    rotation, scale, shift = 0.3, 1.7, np.array([5.0, -2.0])
    matrix = scale * np.array(
        [[np.cos(rotation), -np.sin(rotation)], [np.sin(rotation), np.cos(rotation)]]
    )
    fitted = fit_similarity(TEMPLATE, TEMPLATE @ matrix.T + shift)
    np.testing.assert_allclose(fitted, np.c_[matrix, shift], atol=1e-9)


def test_the_similarity_transform_has_least_squares() -> None:
    """No small change of its four numbers fits noisy points better."""
    random = np.random.default_rng(0)
    target = TEMPLATE + random.normal(size=TEMPLATE.shape) * 4
    fitted = fit_similarity(TEMPLATE, target)

    def error(a: float, b: float, x: float, y: float) -> float:
        matrix = np.array([[a, -b], [b, a]])
        return float(np.square(TEMPLATE @ matrix.T + [x, y] - target).sum())

    best = [fitted[0, 0], fitted[1, 0], fitted[0, 2], fitted[1, 2]]
    for k, step in enumerate([1e-3, 1e-3, 0.1, 0.1]):
        for sign in (-1, 1):
            assert error(*(v + sign * step * (i == k) for i, v in enumerate(best))) > error(*best)


def test_an_aligned_face_has_its_landmarks_at_the_template() -> None:
    image = np.zeros((300, 300, 3), np.uint8)
    landmarks = TEMPLATE * 1.5 + [60, 40]
    for channel, (x, y) in zip((0, 1, 2), landmarks[:3], strict=True):
        image[round(y) - 2 : round(y) + 3, round(x) - 2 : round(x) + 3, channel] = 200
    row = np.zeros(15, np.float32)
    row[4:14] = landmarks.ravel()
    face = align_face(image, row)
    assert face.shape == (112, 112, 3)
    for channel in range(3):
        weight = face[..., channel].astype(float)
        y, x = np.mgrid[:112, :112]
        center = [(weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()]
        assert center == pytest.approx(TEMPLATE[channel].tolist(), abs=0.5)


def test_unknown_or_damaged_face_networks_are_refused(tmp_path: Path) -> None:
    for name, match in (("other.onnx", "not a known face network"),
                        ("glintr100.onnx", "not a readable ONNX file")):  # fmt: skip
        (tmp_path / name).write_bytes(b"no network")
        with pytest.raises(WeightsError, match=match):
            FaceEmbedder(OneFace(tmp_path / "yunet.onnx"), tmp_path / name)


@cache
def embedder(weights: Path) -> FaceEmbedder:
    """Return the network that may be used without a restricted license."""
    face = OneFace(weights / "yunet_n_640_640.onnx")
    return FaceEmbedder(face, weights / "mobilefacenet_arcface.onnx")


@pytest.mark.media
def test_faces_of_one_person_are_close_and_of_others_far(media: Path, weights: Path) -> None:
    """The same person across videos has 0.83 to 0.89, different people at most 0.23."""
    net, vectors = embedder(weights), {}
    for name in PEOPLE:
        frames = video_frames(media / "video" / f"{name}.mp4", 3, 40)
        rows = net.in_frames(frames, range(3))
        assert not isinstance(rows, str), name
        vectors[name] = rows
    # Mean over the pairs of frames of two videos.
    pairs = itertools.combinations(PEOPLE, 2)
    same, *others = [float((vectors[a] @ vectors[b].T).mean()) for a, b in pairs]
    assert 0.828 <= same <= 0.890
    assert max(others) < 0.23 and abs(np.mean(others)) < 0.1


@pytest.mark.media
def test_csim_of_a_clip_against_itself_and_against_another_person(
    media: Path, weights: Path
) -> None:
    net = embedder(weights)
    speaker = video_frames(media / "video" / "th_may5s.mp4", 11)
    other = video_frames(media / "video" / "th_retalk2.mp4", 1)[0]
    own = scores_of(Csim(1, net), VideoClip("a", speaker, reference=speaker[0]))
    wrong = scores_of(Csim(1, net), VideoClip("a", speaker, reference=other))
    assert 0.85 < own["csim"].value <= 1 and own["csim_faces"].value == 1
    assert wrong["csim"].value < 0.25
    paired = scores_of(CsimTruth(1, net), VideoClip("a", speaker, truth=speaker))
    assert paired["csim_truth"].value == pytest.approx(1)
    # One frame of ten without a face does not enter, but its share is reported.
    gap = speaker[:10].clone()
    gap[4] = 0
    some = scores_of(Csim(1, net, every=1), VideoClip("a", gap, reference=speaker[0]))
    assert some["csim_faces"].value == pytest.approx(0.9) and some["csim"].value > 0.85
    assert net.network.name in Csim(1, net).cards()["csim"].network


@pytest.mark.media
def test_clips_without_one_clear_face_are_flagged(media: Path, weights: Path) -> None:
    net = embedder(weights)
    speaker = video_frames(media / "video" / "th_may5s.mp4", 5)
    dog = video_frames(media / "video" / "noface_dog.mp4", 5)

    def flags(clip: VideoClip) -> set[str]:
        return flags_of(lambda n: Csim(n, net), clip)

    reference = speaker[0]
    assert flags(VideoClip("a", dog, reference=reference)) == {"no face"}
    assert flags(VideoClip("a", noise_frames(5), reference=reference)) == {"no face"}
    assert flags(VideoClip("a", speaker)) == {"no reference image"}
    assert flags(VideoClip("a", speaker, reference=dog[0])) == {"not one face in the reference"}
    # Two people of the same size: the tracked box decides, if there is one.
    pair = torch.cat([speaker, speaker.flip(-1)], -1)
    assert flags(VideoClip("a", pair, reference=reference)) == {"several faces"}
    row = net.face.in_image(speaker[0].permute(1, 2, 0).contiguous().numpy())
    assert not isinstance(row, str)
    box = torch.from_numpy(np.r_[row[:2], row[:2] + row[2:4]]).expand(5, 4)
    tracked = VideoClip("a", pair, reference=reference, face=box)
    assert scores_of(Csim(1, net), tracked)["csim"].value > 0.9
    untracked = VideoClip("a", pair, reference=reference, face=torch.full((5, 4), torch.nan))
    assert flags(untracked) == {"several faces"}
    short = VideoClip("a", speaker, truth=speaker[:4])
    assert flags_of(lambda n: CsimTruth(n, net), short) == {"recorded video of another length"}
    assert flags_of(lambda n: CsimTruth(n, net), short._replace(truth=dog)) == {
        "not one face in the recorded video"
    }
