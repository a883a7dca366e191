"""Small line and area charts as inline SVG: no library, no script needed to read them.

Colours are names of CSS variables (`run-1`, `task-3`), so that light and dark are the page's
affair.  The numbers behind a chart travel with it in `data-chart`, for the tooltip.
"""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 208, 46, 12, 12, 26  # pixels
NARROW, WIDE = 372, 768
MOST_POINTS = 200  # a longer series is drawn as the mean of bins, with their range behind it
ROUGH = 0.02  # mean jump between neighbours, of the whole range, from which a line is smoothed
SMOOTH_OVER = 16  # a smoothed line is a moving average over this part (1 / 16) of its points
LOG_FROM = 60.0  # a ratio of largest to smallest from which the axis is logarithmic


class Series(NamedTuple):
    """One line: `values` over ascending `steps`; `dashed` says what its dashes mean, if any."""

    label: str
    colour: str
    steps: Sequence[float]
    values: Sequence[float]
    dashed: str = ""


class Axis(NamedTuple):
    """From numbers to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Round numbers inside the range, about `count` of them."""
        if self.log:
            decades = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            every = max(1, math.ceil(len(decades) / (count + 1)))
            return [10.0**decade for decade in decades][::every]
        rough = (self.high - self.low) / count
        unit = 10.0 ** math.floor(math.log10(rough))
        step = min((unit * m for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - rough))
        first = math.ceil(self.low / step - 1e-9)
        return [step * n for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def short_number(value: float) -> str:
    """At most four significant digits: `0.0123`, `1.2k`, `3e-05`."""
    size = abs(value)
    if size >= 1e9 or 0 < size < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    for least, unit, letter in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= least:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


class Drawn(NamedTuple):
    """A series made ready: `line` is drawn bold, the rest faint behind it."""

    line: Series
    raw: Series | None  # as logged, where `line` is its moving average
    lows: list[float]  # range of each bin, equal to the values where there are no bins
    highs: list[float]


def line_chart(title: str, name: str, series: Sequence[Series], *, wide: bool = False) -> str:
    """A <figure>: title, legend, axes, lines, numbers; nothing where no series has points.

    `name` is the metric's name in metrics.jsonl, shown small beside the title.
    """
    drawn = [_drawn(one) for one in series if len(one.steps)]
    if not drawn:
        return ""
    width = WIDE if wide else NARROW
    lines = [one.line for one in drawn]
    low, high = min(min(one.lows) for one in drawn), max(max(one.highs) for one in drawn)
    across, up = _axes(lines, *_range(low, high), width)
    marks = "".join(_line(one, across, up) for one in drawn)
    return _figure(title, name, lines, across, up, marks, "chart wide" if wide else "chart")


def area_chart(title: str, name: str, series: Sequence[Series]) -> str:
    """A wide <figure> of shares that sum to one, piled up, the first at the bottom.

    All series must have the same steps.
    """
    drawn = [_binned(one).line for one in series if len(one.steps)]
    if not drawn:
        return ""
    across, up = _axes(drawn, (0.0, 1.0), False, WIDE)
    floor = [0.0] * len(drawn[0].steps)
    marks = []
    for one in drawn:
        top = [low + value for low, value in zip(floor, one.values, strict=True)]
        points = _points(one.steps, top, across, up)
        points += _points(one.steps, floor, across, up)[::-1]
        colour = f"fill:var(--{one.colour})"
        marks.append(f'<polygon class="area" style="{colour}" points="{" ".join(points)}"/>')
        floor = top
    return _figure(title, name, drawn, across, up, "".join(marks), "chart wide piled")


def _drawn(one: Series) -> Drawn:
    binned = _binned(one)
    values = binned.line.values
    if one.dashed or len(values) < SMOOTH_OVER:
        return binned
    jumps = [abs(after - before) for before, after in zip(values, values[1:], strict=False)]
    if sum(jumps) / len(jumps) <= ROUGH * (max(values) - min(values)):
        return binned
    half = len(values) // SMOOTH_OVER // 2 + 1
    windows = (values[max(0, n - half) : n + half + 1] for n in range(len(values)))
    smooth = [sum(window) / len(window) for window in windows]
    return binned._replace(line=binned.line._replace(values=smooth), raw=binned.line)


def _binned(one: Series) -> Drawn:
    """At most MOST_POINTS points: means over equal numbers of rows, and each bin's range."""
    count = len(one.steps)
    bins = min(count, MOST_POINTS)
    edges = [round(count * n / bins) for n in range(bins + 1)]
    spans = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    values = [one.values[span] for span in spans]
    steps = [sum(one.steps[span]) / len(one.steps[span]) for span in spans]
    line = one._replace(steps=steps, values=[sum(value) / len(value) for value in values])
    return Drawn(line, None, [*map(min, values)], [*map(max, values)])


def _range(low: float, high: float) -> tuple[tuple[float, float], bool]:
    """Limits of the upright axis, and whether it is logarithmic."""
    if low > 0 and high / low >= LOG_FROM:
        return (low / 1.15, high * 1.15), True
    if high == low:
        margin = abs(high) * 0.1 or 1.0
        return (low - margin, high + margin), False
    margin = (high - low) * 0.06
    bottom = low - margin
    near_zero = low >= 0 and low < 0.35 * high  # then the axis may as well start at nothing
    return (0.0 if near_zero or bottom < 0 <= low else bottom, high + margin), False


def _axes(
    series: Sequence[Series], limits: tuple[float, float], log: bool, width: int
) -> tuple[Axis, Axis]:
    first = min(one.steps[0] for one in series)
    last = max(one.steps[-1] for one in series)
    across = Axis(first, last if last > first else first + 1, LEFT, width - RIGHT)
    return across, Axis(*limits, HEIGHT - BOTTOM, TOP, log)


def _points(steps: Sequence[float], values: Sequence[float], across: Axis, up: Axis) -> list[str]:
    pairs = zip(steps, values, strict=True)
    return [f"{across.place(step):.1f},{up.place(value):.1f}" for step, value in pairs]


def _line(one: Drawn, across: Axis, up: Axis) -> str:
    line, raw, lows, highs = one
    fill, stroke = f"fill:var(--{line.colour})", f"stroke:var(--{line.colour})"
    points = _points(line.steps, line.values, across, up)
    if len(points) == 1:
        x, y = points[0].split(",")
        return f'<circle cx="{x}" cy="{y}" r="3" style="{fill}"/>'
    behind = ""
    if lows != highs:
        ends = _points(line.steps, highs, across, up) + _points(line.steps, lows, across, up)[::-1]
        behind = f'<polygon class="band" style="{fill}" points="{" ".join(ends)}"/>'
    elif raw is not None:
        faint = " ".join(_points(raw.steps, raw.values, across, up))
        behind = f'<polyline class="line raw" style="{stroke}" points="{faint}"/>'
    kind = "line dashed" if line.dashed else "line"
    return behind + f'<polyline class="{kind}" style="{stroke}" points="{" ".join(points)}"/>'


def _figure(
    title: str,
    name: str,
    series: Sequence[Series],
    across: Axis,
    up: Axis,
    marks: str,
    kind: str,
) -> str:
    label = f"{title}: " + ", ".join(
        f"{one.label} from {short_number(one.values[0])} to {short_number(one.values[-1])}"
        for one in series
    )
    return (
        f'<figure class="{kind}" data-chart="{escape(_numbers(series, across, up))}">'
        f"<figcaption><b>{escape(title)}</b><code>{escape(name)}</code></figcaption>"
        f'{_key(series)}<svg viewBox="0 0 {across.end + RIGHT:.0f} {HEIGHT}" role="img"'
        f' aria-label="{escape(label)}">{_grid(across, up)}{marks}<g class="cursor"></g>'
        "</svg></figure>"
    )


def _key(series: Sequence[Series]) -> str:
    """The legend; dashed lines of one meaning share an entry."""
    items = [
        f'<li style="--c:var(--{one.colour})">{escape(one.label)}</li>'
        for one in series
        if not one.dashed
    ]
    items += [
        f'<li class="dashed" style="--c:var(--soft)">{escape(meaning)}</li>'
        for meaning in dict.fromkeys(one.dashed for one in series if one.dashed)
    ]
    return f'<ul class="key">{"".join(items)}</ul>'


def _grid(across: Axis, up: Axis) -> str:
    parts, right = [], across.end
    for tick in up.ticks(4):
        y = up.place(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y + 3.5:.1f}" text-anchor="end">'
            f"{short_number(tick)}</text>"
        )
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right:.0f}" y1="{base}" y2="{base}"/>')
    for tick in across.ticks(10 if right > NARROW else 5):
        x = across.place(tick)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{base + 16}" text-anchor="middle">'
            f"{short_number(tick)}</text>"
        )
    return "".join(parts)


def _numbers(series: Sequence[Series], across: Axis, up: Axis) -> str:
    """What the tooltip needs: axes in pixels, and the points of each line."""
    data = {
        "x": [across.low, across.high, across.start, across.end],
        "y": [up.low, up.high, up.start, up.end, int(up.log)],
        "series": [
            {
                "label": f"{one.label}, {one.dashed}" if one.dashed else one.label,
                "colour": one.colour,
                "steps": [round(step) for step in one.steps],
                "values": [float(f"{value:.4g}") for value in one.values],
            }
            for one in series
        ],
    }
    return json.dumps(data, separators=(",", ":"))
