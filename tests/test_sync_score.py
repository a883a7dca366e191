"""The metric of lip sync: what it scores, what it refuses to score, and what it flags."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from first_frames import first_frames
from seeded import seeded_syncnet
from torch import Tensor

from echolab.data.media import decode_mp4, read_audio
from echolab.metrics.metric import Score, VideoClip
from echolab.metrics.mfcc import mfcc
from echolab.metrics.networks.syncnet import SyncNet, VideoSyncNet
from echolab.metrics.sync import (
    ARCHITECTURE,
    NO_ANSWER,
    NO_AUDIO,
    NO_FACE,
    NOT_FINITE,
    SEVERAL_FACES,
    SILENT,
    TOO_SHORT,
    SyncScore,
    as_syncnet,
    padded_distances,
    released_syncnet,
    sync_score,
    unpadded_distances,
    window_count,
)
from echolab.metrics.weights import Network

FRAMES = 30
SHIFT = 6  # frames; few windows are enough, to save time


@pytest.fixture(scope="module")
def net() -> SyncNet:
    return seeded_syncnet()


def clip(key: str = "a", frames: int = FRAMES, seed: int = 0) -> VideoClip:
    """Return noise with a face box of 60 x 60 pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (frames, 3, 80, 96), dtype=torch.uint8, generator=generator)
    samples = 0.1 * torch.randn(640 * frames, generator=generator)
    return VideoClip(key, pixels, samples, face=torch.tensor([[18.0, 10, 78, 70]] * frames))


def network(net: SyncNet, weights: str = "random") -> Network:
    return Network(net, ARCHITECTURE, weights, "")


def metric(net: SyncNet, count: int = 1) -> SyncScore:
    return SyncScore(count, network(net), max_shift=SHIFT)


def refused(net: SyncNet, subject: VideoClip) -> str:
    """Return the flag of a clip that has no score."""
    scoring = metric(net)
    scoring.update(0, subject)
    scores = scoring.compute()
    for score in scores.values():
        assert math.isnan(score.value) and score.clips == 0
    flags = dict(scores["sync_c"].flags)
    assert list(flags.values()) == [1]
    return next(iter(flags))


def test_a_clip_without_sound_or_face_has_a_reason_and_no_score(net: SyncNet) -> None:
    good = clip()
    assert good.samples is not None and good.face is not None
    nan = good.samples.clone()
    nan[100] = float("nan")
    missing = torch.full_like(good.face, float("nan"))
    assert refused(net, good._replace(samples=None)) == NO_AUDIO
    assert refused(net, good._replace(samples=nan)) == NOT_FINITE
    assert refused(net, good._replace(samples=1e-4 * good.samples)) == SILENT
    assert refused(net, good._replace(face=None)) == NO_FACE
    assert refused(net, good._replace(face=missing)) == NO_FACE
    assert refused(net, clip(frames=5)) == TOO_SHORT
    assert refused(net, good._replace(samples=good.samples[:3200])) == TOO_SHORT
    brief = missing.clone()
    brief[:11] = good.face[:11]
    assert refused(net, good._replace(face=brief)) == TOO_SHORT


def test_two_faces_at_once_have_no_score(net: SyncNet) -> None:
    scoring = metric(net)
    rows = np.zeros((2, 15), np.float32)
    rows[:, :4], rows[:, 14] = [[2, 10, 40, 40], [50, 10, 40, 40]], 0.95
    scoring.detect = lambda image: rows  # type: ignore[assignment]
    still = clip()
    scoring.update(0, still._replace(frames=still.frames[:1].repeat(FRAMES, 1, 1, 1)))
    assert scoring.compute()["sync_c"].flags == {SEVERAL_FACES: 1}


