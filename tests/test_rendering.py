"""The known pixels of each task, in one clip, in windows and in chunks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from data_prep.draw import draw_talker
from echolab.data.media import write_video
from echolab.diffusion.pipeline import DEMO, PREVIEW
from echolab.encoders.encode import Encoders
from echolab.geometry import WAN
from echolab.inference.conditions import conditions_of, encode_scene
from echolab.inference.faces import face_around, lips_in
from echolab.inference.generate_arguments import GenerateArguments
from echolab.inference.inputs import Footage, footage_of, to_frames, to_pixels
from echolab.inference.render import (
    Renderer,
    frames_of,
    match_colors,
    render_chunks,
    render_windows,
    spans_of,
    steps_of,
)
from echolab.tasks.table import TASKS
from echolab.types import Conditions

FRAMES, CPU = 21, torch.device("cpu")
RECIPE = DEMO._replace(num_steps=2, window=17, overlap=1, by_clip=False)
CHUNKS = RECIPE._replace(overlap=8)


class Notes:
    """An autoencoder without loss: 8 x 8 mean colors of each group's last frame."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.made: list[Tensor] = []

    def encode(self, pixels: Tensor) -> Tensor:
        self.seen.append(pixels)
        small = torch.nn.functional.avg_pool3d(pixels[:, :, ::4], (1, 8, 8))
        return torch.cat([small, small.new_zeros(1, WAN.channels - 3, *small.shape[2:])], 1)

    def decode(self, latents: Tensor) -> Tensor:
        frames = 4 * (latents.shape[2] - 1) + 1
        generator = torch.Generator().manual_seed(len(self.made))
        height, width = (8 * side for side in latents.shape[3:])
        self.made.append(torch.rand(1, 3, frames, height, width, generator=generator))
        return self.made[-1]


