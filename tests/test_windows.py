"""Windows of a long video: they cover it, and their weights sum to one."""

import pytest
import tiny
import torch

from echolab.diffusion.guidance import guided
from echolab.diffusion.sampling import sample_euler
from echolab.diffusion.sigmas import sampling_sigmas
from echolab.diffusion.windows import blend_weights, window_conditions, windowed, windows
from echolab.errors import ConfigError

SIZES = [
    (58, 29, 8),
    (29, 29, 8),
    (5, 29, 8),
    (1, 3, 2),
    (30, 29, 8),
    (7, 3, 2),
    (7, 3, 1),
    (9, 3, 0),
]


def test_the_list_of_the_released_code() -> None:
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


def test_a_field_without_context_is_the_same_in_windows() -> None:
    noise, spans = torch.randn(1, 2, 11, 2, 2), windows(11, 5, 2)
    whole = sample_euler(lambda x, s: x * s, noise, sampling_sigmas(5, 3.0))
    parts = windowed([lambda x, s: x * s] * len(spans), spans)
    torch.testing.assert_close(sample_euler(parts, noise, sampling_sigmas(5, 3.0)), whole)


def test_a_window_has_its_own_sound_and_the_first_picture() -> None:
    told = tiny.conditions()._replace(
        audio=torch.arange(66.0)[None, :, None]
    )  # 33 frames, 9 latent
    part = window_conditions(told, 4, 7)
    assert part.audio.flatten().tolist() == [float(token) for token in range(32, 32 + 18)]
    assert torch.equal(part.known, told.known[:, :, :3])


def test_a_long_video_is_made_of_windows_of_a_network() -> None:
    net, length = tiny.net(trained=True), 7
    told, spans = tiny.conditions(1), windows(length, tiny.LATENT_FRAMES, 1)
    told = told._replace(audio=torch.randn(1, 2 * (4 * (length - 1) + 1), 6))
    parts = [guided(net, window_conditions(told, *span), audio_scale=2.0) for span in spans]
    noise = torch.randn(1, tiny.CHANNELS, length, tiny.HEIGHT, tiny.WIDTH)
    found = sample_euler(windowed(parts, spans), noise, sampling_sigmas(2, 5.0))
    assert found.shape == noise.shape and found.isfinite().all()
