"""The choice `video` of the group metrics: names, missing files, and clips with a fault."""

import math
from pathlib import Path

import pytest
import torch
from scored import noise_frames, video_frames

from echolab.config.metrics import metrics_named
from echolab.errors import ConfigError
from echolab.evaluation.choice import build_metrics
from echolab.metrics.card import Card
from echolab.metrics.identity import csim
from echolab.metrics.metric import Score, VideoClip, VideoMetric
from echolab.metrics.quality import qalign
from echolab.metrics.setup import Setup

LARGE = {"lpips", "hkc", "hkv", "iqa", "ase"}  # scores whose networks are not among the samples


def score(metrics: list[VideoMetric], clip: VideoClip) -> tuple[dict[str, Score], dict[str, Card]]:
    """Return the scores of one clip by all metrics, and their cards."""
    scores, cards = {}, {}
    for metric in metrics:
        metric.update(0, clip)
        scores |= metric.compute()
        cards |= metric.cards()
        metric.reset()
    return scores, cards


def test_unknown_networks_and_types_are_refused_in_one_line(tmp_path: Path) -> None:
    setup = Setup(1, 25, networks=tmp_path)
    with pytest.raises(ConfigError, match="network=vgg: not a face network; give mobilefacenet"):
        csim(setup, network="vgg")
    with pytest.raises(ConfigError, match="dtype=int8: not one of bfloat16"):
        qalign(setup, folder="model", dtype="int8")


@pytest.mark.media
def test_every_score_has_a_value_or_a_reason(media: Path, weights: Path) -> None:
    others = ("echolab.metrics.fid:", "echolab.metrics.fvd:", "echolab.metrics.sync:")
    shipped = metrics_named("released")["scores"]
    entries = [entry for entry in shipped if not entry["target"].startswith(others)]
    metrics, lines = build_metrics(entries, Setup(1, 25, networks=weights))
    left_out = {name for line in lines for name in line.split(": left out")[0].split(", ")}
    assert left_out <= LARGE
    names = {name for entry in entries for name in entry["names"]} - left_out

    # A good clip with all of its inputs has all scores.
    speaker = video_frames(media / "video" / "grid_bbaf2n.mpg", 25)
    recorded = video_frames(media / "video" / "grid_lrwp9a.mpg", 25)
    good = VideoClip(
        "a", speaker, torch.zeros(25 * 640), speaker[0], recorded, borders=(9, 17)
    )  # fmt: skip
    scores, cards = score(metrics, good)
    assert set(scores) == set(cards) == names
    assert all(math.isfinite(value.value) and value.clips == 1 for value in scores.values())
    assert scores["csim"].value > 0.6 and scores["csim_truth"].value < 0.25
    assert scores["psnr_first_frame"].value == 100 and scores["psnr"].value < 20
    # Cards of networks name the weights by their hash.
    networks = {name for name, card in cards.items() if card.network != "none"}
    assert {"csim", "efid_blendshapes", "silent_mouth", "identity_drift"} <= networks
    assert all(len(cards[name].weights) == 64 for name in networks)

    # A clip with a fault has a value or the reason why not, and never NaN without a reason.
    pair = torch.cat([speaker, speaker.flip(-1)], -1)
    faulty = {
        "no face": VideoClip("b", noise_frames(25)),
        "two faces": VideoClip("c", pair, torch.zeros(25 * 640), pair[0], pair),
        "five frames": good._replace(frames=speaker[:5], truth=recorded[:5], borders=()),
        "no audio": good._replace(samples=None),
        "one frame": VideoClip("d", speaker[:1]),
        "no frame": VideoClip("e", speaker[:0]),
    }
    for fault, clip in faulty.items():
        for name, value in score(metrics, clip)[0].items():
            assert math.isfinite(value.value) == (value.clips == 1 and not value.flags), (
                fault, name, value,
            )  # fmt: skip
