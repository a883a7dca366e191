"""Slow ranks are named by section once they have been slow for a while. tests/test_replica_check.py
has real ranks that sleep.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echolab.heartbeat import SECTIONS
from echolab.training.callbacks.metrics import LIMIT, OWN_PACE, STEP, Stragglers, scores


def window(data_wait: float = 0.1, forward: float = 1.0, backward: float = 2.0) -> dict[str, float]:
    report = dict.fromkeys(STEP, 0.0)
    return report | {"data_wait": data_wait, "forward": forward, "backward": backward}


WINDOWS = st.lists(st.builds(window, *[st.floats(0, 100)] * 3), min_size=1, max_size=5)


def test_scores_equal_the_values_by_hand() -> None:
    report = scores([window(), window(forward=2.0), window(data_wait=0.4)])
    assert report == [{"forward": 1.0}, {"forward": 0.5}, {"data_wait": 0.25, "forward": 1.0}]
    # 0.1 s of 3.1 s are less than a twentieth of the step, and ignored.
    assert scores([window(), window(forward=2.0)], ["data_wait"]) == [{}, {}]
    # No wait at all is the best that there is.
    assert scores([window(0.0), window(1.0)])[1]["data_wait"] == 0.0
    assert set(STEP) <= set(SECTIONS) and set(OWN_PACE) <= set(STEP)


@given(WINDOWS, st.floats(0.01, 100))
def test_scores_do_not_depend_on_the_unit(windows: list[dict[str, float]], factor: float) -> None:
    report = scores(windows)
    assert all(0 <= score <= 1 for own in report for score in own.values())
    for section in OWN_PACE:  # the fastest has 1, if it counts
        best = min(range(len(windows)), key=lambda rank: windows[rank][section])
        assert report[best].get(section, 1.0) == 1.0
    scaled = scores([{name: factor * s for name, s in w.items()} for w in windows])
    for one, other in zip(report, scaled, strict=True):
        for section in set(one) & set(other):
            assert one[section] == pytest.approx(other[section])


def alarms(slow: list[float], rank: int = 1) -> list[int]:
    """Return the windows that name a rank, which takes so many times as long as the others."""
    watch, result = Stragglers(["a", "b", "c"]), []
    for number, times in enumerate(slow):
        windows = [window(forward=times if at == rank else 1.0) for at in range(3)]
        values, report = watch.judge(windows)
        assert values["perf/straggler_score"] == pytest.approx(1 / times)
        for one in report:
            assert (one.rank, one.host, one.section) == (rank, "abc"[rank], "forward")
            assert one.score < LIMIT and one.seconds == times and one.best == pytest.approx(1)
            assert f"rank {rank} on {'abc'[rank]} is slow in forward" in one.words
            result.append(number)
    return result


@pytest.mark.parametrize(
    ("slow", "expected"),
    [
        ([1, 1, 1, 1], []),
        ([1.3] * 9, []),  # 1 / 1.3 is above the limit
        ([2, 2], []),
        ([2, 2, 1, 2, 2], []),  # not in a row
        ([1, 2, 2, 2, 2, 2], [3]),  # reported once
        ([2, 2, 2, 1, 1.5, 1.5, 1.5], [2, 6]),  # again, after it was well
    ],
)
def test_three_slow_windows_in_a_row_name_a_rank(slow: list[float], expected: list[int]) -> None:
    assert alarms(slow) == expected == alarms(slow, rank=0)


def test_one_rank_is_never_a_straggler() -> None:
    watch = Stragglers(["a"])
    watch.start(dict.fromkeys(SECTIONS, 0.0))
    assert watch.look(dict.fromkeys(SECTIONS, 1.0)) == ({}, [])
