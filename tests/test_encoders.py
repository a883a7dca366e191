"""The small stand-ins for umT5, CLIP and wav2vec2, and a clip encoded by all of them."""

from pathlib import Path

import drawn
import numpy as np
import pytest
import torch

from data_prep.draw import draw_dataset
from data_prep.encode import encode_dataset
from data_prep.options import DrawOptions
from echolab.data.collate import read_clip
from echolab.data.media import encode_flac
from echolab.data.shard_reader import open_dataset
from echolab.data.shard_writer import ShardWriter
from echolab.encoders import demo
from echolab.encoders.demo import (
    MELS,
    NEIGHBORS,
    CausalAutoencoder,
    encode_audio,
    encode_caption,
    encode_image,
)
from echolab.encoders.encode import (
    FACE_EMPHASIS,
    LIP_EMPHASIS,
    Encoders,
    covered,
    demo_encoders,
    emphasis,
    encode_clip,
    fingerprint,
)
from echolab.errors import DataError, MediaError
from echolab.tasks.table import TASKS

FRAMES, SIZE = 9, 32


def made() -> Encoders:
    torch.manual_seed(0)
    return demo_encoders(CausalAutoencoder(width=16, depth=1).eval())


def center(tokens: torch.Tensor) -> torch.Tensor:
    """Return a token's own mel frame [2 T, 40], without neighbors and position."""
    return tokens[:, NEIGHBORS * MELS : (NEIGHBORS + 1) * MELS]


@pytest.mark.parametrize("frames", [1, 5, 25])
def test_two_audio_tokens_a_frame_for_any_audio_that_follows(frames: int) -> None:
    samples = torch.randn(frames * 640 + 1234, generator=torch.Generator().manual_seed(0)) * 0.1
    tokens = encode_audio(samples, frames)
    assert tokens.shape == (2 * frames, demo.AUDIO_DIM)
    assert torch.equal(tokens, encode_audio(samples[: frames * 640], frames))


def test_too_short_audio_is_refused_with_both_lengths() -> None:
    with pytest.raises(MediaError, match=r"3199 samples.*5 frames \(3200 samples\)"):
        encode_audio(torch.zeros(3199), 5)


def test_an_audio_token_encodes_its_time() -> None:
    frames = 25
    for token in (3, 20, 44):
        samples = torch.zeros(frames * 640)
        samples[320 * token + 160] = 1.0  # a click at the token's centre
        level = center(encode_audio(samples, frames)).mean(1)
        assert int(level.argmax()) == token
        others = torch.cat([level[: token - 1], level[token + 2 :]])
        assert others.max() < level[token] - 1


def test_a_tone_raises_its_own_frequency_band() -> None:
    times = torch.arange(16_000) / 16_000
    peaks = [
        int(
            center(encode_audio(0.3 * torch.sin(2 * torch.pi * hertz * times), 25)).mean(0).argmax()
        )
        for hertz in (200, 500, 1000, 2000, 4000)
    ]
    assert peaks == sorted(set(peaks))
    filters = demo.mel_filters()
    assert filters.min() == 0 and filters.max() <= 1 and bool((filters.sum(1) > 0).all())


def test_tokens_have_about_unit_norm() -> None:
    clips = drawn.clips(8)
    tokens = torch.stack([encode_audio(samples, 25) for samples in clips.samples])
    assert tokens.abs().mean() < 2 and 0.3 < tokens.std() < 3


def test_silent_tokens_keep_their_position_code() -> None:
    tokens = encode_audio(torch.zeros(25 * 640), 25)
    assert len({tuple(row.tolist()) for row in tokens}) == 50


def test_a_caption_becomes_pairs_of_words() -> None:
    tokens = encode_caption("A man, with blue eyes; in a blue shirt.")
    assert tokens.shape == (demo.CAPTION_TOKENS, demo.CAPTION_DIM)
    assert torch.equal(tokens, encode_caption("a man with blue eyes in a BLUE shirt"))
    count = 9
    assert bool((tokens[:count].abs().sum(1) > 0).all()) and not tokens[count:].any()
    assert not torch.equal(tokens[3], tokens[7])  # blue eyes, blue shirt
    assert not encode_caption("").any()
    assert encode_caption("一位女士").any()
    long = " ".join(f"word{number}" for number in range(50))
    assert torch.equal(encode_caption(long), encode_caption(long + " and more"))


def test_an_image_becomes_patches_in_order() -> None:
    still = torch.zeros(3, 64, 96)
    still[:, :16, 24:48] = 1  # the second patch of the first row
    tokens = encode_image(still)
    assert tokens.shape == (demo.IMAGE_TOKENS, demo.IMAGE_DIM)
    lit = tokens[:, : -demo.IMAGE_TOKENS].mean(1)
    assert lit[1] == 1 and lit.sum() == 1
    assert torch.equal(tokens[:, -demo.IMAGE_TOKENS :], torch.eye(demo.IMAGE_TOKENS))