def test_the_scores_are_those_of_the_definition(net: SyncNet) -> None:
    """A window pairs the crops of five frames with twenty columns from the same time on."""
    scoring, subject = metric(net), clip()
    scoring.update(0, subject)
    scores = scoring.compute()
    # The crop of a resting box, by hand, outside the six frames at each end.
    crops = [
        cv2.resize(
            cv2.copyMakeBorder(
                frame.permute(1, 2, 0).numpy(), 54, 54, 54, 54, cv2.BORDER_CONSTANT,
                value=(110, 110, 110),
            )[64:148, 60:144],
            (224, 224),
        )
        for frame in subject.frames
    ]  # fmt: skip
    lips = VideoSyncNet(net).embed_frames(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2))
    assert subject.samples is not None
    cepstra = torch.from_numpy(mfcc(subject.samples.numpy()))
    audio = VideoSyncNet(net).embed_cepstra(cepstra)
    windows = window_count(FRAMES, 640 * FRAMES)
    assert windows == FRAMES - 5 and scores["sync_windows"].value == windows
    for form, distances in (("", padded_distances), ("_unpadded", unpadded_distances)):
        curve = distances(lips[:windows].double(), audio[:windows].double(), SHIFT)
        by_hand = sync_score(curve, windows)
        assert scores[f"sync_c{form}"].value == pytest.approx(by_hand.confidence, rel=1e-4)
        assert scores[f"sync_d{form}"].value == pytest.approx(by_hand.distance, rel=1e-5)
        assert scoring.sync_of(0)[form].offset == by_hand.offset


def test_a_late_track_is_scored_with_the_audio_of_its_time(net: SyncNet) -> None:
    """Eight frames without a face before the track change nothing."""
    subject = clip(frames=FRAMES + 8)
    assert subject.samples is not None and subject.face is not None
    late = subject.face.clone()
    late[:8] = float("nan")
    scoring = metric(net, 2)
    scoring.update(0, subject._replace(face=late))
    scoring.update(1, subject._replace(frames=subject.frames[8:], samples=subject.samples[5120:],
                                       face=subject.face[8:]))  # fmt: skip
    torch.testing.assert_close(scoring.curves[0], scoring.curves[1], rtol=1e-12, atol=0)


def test_clips_that_are_scored_with_reserve_are_flagged(net: SyncNet) -> None:
    scoring = metric(net)
    scoring.update(0, clip())
    flags = scoring.compute()["sync_c"].flags
    assert flags["fewer than 100 windows"] == 1 and flags["face under 100 pixels"] == 1


def set_curves(scoring: SyncScore, index: int, best: int, lowest: float, others: float) -> None:
    """Fill a row with curves whose minimum is at column `best`."""
    scoring.status[index] = scoring.visits[index] = 1
    scoring.windows[index] = 150
    scoring.curves[index] = others
    scoring.curves[index, :, best] = lowest


def test_an_offset_at_the_largest_shift_is_no_answer(net: SyncNet) -> None:
    """Three clips have offsets +2, -4 and the largest shift; the last has none."""
    scoring = metric(net, 3)
    set_curves(scoring, 0, SHIFT - 2, 5.0, 15.0)
    set_curves(scoring, 1, SHIFT + 4, 7.0, 15.0)
    set_curves(scoring, 2, 0, 9.0, 12.0)
    scores = scoring.compute()
    assert scores["sync_d"].value == pytest.approx(7) and scores["sync_c"].clips == 3
    assert scores["sync_c"].value == pytest.approx((10 + 8 + 3) / 3)
    assert scores["av_offset"].value == -1 and scores["av_offset_abs"].value == 3
    assert scores["av_offset"].flags == {NO_ANSWER: 1} == dict(scores["sync_c"].flags)
    alone = metric(net)
    set_curves(alone, 0, 2 * SHIFT, 9.0, 12.0)
    assert math.isnan(alone.compute()["av_offset"].value)


def test_ranks_with_uneven_shares_give_the_bits_of_one_process(net: SyncNet) -> None:
    # Clips as short as the median of the crop allows.
    together, ranks = metric(net, 3), [metric(net, 3) for _ in range(2)]
    for index, rank in enumerate((0, 1, 1)):
        subject = clip(str(index), frames=SHIFT + 7, seed=index)
        together.update(index, subject)
        ranks[rank].update(index, subject)
    for table in ("status", "visits", "curves", "windows", "small_face"):
        total = sum((getattr(rank, table) for rank in ranks), torch.zeros(()))
        assert torch.equal(total, getattr(together, table))


def test_an_empty_set_has_no_value(net: SyncNet) -> None:
    score: Score = metric(net, 2).compute()["sync_c"]
    assert math.isnan(score.value) and score.flags == {"not sampled": 2}


