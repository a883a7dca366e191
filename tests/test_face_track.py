"""Face tracks and crops of SyncNet's pipeline, against its formulas written out."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from first_frames import first_frames
from numpy.typing import NDArray
from scipy.signal import medfilt

from echolab.metrics.face_track import (
    FaceTrack,
    YuNet,
    crop_track,
    find_tracks,
    join_detections,
    main_track,
    source_frames,
    tracks_of_boxes,
)
from echolab.vision.faces import boxes

RNG = np.random.default_rng(0)


def row(x: float, y: float = 50, side: float = 40, score: float = 0.95) -> NDArray[np.float32]:
    """Return a detection with its top left corner at (x, y)."""
    detection = np.zeros(15, np.float32)
    detection[:4], detection[14] = (x, y, side, side), score
    return detection


def steady(first: int, count: int, side: float = 40, x: float = 0) -> FaceTrack:
    return FaceTrack(first, np.tile([x, 0, x + side, side], (count, 1)).astype(float))


def test_crops_equal_those_of_the_padded_frame() -> None:
    """The published crop pads every frame by int(1.8 s) with gray 110, then slices it."""
    frames = RNG.integers(0, 256, (30, 90, 120, 3), dtype=np.uint8)
    centers = RNG.uniform([0, 0], [120, 90], (30, 2))
    halves = RNG.uniform(15, 60, (30, 2))
    track = FaceTrack(0, np.concatenate([centers - halves, centers + halves], 1))
    crops = crop_track(frames, track)
    half = medfilt(halves.max(1), 13)
    x, y = (medfilt(axis, 13) for axis in centers.T)
    for i, frame in enumerate(frames):
        pad = int(half[i] * 1.8)
        padded = np.pad(frame, ((pad, pad), (pad, pad), (0, 0)), constant_values=110)
        top, bottom = int(y[i] + pad - half[i]), int(y[i] + pad + half[i] * 1.8)
        left, right = int(x[i] + pad - half[i] * 1.4), int(x[i] + pad + half[i] * 1.4)
        expected = cv2.resize(padded[top:bottom, left:right], (224, 224))
        np.testing.assert_array_equal(crops[i], expected)


def test_one_wrong_detection_moves_no_crop() -> None:
    frames = np.tile(RNG.integers(0, 256, (1, 90, 120, 3), dtype=np.uint8), (30, 1, 1, 1))
    known = np.tile([40.0, 20, 80, 70], (30, 1))
    crops = crop_track(frames, FaceTrack(0, known))
    known[15] += 30
    np.testing.assert_array_equal(crop_track(frames, FaceTrack(0, known)), crops)


def test_a_track_bridges_25_frames_and_no_more() -> None:
    """A face that moves by 0.2 pixels a frame, with a gap, is interpolated on a line."""
    for missed, tracks in ((24, 1), (25, 2)):
        seen = {0, 1, 2 + missed, 3 + missed}
        scene = [
            (i, np.array([row(i / 5)] if i in seen else []).reshape(-1, 15)) for i in range(40)
        ]
        joined = join_detections(scene)
        assert len(joined) == tracks
        known = np.full((40, 4), np.nan)
        for i in seen:
            known[i] = boxes(row(i / 5)[None])[0]
        same = tracks_of_boxes(known, 200, 200)
        for ours, theirs in zip(joined, same, strict=True):
            assert ours.first == theirs.first
            np.testing.assert_allclose(ours.boxes, theirs.boxes)
            np.testing.assert_allclose(
                ours.boxes[:, 0], np.arange(ours.first, ours.last) / 5, atol=1e-5
            )


def test_two_faces_make_two_tracks_and_a_jump_ends_one() -> None:
    far = [(i, np.stack([row(10), row(150)])) for i in range(30)]
    assert [track.boxes[0, 0] for track in join_detections(far)] == [10, 150]
    # Boxes of side 40 at a distance of 14 have an IoU of 0.48, at 13 of 0.51.
    for step, tracks in ((13, 1), (14, 2)):
        moved = [(i, row(10 if i < 15 else 10 + step)[None]) for i in range(30)]
        assert len(join_detections(moved)) == tracks


def test_a_weak_detection_continues_a_track_but_begins_none() -> None:
    scene = [(i, row(10, score=0.95 if i == 10 else 0.75)[None]) for i in range(30)]
    (track,) = join_detections(scene)
    assert (track.first, track.last) == (10, 30)


def test_a_scene_cut_ends_all_tracks() -> None:
    frames = np.zeros((20, 64, 64, 3), np.uint8)
    frames[12:] = 200
    tracks = find_tracks(frames, lambda image: row(10)[None])
    assert [(track.first, track.last) for track in tracks] == [(0, 12), (12, 20)]


def test_boxes_that_show_no_face_count_as_no_detection() -> None:
    known = np.tile([10.0, 10, 50, 60], (9, 1))
    known[0] = 0  # no area
    known[1] = [300, 10, 350, 60]  # outside the frame
    known[8, 2] = np.nan
    (track,) = tracks_of_boxes(known, 100, 100)
    assert (track.first, track.last) == (2, 8)
    assert tracks_of_boxes(known[:2], 100, 100) == []


def test_the_main_face_is_the_largest_and_must_have_no_rival() -> None:
    large, small = steady(0, 50, 100), steady(0, 50, 40)
    assert main_track([small, large], 20) is large
    assert main_track([large, steady(0, 50, 60, x=200)], 20) is None
    later = steady(50, 30, 90)  # after a cut
    assert main_track([later, large], 20) is large
    assert main_track([large, steady(0, 10, 90)], 20) is large  # too brief to count


@pytest.mark.parametrize(("fps", "count"), [(25.0, 50), (30.0, 60), (12.5, 25), (24.0, 48)])
def test_frames_are_resampled_to_the_nearest_in_time(fps: float, count: int) -> None:
    shown = source_frames(count, fps)
    assert len(shown) == 50
    times = np.arange(50) / 25
    assert np.abs(shown[:-1] / fps - times[:-1]).max() <= 0.5 / fps + 1e-9
    if fps == 25:
        np.testing.assert_array_equal(shown, np.arange(50))


@pytest.mark.media
def test_large_images_are_scaled_for_the_detector(media: Path, weights: Path) -> None:
    """The same frame at 512 and at 1024 pixels has the same face."""
    frame = first_frames(media / "video" / "th_may5s.mp4", 1)[0]
    detect = YuNet(weights / "yunet_n_640_640.onnx")
    (small,) = boxes(detect(frame))
    (large,) = boxes(detect(cv2.resize(frame, (1024, 1024), interpolation=cv2.INTER_CUBIC)))
    np.testing.assert_allclose(large, 2 * small, atol=12)
