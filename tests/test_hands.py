"""Decoding of planted outputs of DWPose, and hand scores of known motion."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scored import flags_of, noise_frames, scores_of

from echolab.errors import WeightsError
from echolab.metrics import hands
from echolab.metrics.hands import (
    HANDS,
    KEYPOINTS,
    DwPose,
    HandConfidence,
    HandVariance,
    Pose,
    decode_people,
    decode_simcc,
    hand_confidence,
    hand_variance,
    letterbox,
    pose_input,
    pose_region,
)
from echolab.metrics.metric import VideoClip


def yolox_output(people: list[tuple[float, float, float, float, float]]) -> np.ndarray:
    """Return YOLOX's output with people (center x, y, width, height, score) at stride 16."""
    output = np.full((1, 8400, 85), -8.0, np.float32)
    output[..., 4:] = 0
    for x, y, width, height, score in people:
        column, row = int(x // 16), int(y // 16)
        cell = 80 * 80 + row * 40 + column  # after the cells of stride 8
        output[0, cell, :4] = x / 16 - column, y / 16 - row, np.log(width / 16), np.log(height / 16)
        output[0, cell, 4:6] = score, 1.0
    return output


def test_people_are_decoded_at_their_place_and_overlaps_are_suppressed() -> None:
    output = yolox_output([(200, 300, 100, 240, 0.9), (210, 310, 100, 240, 0.8),
                           (500, 300, 80, 200, 0.6), (400, 500, 50, 50, 0.2)])  # fmt: skip
    people = decode_people(output, 0.5)
    expected = [[300, 360, 500, 840, 0.9], [920, 400, 1080, 800, 0.6]]
    np.testing.assert_allclose(people, expected, rtol=1e-5)
    # A cell whose best class is another one is no person.
    output[0, :, 6] = 2.0
    assert decode_people(output, 1.0).shape == (0, 5)


def test_the_detector_sees_bgr_in_the_top_left_corner() -> None:
    image = np.zeros((100, 200, 3), np.uint8)
    image[..., 0] = 250  # red
    padded, scale = letterbox(image)
    assert padded.shape == (1, 3, 640, 640) and scale == 3.2
    assert padded[0, :, 100, 300].tolist() == [0, 0, 250]
    assert padded[0, :, 400, 300].tolist() == [114, 114, 114]


def test_simcc_peaks_are_decoded_with_the_lower_confidence() -> None:
    x, y = np.zeros((3, 576), np.float32), np.zeros((3, 768), np.float32)
    x[0, 101], y[0, 400] = 0.9, 0.7
    x[1, 575], y[1, 0] = 0.2, 0.5
    points, confidence = decode_simcc(x, y)
    assert points.tolist() == [[50.5, 200.0], [287.5, 0.0], [0.0, 0.0]]
    assert confidence.tolist() == pytest.approx([0.7, 0.2, 0.0])


def test_the_region_of_a_person_has_the_aspect_of_the_network() -> None:
    center, size = pose_region(np.array([100.0, 50.0, 200.0, 450.0]))
    assert center.tolist() == [150, 250] and size.tolist() == [375, 500]
    center, size = pose_region(np.array([0.0, 0.0, 300.0, 100.0]))
    assert size.tolist() == [375, 500]
    # The center of the region is the center of the input.
    image = np.zeros((500, 400, 3), np.uint8)
    image[248:253, 148:153] = 255
    values = pose_input(image, np.array([150.0, 250.0]), np.array([375.0, 500.0]))[0, 0]
    y, x = np.unravel_index(values.argmax(), values.shape)
    assert abs(x - 144) <= 2 and abs(y - 192) <= 2
    assert values.max() == pytest.approx((255 - 123.675) / 58.395)


class Planted:
    """A network with planted outputs, which records its inputs."""

    def __init__(self, *outputs: np.ndarray) -> None:
        self.outputs, self.inputs = outputs, []

    def setInput(self, blob: np.ndarray) -> None:
        self.inputs.append(blob.shape)

    def getUnconnectedOutLayersNames(self) -> list[str]:
        return ["a", "b"]

    def forward(self, names: object = None) -> object:
        return self.outputs if names else self.outputs[0]


def dwpose(people: list[tuple[float, float, float, float, float]]) -> DwPose:
    """Return DWPose around planted networks; hands have confidence 0.6, all others 0.9."""
    network = object.__new__(DwPose)
    x, y = np.zeros((1, KEYPOINTS, 576), np.float32), np.zeros((1, KEYPOINTS, 768), np.float32)
    x[..., 288], y[..., 384] = 0.9, 0.95
    x[:, HANDS, 288] = 0.6
    x[:, 5, 288], x[:, 5, 388] = 0.0, 0.9  # a shoulder at the right
    network.detector, network.pose = Planted(yolox_output(people)), Planted(y, x)
    network.sha256, network._last = "random", None
    return network


def test_keypoints_are_mapped_back_to_the_image() -> None:
    network = dwpose([])
    points, confidence = network.keypoints(
        np.zeros((480, 640, 3), np.uint8), np.array([100.0, 50.0, 200.0, 450.0])
    )
    # Bin 288 of x is the middle of the region; 100 bins are 50 px of 288, of a region of 375.
    assert points[0].tolist() == pytest.approx([150, 250])
    assert points[5].tolist() == pytest.approx([150 + 50 / 288 * 375, 250])
    assert confidence[[0, 100]].tolist() == pytest.approx([0.9, 0.6])
    assert network.pose.inputs == [(1, 3, 384, 288)]


def test_clips_are_scored_once_for_both_scores() -> None:
    network = dwpose([(320, 240, 200, 400, 0.9)])
    clip = VideoClip("a", noise_frames(11, 480, 640))
    confidence = scores_of(HandConfidence(1, network), clip)["hkc"]
    variance = scores_of(HandVariance(1, network), clip)["hkv"]
    assert confidence.value == pytest.approx(0.6) and variance.value == 0
    assert len(network.detector.inputs) == 3  # frames 0, 5 and 10, once
    cards = HandConfidence(1, network).cards() | HandVariance(1, network).cards()
    assert cards["hkv"].settings["every"] == 5 and "squared percent" in cards["hkv"].definition


def test_clips_without_one_person_are_flagged() -> None:
    clip = VideoClip("a", noise_frames(6, 64, 64))
    pair = [(160.0, 240.0, 100.0, 300.0, 0.9), (480.0, 240.0, 100.0, 280.0, 0.9)]
    for people, reason in (([], "no person"), (pair, "several people")):
        for metric in (HandConfidence, HandVariance):
            assert flags_of(lambda n, m=metric, p=people: m(n, dwpose(p)), clip) == {reason}
    # A person in the background is no rival.
    behind = dwpose([pair[0], (480.0, 240.0, 50.0, 100.0, 0.9)])
    assert scores_of(HandConfidence(1, behind), clip)["hkc"].value == pytest.approx(0.6)
    short = VideoClip("a", noise_frames(5))
    one = dwpose(pair[:1])
    assert flags_of(lambda n: HandVariance(n, one), short) == {"too few frames"}
    empty = VideoClip("a", noise_frames(0))
    assert flags_of(lambda n: HandConfidence(n, one), empty) == {"no person"}


def circling(radius: float, shoulders: float, frames: int = 24) -> Pose:
    """Return a pose whose hand keypoints move on circles."""
    angle = 2 * np.pi * np.arange(frames) / frames
    points = np.zeros((frames, KEYPOINTS, 2))
    points[:, HANDS] += radius * np.stack([np.cos(angle), np.sin(angle)], 1)[:, None] + 300
    points[:, 5, 0], points[:, 6, 0] = 100 + shoulders, 100
    return Pose(points, np.ones((frames, KEYPOINTS)))


def test_the_variance_of_points_on_a_circle_is_the_squared_radius() -> None:
    """The variance of x plus that of y on a circle is r^2; the unit is 1 % of the shoulders."""
    assert hand_variance(circling(10, 200)) == pytest.approx(5**2)
    assert hand_variance(circling(20, 400)) == pytest.approx(5**2)  # at twice the size
    assert hand_variance(circling(0, 200)) == pytest.approx(0)


def test_only_clearly_seen_keypoints_have_a_variance() -> None:
    pose = circling(10, 200)
    pose.points[::2, 91] += 1000  # an outlier in half of the frames, with low confidence
    pose.confidence[::2, 91] = 0.1
    assert hand_variance(pose) == pytest.approx(5**2, rel=1e-6)
    hidden = circling(10, 200)
    hidden.confidence[:, HANDS] = 0.1
    assert hand_variance(hidden) == "no hands"
    assert hand_confidence(hidden) == pytest.approx(0.1)
    hidden.confidence[:, 5] = 0.1
    assert hand_variance(hidden) == "no shoulders"
    loud = circling(10, 200)
    loud.confidence[:] = 1.4  # SimCC maxima are not bounded
    assert hand_confidence(loud) == 1


def test_missing_or_damaged_networks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"no network")
    for name in ("a.onnx", "missing.onnx"):
        with pytest.raises(WeightsError, match="not a readable ONNX file; replace it"):
            DwPose(tmp_path / name, tmp_path / name)
    assert hands.POSE_WIDTH * hands.SPLIT == 576
    assert torch.arange(KEYPOINTS)[HANDS].tolist() == list(range(91, 133))
