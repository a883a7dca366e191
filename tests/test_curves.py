"""The curves of the report."""

import json
import math
import re
from html import unescape
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from echolab.tracking.curves import MAX_POINTS, Axis, Series, area_chart, line_chart, short_number

finite = st.floats(-1e6, 1e6, allow_subnormal=False)


def drawn(html: str) -> ElementTree.Element:
    """Parse the figure as a tree, and raise if it is not well-formed."""
    return ElementTree.fromstring(html)


def ticks(html: str) -> list[str]:
    return [text.text or "" for text in drawn(html).iter("text")]


@given(st.lists(finite, min_size=1, max_size=400), st.text(max_size=8))
def test_every_point_lies_inside_the_axes(values: list[float], label: str) -> None:
    label = "".join(letter for letter in label if letter.isprintable())
    html = line_chart("Loss", "train/loss", [Series(label, "run-0", range(len(values)), values)])
    figure = drawn(html)
    for line in figure.iter("polyline"):
        for pair in line.get("points", "").split():
            x, y = map(float, pair.split(","))
            assert 46 <= x <= 360 and 11.9 <= y <= 182.1
    numbers = json.loads(figure.get("data-chart", ""))
    assert len(numbers["series"][0]["values"]) <= MAX_POINTS
    assert label in unescape(html)


@given(finite, finite)
def test_axes_have_few_round_ticks_inside_their_limits(low: float, high: float) -> None:
    low, high = sorted((low, high))
    if high - low > 1e-3 * max(1.0, abs(low)):
        marks = Axis(low, high, 0, 1).ticks(4)
        slack = (high - low) * 1e-6
        assert 1 <= len(marks) <= 9
        assert all(low - slack <= tick <= high + slack for tick in marks)


def test_values_over_decades_get_a_logarithmic_axis() -> None:
    values = [10.0**-n for n in range(5)]
    html = line_chart("Rate", "train/lr", [Series("a", "run-0", range(5), values)])
    assert {"1", "0.01", "1e-4"} & set(ticks(html)) and '"y":[' in unescape(html)
    points = next(drawn(html).iter("polyline")).get("points", "").split()
    ys = [float(pair.split(",")[1]) for pair in points]
    steps = [after - before for before, after in zip(ys, ys[1:], strict=False)]
    assert max(steps) - min(steps) < 0.3, "equal ratios are equal distances"


def test_a_rough_line_is_drawn_smoothed_over_the_raw_one() -> None:
    steps = range(100)
    rough = [math.exp(-step / 30) + 0.2 * (-1) ** step for step in steps]
    html = line_chart("Loss", "train/loss", [Series("a", "run-0", steps, rough)])
    kinds = [line.get("class") for line in drawn(html).iter("polyline")]
    assert kinds == ["line raw", "line"]
    smooth = line_chart(
        "Beta", "train/beta", [Series("a", "run-0", steps, list(map(float, steps)))]
    )
    assert [line.get("class") for line in drawn(smooth).iter("polyline")] == ["line"]


def test_shares_fill_the_full_height() -> None:
    shares = {"a": [0.5, 0.2], "b": [0.5, 0.8]}
    html = area_chart("Tasks", "p/*", [Series(n, "task-0", [0, 9], v) for n, v in shares.items()])
    areas = [area.get("points", "").split() for area in drawn(html).iter("polygon")]
    assert areas[-1][0].endswith(",12.0") and areas[0][-1].endswith(",182.0")
    assert areas[0][:2] == areas[1][:1:-1], "the second stands on the first"


def test_dashes_are_explained_once() -> None:
    lines = [Series(n, "run-0", [1, 2], [1.0, 2.0], dashed="held out") for n in ("a", "b")]
    assert len(re.findall(">held out<", line_chart("Loss", "l", lines))) == 1


def test_no_values_give_no_figure() -> None:
    assert line_chart("Loss", "l", [Series("a", "run-0", [], [])]) == ""
    assert area_chart("Loss", "l", []) == ""


def test_tick_labels_are_short() -> None:
    values = (0.0, 1.0, 0.0123, 3e-5, 1200.0, 12000.0, 2.5e6, -0.5)
    expected = ["0", "1", "0.0123", "3e-5", "1200", "12k", "2.5M", "-0.5"]
    assert [short_number(value) for value in values] == expected
