"""Long videos: windows cover them with weights that sum to one, and chunks join without a jump."""

import pytest
import tiny
import torch

from echolab.diffusion.guidance import cfg_velocity
from echolab.diffusion.long_video import (
    blend_weights,
    chunk_spans,
    cross_fade,
    join_chunks,
    window_conditions,
    windowed_velocity,
    windows,
)
from echolab.diffusion.pipeline import SOLVERS
from echolab.diffusion.sigmas import sampling_sigmas
from echolab.diffusion.solvers import sample_euler
from echolab.errors import ConfigError
from echolab.types import Conditions

SIZES = [
    (58, 29, 8),
    (29, 29, 8),
    (5, 29, 8),
    (1, 3, 2),
    (30, 29, 8),
    (7, 3, 2),
    (7, 3, 1),
    (9, 3, 0),
    (50, 5, 4),  # three and more windows share a frame
    (40, 29, 20),
]


def test_windows_equal_those_of_the_released_code() -> None:
    assert windows(58, 29, 8) == [(0, 29), (21, 50), (42, 58)]


@pytest.mark.parametrize(("length", "size", "overlap"), SIZES)
def test_windows_cover_all_and_weights_sum_to_one(length: int, size: int, overlap: int) -> None:
    spans, total = windows(length, size, overlap), torch.zeros(length)
    assert spans[0][0] == 0 and spans[-1][1] == length
    assert all(0 < stop - start <= size for start, stop in spans)
    assert (
        all(stop > start for (_, stop), (start, _) in zip(spans, spans[1:], strict=False))
        or not overlap
    )
    for (start, stop), weight in zip(spans, blend_weights(spans), strict=True):
        assert (weight >= 0).all()
        total[start:stop] += weight
    torch.testing.assert_close(total, torch.ones(length))


def test_an_overlap_as_long_as_the_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="overlap=3"):
        windows(10, 3, 3)


def test_a_field_without_context_is_unchanged_by_windows() -> None:
    noise, spans = torch.randn(1, 2, 11, 2, 2), windows(11, 5, 2)
    full = sample_euler(lambda x, s: x * s, noise, sampling_sigmas(5, 3.0))
    parts = windowed_velocity([lambda x, s: x * s] * len(spans), spans)
    torch.testing.assert_close(sample_euler(parts, noise, sampling_sigmas(5, 3.0)), full)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_multistep_solver_keeps_one_history_for_a_long_video(solver: str) -> None:
    """Velocities are blended before the solver, so that windows change nothing."""
    noise, spans = torch.randn(1, 2, 11, 2, 2), windows(11, 5, 2)
    field, sigmas = lambda x, s: (x * s).tanh(), sampling_sigmas(6, 3.0)
    full = SOLVERS[solver](field, noise, sigmas, None)
    parts = SOLVERS[solver](windowed_velocity([field] * len(spans), spans), noise, sigmas, None)
    torch.testing.assert_close(parts, full)


def long_conditions(per_frame: int = 2) -> Conditions:
    """Return audio of 9 latent frames, 33 frames; each value is its own index."""
    audio = torch.arange(33.0 * per_frame)[None, :, None]
    positions = torch.arange(9.0)[None, None, :, None, None]
    return tiny.conditions(1)._replace(
        audio=audio, known=torch.zeros(1, 4, 9, 2, 2), known_latents=positions.expand(1, 4, 9, 2, 2)
    )


def given(conditions: Conditions, *frames: int) -> Conditions:
    known = conditions.known.clone()
    known[:, :, list(frames)] = 1
    return conditions._replace(known=known)


def test_the_windows_audio_is_the_released_slice() -> None:
    """A window has tokens 8k .. 8(k + P); the last window ends with the video."""
    conditions = given(long_conditions(), 0)
    assert window_conditions(conditions, 4, 7).audio.flatten().tolist() == [*range(32, 56)]
    assert window_conditions(conditions, 6, 9).audio.flatten().tolist() == [*range(48, 66)]
    assert window_conditions(conditions, 0, 9).audio.shape[1] == 66
    flash = window_conditions(given(long_conditions(per_frame=1), 0), 4, 7)
    assert flash.audio.flatten().tolist() == [*range(16, 25)], "4n + 1 entries, one a frame"


