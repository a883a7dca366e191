"""The order of an epoch: everything once, repeatable, local, and different each time."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from echolab.data.order import epoch_order

SHARDS = st.lists(st.integers(0, 40), max_size=12)


@given(SHARDS, st.integers(0, 5), st.integers(0, 3), st.integers(1, 50), st.integers(0, 60))
def test_every_sample_is_met_exactly_once(
    shards: list[int], seed: int, epoch: int, block: int, buffer: int
) -> None:
    order = epoch_order(shards, "f", seed=seed, epoch=epoch, block=block, buffer=buffer)
    assert sorted(order.tolist()) == list(range(sum(shards)))


def test_it_depends_on_fingerprint_seed_and_epoch_alone() -> None:
    def order(fingerprint: str = "f", seed: int = 1, epoch: int = 2) -> list[int]:
        return epoch_order([30, 40, 5], fingerprint, seed=seed, epoch=epoch).tolist()

    assert order() == order()
    others = [order("g"), order(seed=2), order(epoch=3)]
    assert all(other != order() for other in others)


def test_without_a_buffer_neighbours_stay_together() -> None:
    order = epoch_order([64, 64], "f", seed=0, epoch=0, block=8, buffer=0)
    assert (np.diff(order.reshape(-1, 8), axis=1) == 1).all()


def test_the_buffer_bounds_how_far_a_sample_moves() -> None:
    still = epoch_order([500], "f", seed=0, epoch=0, block=20, buffer=0)
    moved = epoch_order([500], "f", seed=0, epoch=0, block=20, buffer=30)
    place = {int(sample): at for at, sample in enumerate(still)}
    distance = [abs(place[int(sample)] - at) for at, sample in enumerate(moved)]
    assert 0 < max(distance) < 30


def test_the_order_is_the_one_that_runs_of_today_resume_in() -> None:
    # If this changes, a run that was stopped before the change meets other samples after it.
    assert epoch_order([3, 4], "f", seed=0, epoch=0, block=2).tolist() == [5, 6, 0, 3, 2, 1, 4]