def test_cards_differ_by_all_that_moves_a_score(net: SyncNet, tmp_path: Path) -> None:
    def hashes(scoring: SyncScore) -> list[str]:
        return [card.hash for card in scoring.cards().values()]

    first = metric(net)
    assert set(first.cards()) == set(first.compute())
    other = SyncScore(1, network(net, "0123"), max_shift=SHIFT)
    longer = SyncScore(1, network(net), max_shift=15)
    detected = SyncScore(1, network(net), max_shift=SHIFT, yunet=tmp_path)
    every = [h for scoring in (first, other, longer, detected) for h in hashes(scoring)]
    assert len(every) == len(set(every)) == 4 * 9
    assert hashes(metric(net)) == hashes(first)


# -- real media ----------------------------------------------------------------------------------


@pytest.mark.media
def test_a_real_clip_gives_the_numbers_of_the_original_program(net: SyncNet, media: Path) -> None:
    """All 388 windows, without the crop, since the clip is a crop; decoders differ slightly."""
    path = media / "video" / "th_lrs3_crop224.mp4"
    frames = torch.from_numpy(decode_mp4(path.read_bytes())).permute(0, 3, 1, 2)
    samples = read_audio(path)
    windows = window_count(len(frames), len(samples))
    assert windows == 388
    video = VideoSyncNet(net)
    lips = video.embed_frames(frames)[:windows]
    audio = video.embed_cepstra(torch.from_numpy(mfcc(samples)))[:windows]
    golden = np.load(media / "syncnet_golden_seed1000.npz", allow_pickle=False)
    for ours, theirs in ((lips, golden["V"]), (audio, golden["A"])):
        expected = torch.from_numpy(theirs)
        assert (ours[:, :16] - expected).norm() / expected.norm() < 2e-3
    score = sync_score(padded_distances(lips, audio, 15), windows)
    assert score.offset == -15
    assert score.distance == pytest.approx(7704.134, rel=1e-3)
    assert score.confidence == pytest.approx(2.46973, rel=0.05)


@pytest.mark.media
def test_yunet_sees_no_face_in_a_dog_and_two_in_two_people(
    net: SyncNet, media: Path, weights: Path
) -> None:
    dog, person = (
        torch.from_numpy(first_frames(media / "video" / f"{name}.mp4", FRAMES))
        for name in ("noface_dog", "th_may5s")
    )
    pair = torch.cat([person, person.flip(2)], 2)
    samples = 0.1 * torch.randn(640 * FRAMES, generator=torch.Generator().manual_seed(0))
    for frames, reason in ((dog, NO_FACE), (pair, SEVERAL_FACES)):
        scoring = SyncScore(1, network(net), max_shift=SHIFT,
                            yunet=weights / "yunet_n_640_640.onnx")  # fmt: skip
        scoring.update(0, VideoClip("x", frames.permute(0, 3, 1, 2), samples))
        assert scoring.compute()["sync_d"].flags == {reason: 1}


def read_example(path: Path) -> Tensor:
    """Return the frames [T, 3, Y, X] of an AVI file."""
    video, frames = cv2.VideoCapture(str(path)), []
    while (image := video.read()[1]) is not None:
        frames.append(np.ascontiguousarray(image[..., ::-1]))
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


@pytest.mark.media
def test_the_published_example_has_its_published_scores(media: Path, weights: Path) -> None:
    """README of syncnet_python: offset 3, minimum distance 5.353, confidence 10.021."""
    model, example = weights / "syncnet_v2.model", media / "video" / "example.avi"
    for path in (model, example):
        if not path.is_file():
            pytest.skip(f"no {path}; download_model.sh of joonson/syncnet_python has its address")
    video = VideoSyncNet(as_syncnet(released_syncnet(weights).net))
    frames, samples = read_example(example), read_audio(example)
    windows = window_count(len(frames), len(samples))
    lips = video.embed_frames(frames)[:windows]
    audio = video.embed_cepstra(torch.from_numpy(mfcc(samples)))[:windows]
    score = sync_score(padded_distances(lips, audio, 15), windows)
    assert score.offset == 3
    assert score.distance == pytest.approx(5.353, abs=0.05)
    assert score.confidence == pytest.approx(10.021, abs=0.1)