@pytest.mark.parametrize(
    ("known", "span", "positions"),
    [
        ((), (4, 7), [0, 1, 2]),  # t2v: nothing is known anywhere
        ((0,), (4, 7), [0, 1, 2]),  # i2v: the first picture, and the grey after it
        ((0, 8), (4, 7), [0, 1, 2]),  # flf2v: the last picture is not in this window
        ((0, 8), (6, 9), [0, 1, 8]),  # but in this one
        (range(9), (4, 7), [4, 5, 6]),  # a video is given: its own place
        ((0, 1, 2), (4, 7), [0, 5, 6]),  # continuation: one picture, what moved stays behind
        ((0,), (0, 3), [0, 1, 2]),
    ],
)
def test_a_window_gets_its_known_pixels_or_the_first_image(
    known: tuple[int, ...], span: tuple[int, int], positions: list[int]
) -> None:
    conditions = given(long_conditions(), *known)
    part = window_conditions(conditions, *span)
    assert part.known_latents[0, 0, :, 0, 0].tolist() == positions
    assert torch.equal(part.known, conditions.known[:, :, positions])


def test_one_window_equals_the_clip() -> None:
    conditions = tiny.conditions()
    full = window_conditions(conditions, 0, tiny.LATENT_FRAMES)
    assert all(torch.equal(one, other) for one, other in zip(full, conditions, strict=True))


@pytest.mark.parametrize("task", ["i2v", "avatar_sync"])
def test_conditions_of_windows_have_the_shapes_of_the_network(task: str) -> None:
    """A window's audio has as many windows as it has latent frames."""
    conditions, net = tiny.conditions(1), tiny.net(trained=True)
    conditions = conditions._replace(
        audio=torch.randn(1, 66, 6),
        known=torch.ones(1, 4, 9, *tiny.SHAPE[2:]) * (task == "avatar_sync"),
        known_latents=torch.randn(1, tiny.CHANNELS, 9, *tiny.SHAPE[2:]),
    )
    for start, stop in windows(9, 4, 1):
        part = window_conditions(conditions, start, stop)
        noisy = torch.randn_like(part.known_latents)
        assert net(noisy, torch.tensor([500.0]), part).shape == noisy.shape


def test_a_network_generates_a_long_video_by_windows() -> None:
    net, length = tiny.net(trained=True), 7
    conditions, spans = tiny.conditions(1), windows(length, tiny.LATENT_FRAMES, 1)
    conditions = conditions._replace(
        audio=torch.randn(1, 2 * (4 * (length - 1) + 1), 6),
        known=torch.zeros(1, 4, length, *tiny.SHAPE[2:]),
        known_latents=torch.zeros(1, tiny.CHANNELS, length, *tiny.SHAPE[2:]),
    )
    parts = [
        cfg_velocity(net, window_conditions(conditions, *span), audio_scale=2.0) for span in spans
    ]
    noise = torch.randn(1, tiny.CHANNELS, length, tiny.HEIGHT, tiny.WIDTH)
    actual = sample_euler(windowed_velocity(parts, spans), noise, sampling_sigmas(2, 5.0))
    assert actual.shape == noise.shape and actual.isfinite().all()


# -- chunks -------------------------------------------------------------------------------------


def test_chunks_are_those_of_the_released_code() -> None:
    assert chunk_spans(218, 113, 8) == [(0, 113), (105, 218)]
    assert chunk_spans(229, 113, 8) == [(0, 113), (105, 218), (210, 231)]
    assert chunk_spans(229, 113, 8, fill=True)[-1] == (210, 323)


@pytest.mark.parametrize("frames", [1, 5, 8, 25, 26, 42, 43, 100])
@pytest.mark.parametrize("fill", [False, True])
def test_chunks_cover_the_video_and_fill_their_latent_frames(frames: int, fill: bool) -> None:
    spans = chunk_spans(frames, 25, 8, fill)
    assert spans[0][0] == 0 and frames <= spans[-1][1]
    assert fill or spans[-1][1] < frames + 4
    assert all((stop - start) % 4 == 1 for start, stop in spans)
    assert all(b[0] == a[1] - 8 for a, b in zip(spans, spans[1:], strict=False))
    assert all(b[1] > a[1] for a, b in zip(spans, spans[1:], strict=False))


@pytest.mark.parametrize(("size", "overlap", "message"), [(24, 8, "window=24"), (25, 25, "overlap"),
                                                       (25, 0, "overlap=0")])  # fmt: skip
def test_impossible_chunk_lengths_are_refused(size: int, overlap: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chunk_spans(100, size, overlap)


def test_the_cross_fade_between_chunks_is_linear() -> None:
    before, after = torch.zeros(3, 9, 2, 2), torch.ones(3, 9, 2, 2)
    full = cross_fade(before, after, 5)
    expected = [0.0] * 4 + [0.0, 0.25, 0.5, 0.75, 1.0] + [1.0] * 4
    assert full[0, :, 0, 0].tolist() == pytest.approx(expected)


def test_joining_the_chunks_of_a_video_restores_it() -> None:
    video, spans = torch.randn(3, 59, 2, 2), chunk_spans(59, 25, 8)
    parts = [video[:, start:stop] for start, stop in spans]
    torch.testing.assert_close(join_chunks(parts, 8), video)
    assert spans[-1][1] == 59