class RecordingNet(nn.Module):
    """A network that records its conditions and predicts zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[Conditions] = []

    def forward(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        self.received.append(conditions)
        return torch.zeros_like(noisy)


def encoders(video: Notes) -> Encoders:
    return Encoders(
        video=video,
        text=lambda words: torch.full((2, 4), float(len(words))),
        image=lambda reference: torch.zeros(3, 4) if reference is None else torch.ones(3, 4),
        audio=lambda samples, frames: samples[::320][: 2 * frames, None].expand(-1, 4),
        fingerprints={},
    )


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, drawn = tmp_path_factory.mktemp("given"), draw_talker(3, 0, frames=30)
    files = {name: folder / f"{name}.png" for name in ("image", "last_image")}
    Image.fromarray(drawn.frames[0]).save(files["image"])
    Image.fromarray(255 - drawn.frames[0]).save(files["last_image"])
    write_video(folder / "source.mp4", drawn.frames, drawn.samples)
    return files | {"source_video": folder / "source.mp4"}


def footage(task: str, given: dict[str, Path], **more: object) -> Footage:
    """Return the inputs for FRAMES frames; face and mouth are in the middle of 64 x 64 pixels."""
    names = {"i2v": ["image"], "flf2v": ["image", "last_image"], "t2v": []}.get(
        task, ["source_video"]
    )
    boxes = {"face": (16.0, 16.0, 48.0, 48.0)} if task != "t2v" else {}
    if task == "lip_sync":
        boxes = {"box": (24.0, 36.0, 40.0, 46.0)}
    arguments = GenerateArguments(
        out=Path("v.mp4"), task=task, crop="frame", **{n: given[n] for n in names}, **boxes, **more
    )  # type: ignore[arg-type]
    return footage_of(arguments, FRAMES)


KNOWN_FRAMES = {  # of FRAMES, the frames that are fully known
    "t2v": [],
    "i2v": [0],
    "flf2v": [0, FRAMES - 1],
    "continuation": [*range(8)],
}


@pytest.mark.parametrize("task", TASKS)
def test_each_task_knows_its_own_pixels(task: str, given: dict[str, Path]) -> None:
    made = footage(task, given)
    assert made.pixels.shape == (3, FRAMES, 64, 64)
    if task in KNOWN_FRAMES:
        video_out = made.known.flatten(1).all(1).nonzero().flatten().tolist()
        assert video_out == KNOWN_FRAMES[task]
        assert made.known.flatten(1).any(1).sum() == len(video_out), "and the rest not at all"
    else:
        assert made.known[:, 0, 40, 32].logical_not().all(), "the mouth is regenerated"
        assert made.known[:, 0, 2, 2].all() and made.known[:, 0, 60, 60].all()
        cheek = made.known[:, 0, 20, 20]
        assert cheek.all() if task == "lip_sync" else not cheek.any()
    assert (made.image is None) is (task == "t2v")


def test_the_last_image_is_at_the_end_and_is_repeated(given: dict[str, Path]) -> None:
    made = footage("flf2v", given)
    assert (made.pixels[:, 0] + made.pixels[:, -1]).abs().max() < 1e-5, (
        "one is the other's negative"
    )
    longer = made.extended(FRAMES + 4)
    assert longer.known[FRAMES - 1 :].all() and not longer.known[FRAMES - 2].any()
    assert torch.equal(longer.pixels[:, -1], made.pixels[:, -1])


def test_continuation_begins_with_the_end_of_the_source(given: dict[str, Path]) -> None:
    first, last = footage("avatar_sync", given), footage("continuation", given)
    assert torch.equal(last.pixels[:, 7], last.pixels[:, 20]), "past the known ones nothing moves"
    assert not torch.equal(last.pixels[:, 0], first.pixels[:, 0])


def test_a_requested_size_is_cropped_from_the_center(given: dict[str, Path]) -> None:
    made = footage("i2v", given, width=64, height=32)
    square = footage("i2v", given)
    assert made.pixels.shape[2:] == (32, 64)
    torch.testing.assert_close(made.pixels, square.pixels[:, :, 16:48])
    torch.testing.assert_close(made.face[0], torch.tensor([16.0, 0.0, 48.0, 32.0]))


def renderer(recipe: object) -> tuple[Renderer, Notes, RecordingNet]:
    video, net = Notes(), RecordingNet()
    return Renderer(net, encoders(video), recipe, "batched", 0, 0.0), video, net  # type: ignore[arg-type]


def test_t2v_has_no_image_condition(given: dict[str, Path]) -> None:
    video = Notes()
    scene = encode_scene(encoders(video), footage("t2v", given), None, "a", None)
    conditions = conditions_of(encoders(video), scene, CPU)
    for part in (conditions.known, conditions.known_latents, conditions.image, conditions.audio):
        assert not part.any()
    assert not video.seen, "zeros, not an encoded gray video"
    assert conditions.face.all() and conditions.known_latents.shape == (1, WAN.channels, 6, 8, 8)


def test_unknown_pixels_are_gray_when_encoded(given: dict[str, Path]) -> None:
    video, made = Notes(), footage("lip_sync", given)
    scene = encode_scene(encoders(video), made, torch.zeros(640 * 3), "a", "no")
    conditions = conditions_of(encoders(video), scene, CPU)
    seen = video.seen[0][0]
    assert (seen[:, ~made.known[:, 0]] == 0).all()
    assert torch.equal(seen[:, made.known[:, 0]], made.pixels[:, made.known[:, 0]])
    assert scene.negative is not None and scene.negative.shape == (1, 2, 4)
    assert conditions.audio.shape == (1, 2 * FRAMES, 4)


def test_a_chunk_continues_the_decoded_end_of_the_previous_one(given: dict[str, Path]) -> None:
    made, (renders, video, net) = footage("i2v", given), renderer(CHUNKS)
    frames = frames_of(40, CHUNKS, "chunked")
    assert spans_of(40, CHUNKS, "chunked") == [(0, 17), (9, 26), (18, 35), (27, 40)]
    assert frames == 40 and steps_of(40, CHUNKS, "chunked") == 8
    audio = torch.arange(2.0 * frames).repeat_interleave(320)
    scene = encode_scene(renders.encoders, made.extended(frames), audio, "a", None)
    steps: list[int] = []
    video_out = render_chunks(renders, scene, lambda done, note: steps.append(done))
    assert video_out.shape == (3, 40, 64, 64) and steps == [*range(1, 9)]
    for before, after in zip(video.made, video.seen[1:], strict=False):
        assert torch.equal(after[0, :, :8], before[0, :, -8:]) and not after[0, :, 8:].any()
    first, second = net.received[0], net.received[2]
    assert first.known[0, 0, :, 0, 0].tolist() == [1, 0, 0, 0, 0]
    assert second.known[0, :, :, 0, 0].sum(0).tolist() == [4, 4, 3, 0, 0], "7 and 1 make 8 frames"
    assert second.audio[-1, :, 0].tolist() == [*range(18, 52)], "its own audio"
    assert torch.equal(first.image, second.image), "the reference image stays"
    torch.testing.assert_close(video_out[:, :9], video.made[0][0, :, :9])
    torch.testing.assert_close(video_out[:, -5:], video.made[-1][0, :, -5:])


@pytest.mark.parametrize("task", ["lip_sync", "flf2v"])
def test_chunks_keep_the_known_pixels(task: str, given: dict[str, Path]) -> None:
    (renders, video, _), frames = renderer(CHUNKS), frames_of(FRAMES, CHUNKS, "chunked")
    made = footage(task, given).extended(frames)
    scene = encode_scene(renders.encoders, made, torch.zeros(1), "a", None)
    render_chunks(renders, scene, lambda done, note: None)
    last = video.seen[-1][0]  # frames 9 to 22
    assert torch.equal(last[:, :8], video.made[0][0, :, -8:])
    known = made.known[17:, 0]
    assert torch.equal(last[:, 8:][:, known], made.pixels[:, 17:][:, known]) and known.any()


def test_windows_share_one_audio_encoding(given: dict[str, Path]) -> None:
    made, (renders, video, net) = footage("i2v", given), renderer(RECIPE)
    scene = encode_scene(renders.encoders, made, torch.zeros(1), "a", None)
    steps: list[int] = []
    video_out = render_windows(renders, scene, lambda done, note: steps.append(done))
    assert video_out.shape == (3, FRAMES, 64, 64) and steps == [1, 2]
    assert len(video.seen) == len(video.made) == 1
    assert [conditions.known.shape[2] for conditions in net.received] == [5, 2, 5, 2]


@pytest.mark.parametrize(("by_clip", "tokens"), [(False, 40), (True, 34)])
def test_by_clip_encodes_the_audio_of_each_window_alone(
    given: dict[str, Path], by_clip: bool, tokens: int
) -> None:
    recipe = RECIPE._replace(by_clip=by_clip)
    renders, _, net = renderer(recipe)
    frames, calls = frames_of(FRAMES, recipe, "joint"), []
    made, encode = footage("i2v", given).extended(frames), renders.encoders.audio

    def counted(samples: Tensor, count: int) -> Tensor:
        calls.append(count)
        return encode(samples, count)

    renders = renders._replace(encoders=renders.encoders._replace(audio=counted))
    samples = torch.arange(2.0 * frames).repeat_interleave(320)
    render_windows(
        renders, encode_scene(renders.encoders, made, samples, "a", None), lambda *_: None
    )
    assert calls == ([33, 17, 17] if by_clip else [21])
    assert net.received[0].audio[-1, :, 0].tolist() == [*range(tokens)]
    assert net.received[1].audio[-1, 0, 0] == 32, "latent frame 4 begins with token 32"


def test_by_clip_gives_audio_to_every_window() -> None:
    filled = RECIPE._replace(by_clip=True)
    assert spans_of(21, RECIPE, "joint") == [(0, 5), (4, 6)]
    assert spans_of(21, filled, "joint") == [(0, 5), (4, 9)]
    assert spans_of(7, filled, "joint") == [(0, 5)] and spans_of(7, RECIPE, "joint") == [(0, 3)]
    assert frames_of(21, filled, "joint") == 33 and frames_of(229, PREVIEW, "joint") == 229


def test_lip_and_face_boxes_invert_each_other() -> None:
    face = (10.0, 20.0, 50.0, 90.0)
    assert face_around(lips_in(face)) == pytest.approx(face)


def test_frames_and_pixels_invert_each_other() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3)).astype(np.uint8)
    assert np.array_equal(to_frames(to_pixels(frames)), frames)


def test_matched_colors_have_the_first_frames_mean_and_spread() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(100, 156, (16, 16, 3)).astype(np.uint8)
    drifted = np.clip(first * np.array([0.9, 1.1, 0.8]) + 10, 0, 255).astype(np.uint8)
    matched = match_colors(np.stack([first, drifted, first])).astype(float)
    assert np.array_equal(matched[0], first) and np.abs(matched[2] - first).max() <= 1
    assert np.abs(matched[1] - first).mean() < 3 < np.abs(drifted.astype(float) - first).mean()
