"""The given pixels of local tasks are restored exactly, and generated pixels stay generated."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from echolab.inference.render import known_weight, paste_known


def outside_of_disc(size: int, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    return rows**2 + columns**2 > radius**2


@given(size=st.integers(16, 96), share=st.floats(0.1, 0.45))
def test_the_weight_is_one_outside_the_mask_and_falls_inside(size: int, share: float) -> None:
    known = outside_of_disc(size, radius := share * size)
    weight = known_weight(known)
    assert (weight[known] == 1).all() and (weight[~known] < 1).all()
    depth = radius - np.hypot(*(np.mgrid[:size, :size] - (size - 1) / 2))
    assert (weight[depth > min(9, 1 + radius / 4) + 1] == 0).all(), "the middle is all generated"
    along = weight[size // 2, : size // 2]
    assert (np.diff(along) <= 1e-6).all(), "nearer to the middle never has more of the source"


def test_the_edge_is_at_most_as_wide_as_a_latent() -> None:
    known = np.ones((256, 256), bool)
    known[:, 128:] = False
    row = known_weight(known)[0]
    np.testing.assert_allclose(row[127:138], [1, *(1 - np.arange(1, 10) / 9), 0], atol=0.02)


def test_frames_with_all_or_no_pixels_known() -> None:
    generator = np.random.default_rng(0)
    made, source = generator.integers(0, 256, (2, 3, 16, 16, 3), np.uint8)
    known = np.stack([np.ones((16, 16), bool), np.zeros((16, 16), bool), np.eye(16, dtype=bool)])
    pasted = paste_known(made, source, known)
    assert (pasted[0] == source[0]).all() and (pasted[2][known[2]] == source[2][known[2]]).all()
    assert (pasted[1] == made[1]).all()
