"""Blendshapes of real faces, and the distance of their distributions."""

import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scored import flags_of, noise_frames, scores_of, video_frames

from echolab.errors import WeightsError
from echolab.metrics.expression import BLENDSHAPES, FRAMES, JAW_OPEN, Blendshapes, EfidBlendshapes
from echolab.metrics.metric import VideoClip
from echolab.metrics.motion import MeshOpening, SilentMouth, correlation
from echolab.metrics.one_face import OneFace, image_of


def test_a_bundle_without_blendshapes_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old.task", "w") as bundle:
        bundle.writestr("face_landmarks_detector.tflite", b"")
    (tmp_path / "bad.task").write_bytes(b"no zip")
    for name in ("old.task", "bad.task", "missing.task"):
        with pytest.raises(WeightsError, match="no blendshapes in it; use face_landmarker_v2"):
            Blendshapes(tmp_path / name)


@cache
def networks(weights: Path) -> tuple[OneFace, Blendshapes]:
    """Return the detector and the blendshapes."""
    face = OneFace(weights / "yunet_n_640_640.onnx")
    return face, Blendshapes(weights / "face_landmarker_v2_with_blendshapes.task")


@pytest.mark.media
def test_blendshapes_follow_the_mouth_and_not_the_size_of_the_image(
    media: Path, weights: Path
) -> None:
    face, blendshapes = networks(weights)
    frames = video_frames(media / "video" / "th_may5s.mp4", 30)
    rows = face.in_frames(frames, range(30))
    assert not isinstance(rows, str)
    jaws, openings = [], []
    for frame, row in zip(frames, rows, strict=True):
        assert row is not None
        image = image_of(frame)
        points, presence = blendshapes.mesh.landmarks(image, row)
        shapes = blendshapes.of_landmarks(points)
        assert shapes.shape == (BLENDSHAPES,) and presence > 0.9
        assert (shapes >= 0).all() and (shapes <= 1).all()
        jaws.append(shapes[JAW_OPEN])
        openings.append(blendshapes.mesh.find(image, row).opening)
    # The network normalizes position and size of the landmarks.
    moved = blendshapes.of_landmarks(points * 2 + 30)
    np.testing.assert_allclose(moved, shapes, atol=2e-3)
    assert correlation(np.float32(jaws), np.float32(openings)) > 0.7


@pytest.mark.media
def test_the_distance_is_zero_for_equal_videos_and_larger_for_other_expressions(
    media: Path, weights: Path
) -> None:
    speaker = video_frames(media / "video" / "th_may5s.mp4", FRAMES, 5)
    grimaces = video_frames(media / "video" / "th_lp_d9_sar.mp4", FRAMES, 10)
    names = "efid_blendshapes"

    def distance(frames: torch.Tensor) -> float:
        clip = VideoClip("a", frames, truth=speaker)
        return scores_of(EfidBlendshapes(1, *networks(weights)), clip)[names].value

    assert distance(speaker) == pytest.approx(0, abs=1e-9)
    # Noise of the detector is small against a change of expression.
    brighter = (speaker.float() * 1.1).clamp(max=255).to(torch.uint8)
    small, large = distance(brighter), distance(grimaces)
    assert 0 < small < 0.1 * large


@pytest.mark.media
def test_clips_without_faces_or_truth_have_no_expression(media: Path, weights: Path) -> None:
    speaker = video_frames(media / "video" / "th_may5s.mp4", 5)

    def flags(clip: VideoClip) -> set[str]:
        return flags_of(lambda n: EfidBlendshapes(n, *networks(weights)), clip) - {
            "fewer than 2 frames"
        }

    assert flags(VideoClip("a", speaker)) == {"no recorded video"}
    assert flags(VideoClip("a", noise_frames(5), truth=speaker)) == {"no face"}
    assert flags(VideoClip("a", speaker[:0], truth=speaker)) == {"no face"}
    pair = torch.cat([speaker, speaker.flip(-1)], -1)
    assert flags(VideoClip("a", pair, truth=speaker)) == {"several faces"}
    lost = VideoClip("a", speaker, truth=noise_frames(5))
    assert flags(lost) == {"not one face in the recorded video"}
    # Five frames are five samples, not sixteen.
    metric = EfidBlendshapes(1, *networks(weights))
    metric.update(0, VideoClip("a", speaker, truth=speaker))
    assert metric.generated[0, :, -1].tolist() == [1.0] * 5 + [0.0] * 11


@pytest.mark.media
def test_a_speaking_mouth_moves_more_than_a_still_one(media: Path, weights: Path) -> None:
    """The audio is silence in both, so that the entire clip is a pause."""
    face, _ = networks(weights)
    opening = MeshOpening(face, weights / "face_landmarker_v2_with_blendshapes.task")
    speaker = video_frames(media / "video" / "th_may5s.mp4", 20)
    samples = torch.zeros(20 * 640)

    def movement(frames: torch.Tensor) -> float:
        clip = VideoClip("a", frames, samples)
        return scores_of(SilentMouth(1, opening), clip)["silent_mouth"].value

    speaking, still = movement(speaker), movement(speaker[:1].expand(20, -1, -1, -1))
    assert speaking > 0.3 and still == 0
    assert flags_of(lambda n: SilentMouth(n, opening),
                    VideoClip("a", noise_frames(20), samples)) == {"no face"}  # fmt: skip
