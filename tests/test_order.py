"""The order of an epoch: everything once, repeatable, local, and different each time."""

import json
import tracemalloc
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from echolab.cli.__main__ import main
from echolab.data.shuffle import EpochOrder, epoch_order
from echolab.data.shuffle_quality import Shuffling, shuffling, uniformity

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


@given(SHARDS, st.integers(1, 50), st.integers(0, 60), st.data())
def test_any_part_is_worked_out_by_itself(
    shards: list[int], block: int, buffer: int, data: st.DataObject
) -> None:
    order = EpochOrder(shards, "f", seed=1, epoch=2, block=block, buffer=buffer)
    whole = epoch_order(shards, "f", seed=1, epoch=2, block=block, buffer=buffer)
    first = data.draw(st.integers(0, len(order)))
    stop = data.draw(st.integers(first, len(order)))
    turns = order.turns(first, stop)
    assert order.samples(turns).tolist() == whole[first:stop].tolist()
    assert all(abs(int(turn) - at) < max(1, buffer) for at, turn in enumerate(turns, first))


IDS = 20_000
SHARDS_OF_IDS = [250] * 80


@pytest.fixture(scope="module")
def epochs() -> list[np.ndarray]:
    return [epoch_order(SHARDS_OF_IDS, "f", seed=7, epoch=epoch) for epoch in range(40)]


def test_neighbours_are_parted(epochs: list[np.ndarray]) -> None:
    assert all(shuffling(SHARDS_OF_IDS, order).adjacency < 0.02 for order in epochs)


def test_every_epoch_is_another(epochs: list[np.ndarray]) -> None:
    for one, other in combinations(epochs, 2):
        assert np.mean(one == other) < 0.01
        # Nor is one the other moved along, or turned around.
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.2


def test_every_sample_may_stand_anywhere(epochs: list[np.ndarray]) -> None:
    assert 0.001 < (uniformity(epochs) or 0)
    for block in (7, 320, 624):  # one sample's own places, over the epochs
        places = [np.flatnonzero(order == 32 * block)[0] * 8 // IDS for order in epochs]
        assert chisquare(np.bincount(places, minlength=8)).pvalue > 0.001
    # Blocks that keep to their half of the epoch are found out.
    halves = [
        np.concatenate([order[order < IDS // 2], order[order >= IDS // 2]]) for order in epochs
    ]
    assert (uniformity(halves) or 0) < 1e-6


@pytest.mark.parametrize("world", [1, 3, 8])
def test_every_rank_meets_every_shard(epochs: list[np.ndarray], world: int) -> None:
    of_ranks = [
        np.concatenate([order.reshape(-1, 16)[:, rank * 16 // world] for order in epochs])
        for rank in range(world)
    ]
    assert all(len(set((own // 250).tolist())) == len(SHARDS_OF_IDS) for own in of_ranks)


def test_a_report_tells_a_bad_shuffle_from_a_good_one(epochs: list[np.ndarray]) -> None:
    still = shuffling(SHARDS_OF_IDS, np.arange(IDS))
    good = shuffling(SHARDS_OF_IDS, epochs[0])
    assert still == Shuffling(1.0, 0.0, still.shards, 1)
    assert good.moved == pytest.approx(1 / 3, abs=0.05)
    assert good.shards > 10 * still.shards
    # What must be read again or held: the blocks that the shuffle above them reaches.
    assert good.open_blocks <= 2 * 1024 // 32 + 2


def test_planning_ten_to_the_eight_samples_takes_little_memory() -> None:
    shards = np.full(100_000, 1000, dtype=np.int64)
    tracemalloc.start()
    order = EpochOrder(shards, "f", seed=0, epoch=0)
    found = order.samples(order.turns(1_000_000, 1_000_064))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6 and len(order) == 10**8
    assert len(set(found.tolist())) == 64 and 0 <= found.min() and found.max() < 10**8


def test_the_command_measures_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many, one = runs.write_clips(tmp_path / "many", 30), runs.write_clips(tmp_path / "one", 1)
    assert main(["data", "shuffle-report", str(many.folder), "format=json", "block=2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["samples"], told["shards"], told["good"]) == (30, 10, True)
    assert 0 < told["adjacency"] < 0.2 and told["repeated"] < 0.2
    assert main(["data", "shuffle-report", str(many.folder), "buffer=0", "block=9"]) == 0
    assert "take a larger buffer" in capsys.readouterr().out
    assert main(["data", "shuffle-report", str(one.folder)]) == 1  # every epoch is the same
    assert "in two epochs 100.00%" in capsys.readouterr().out
    assert main(["data", "shuffle-report", str(many.folder), "epochs=1"]) == 1
    assert "epochs=1 is not a whole number, at least 2" in capsys.readouterr().err