def test_box_coverage_is_counted_in_frames() -> None:
    boxes = torch.tensor([[8.0, 8.0, 15.0, 15.0]]).repeat(9, 1)  # the latent in row 1, column 1
    boxes[5:7] += 1000  # gone in half of the last latent's frames 5 to 8
    share = covered(boxes, 4, 4)
    assert share.shape == (1, 3, 4, 4)
    assert share[0, :, 1, 1].tolist() == [1, 1, 0.5]
    everything = torch.tensor([[0.0, 0.0, 32.0, 32.0]]).repeat(9, 1)
    assert torch.equal(covered(everything, 4, 4), torch.ones(1, 3, 4, 4))


def test_emphasis_has_mean_one_and_keeps_its_ratios() -> None:
    face, lips = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    face[..., 1:3, 1:3], lips[..., 2, 1:3] = 1, 1
    weight = emphasis(face, lips)
    assert float(weight.mean()) == pytest.approx(1)
    ground = weight[0, 0, 0, 0]
    assert float(weight[0, 0, 1, 1] / ground) == pytest.approx(1 + FACE_EMPHASIS)
    assert float(weight[0, 0, 2, 1] / ground) == pytest.approx(1 + FACE_EMPHASIS + LIP_EMPHASIS)


def test_a_clip_holds_the_tensors_of_every_task() -> None:
    clips = drawn.clips(1, frames=FRAMES, size=SIZE)
    encoders = made()
    pixels = clips.float_pixels()[0]
    tensors = encode_clip(encoders, pixels, clips.samples[0], "someone", clips.face[0],
                          clips.lips[0])  # fmt: skip
    grid = (3, SIZE // 8, SIZE // 8)
    assert tensors["latents"].shape == (16, *grid)
    assert tensors["audio"].shape == (2 * FRAMES, demo.AUDIO_DIM)
    assert tensors["face"].shape == (SIZE // 16 * (SIZE // 16),)
    assert float(tensors["weight"].mean()) == pytest.approx(1, rel=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(tensors["latents"], encoders.video.encode(pixels[None])[0])
    for task in TASKS:
        assert (f"known.{task}" in tensors) is (task != "t2v")
        if task != "t2v":
            known = tensors[f"known.{task}"]
            assert known.shape == (4, *grid) and set(known.unique().tolist()) <= {0.0, 1.0}
            assert tensors[f"known_latents.{task}"].shape == (16, *grid)
    # The first frame is given, grey follows: its latent is the clip's own, the next is not.
    torch.testing.assert_close(tensors["known_latents.i2v"][:, 0], tensors["latents"][:, 0])
    assert not torch.allclose(tensors["known_latents.i2v"][:, 1], tensors["latents"][:, 1])


def test_known_latents_do_not_depend_on_unknown_pixels() -> None:
    clips, encoders = drawn.clips(1, frames=FRAMES, size=SIZE), made()
    pixels = clips.float_pixels()[0]
    changed = pixels.clone()
    changed[:, 1:] = -changed[:, 1:]  # all that image-to-video must make
    one, other = (
        encode_clip(encoders, view, clips.samples[0], "", clips.face[0], clips.lips[0])
        for view in (pixels, changed)
    )
    assert torch.equal(one["known_latents.i2v"], other["known_latents.i2v"])
    assert torch.equal(one["image"], other["image"])
    assert not torch.equal(one["latents"], other["latents"])


def test_different_networks_have_different_fingerprints() -> None:
    one, same = made(), made()
    assert one.fingerprints == same.fingerprints
    with torch.no_grad():
        next(same.video.parameters()).flatten()[0] += 1e-3
    assert fingerprint(one.video) != fingerprint(same.video)


def test_a_raw_dataset_becomes_an_encoded_one_that_training_reads(tmp_path: Path) -> None:
    raw, out, encoders = tmp_path / "raw", tmp_path / "encoded", made()
    draw_dataset(DrawOptions(raw, num_clips=2, frames=FRAMES, size=SIZE), lambda done: None)
    reported: list[int] = []
    assert encode_dataset(raw, out, encoders, reported.append) == 2 and reported == [1, 2]
    dataset = open_dataset(out)
    assert dataset.kind == "encoded" and dataset.keys == open_dataset(raw).keys
    assert dataset.encoders == encoders.fingerprints
    for task in TASKS:
        batch = read_clip(dataset, 1, task)
        assert batch.conditions.audio.shape == (2 * FRAMES, demo.AUDIO_DIM)
        assert bool(batch.latents.isfinite().all())
    with pytest.raises(DataError, match="raw kind"):
        encode_dataset(out, tmp_path / "twice", encoders, reported.append)


def test_audio_shorter_than_its_clip_leaves_no_dataset(tmp_path: Path) -> None:
    raw, short = tmp_path / "raw", tmp_path / "short"
    draw_dataset(DrawOptions(raw, num_clips=1, frames=FRAMES, size=SIZE), lambda done: None)
    source = open_dataset(raw)
    with ShardWriter(short, kind="raw") as writer:
        cut = {**source.read(0), "flac": encode_flac(np.zeros(640, np.float32))}
        writer.write(source.keys[0], cut)
    with pytest.raises(MediaError, match="640 samples"):
        encode_dataset(short, tmp_path / "out", made(), lambda done: None)
    assert not (tmp_path / "out" / "dataset.json").exists()
