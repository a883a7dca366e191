"""Line and area charts as inline SVG, readable without a library or script.

Colors are names of CSS variables (`run-1`, `task-3`), so that the page can define a light and a
dark theme.  The attribute `data-chart` holds the values for the tooltip.
"""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 208, 46, 12, 12, 26  # pixels
NARROW, WIDE = 372, 768
MAX_POINTS = (
    200  # longer series are plotted as means of bins, with the range of each bin behind the line
)
ROUGH = 0.02  # mean jump between points, relative to the range, above which a line is smoothed
SMOOTH_OVER = 16  # a smoothed line is a moving average over 1 / 16 of its points
LOG_FROM = 60.0  # ratio of largest to smallest value above which the axis is logarithmic


class Series(NamedTuple):
    """One line: `values` over ascending `steps`; if `dashed` is set, it is the legend."""

    label: str
    color: str
    steps: Sequence[float]
    values: Sequence[float]
    dashed: str = ""


class Axis(NamedTuple):
    """Linear or logarithmic map from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def pixel(self, value: float) -> float:
        """Return the position of a value in pixels."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Return about `count` round numbers within the range."""
        if self.log:
            # Powers of ten; over many decades only every n-th.
            decades = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            every = max(1, math.ceil(len(decades) / (count + 1)))
            return [10.0**decade for decade in decades][::every]
        # Multiples of 1, 2, 2.5 or 5 times a power of ten.
        rough = (self.high - self.low) / count
        unit = 10.0 ** math.floor(math.log10(rough))
        step = min((unit * m for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - rough))
        first = math.ceil(self.low / step - 1e-9)
        return [step * n for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def short_number(value: float) -> str:
    """Format a number with at most four significant digits: `0.0123`, `1.2k`, `3e-05`."""
    size = abs(value)
    if size >= 1e9 or 0 < size < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    for least, unit, letter in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= least:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


class PlottedSeries(NamedTuple):
    """A series to draw: `line` in bold, raw values and ranges faintly behind it."""

    line: Series
    raw: Series | None  # as logged, if `line` is its moving average
    lows: list[float]  # range of each bin, equal to the values without bins
    highs: list[float]


def line_chart(title: str, name: str, series: Sequence[Series], *, wide: bool = False) -> str:
    """Return a <figure> with title, legend, axes and lines; "" if no series has points.

    `name` is the metric's name in metrics.jsonl, shown small next to the title.
    """
    plotted = [_smoothed(curve) for curve in series if len(curve.steps)]
    if not plotted:
        return ""
    # The axes cover the range of all bins, not only the means.
    width = WIDE if wide else NARROW
    lines = [curve.line for curve in plotted]
    low, high = (
        min(min(curve.lows) for curve in plotted),
        max(max(curve.highs) for curve in plotted),
    )
    across, up = _axes(lines, *_range(low, high), width)
    marks = "".join(_line(curve, across, up) for curve in plotted)
    return _figure(title, name, lines, across, up, marks, "chart wide" if wide else "chart")


def area_chart(title: str, name: str, series: Sequence[Series]) -> str:
    """Return a wide <figure> of stacked shares that sum to one, the first at the bottom.

    All series must have the same steps.
    """
    plotted = [_binned(curve).line for curve in series if len(curve.steps)]
    if not plotted:
        return ""
    across, up = _axes(plotted, (0.0, 1.0), False, WIDE)
    floor = [0.0] * len(plotted[0].steps)
    marks = []
    for curve in plotted:
        # Stack each area on the previous one.
        top = [low + value for low, value in zip(floor, curve.values, strict=True)]
        points = _points(curve.steps, top, across, up)
        points += _points(curve.steps, floor, across, up)[::-1]
        color = f"fill:var(--{curve.color})"
        marks.append(f'<polygon class="area" style="{color}" points="{" ".join(points)}"/>')
        floor = top
    return _figure(title, name, plotted, across, up, "".join(marks), "chart wide piled")


def _smoothed(curve: Series) -> PlottedSeries:
    binned = _binned(curve)
    values = binned.line.values
    # Draw dashed, short and smooth series without smoothing.
    if curve.dashed or len(values) < SMOOTH_OVER:
        return binned
    jumps = [abs(after - before) for before, after in zip(values, values[1:], strict=False)]
    if sum(jumps) / len(jumps) <= ROUGH * (max(values) - min(values)):
        return binned
    # Centered moving average.
    half = len(values) // SMOOTH_OVER // 2 + 1
    windows = (values[max(0, n - half) : n + half + 1] for n in range(len(values)))
    smooth = [sum(window) / len(window) for window in windows]
    return binned._replace(line=binned.line._replace(values=smooth), raw=binned.line)


def _binned(curve: Series) -> PlottedSeries:
    """Return at most MAX_POINTS points: means over bins of rows, and the range of each bin."""
    count = len(curve.steps)
    bins = min(count, MAX_POINTS)
    # Bins hold equal numbers of rows, not equal spans of steps.
    edges = [round(count * n / bins) for n in range(bins + 1)]
    spans = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    values = [curve.values[span] for span in spans]
    steps = [sum(curve.steps[span]) / len(curve.steps[span]) for span in spans]
    line = curve._replace(steps=steps, values=[sum(value) / len(value) for value in values])
    return PlottedSeries(line, None, [*map(min, values)], [*map(max, values)])


def _range(low: float, high: float) -> tuple[tuple[float, float], bool]:
    """Return the limits of the vertical axis, and whether it is logarithmic."""
    if low > 0 and high / low >= LOG_FROM:
        return (low / 1.15, high * 1.15), True
    if high == low:
        margin = abs(high) * 0.1 or 1.0
        return (low - margin, high + margin), False
    # Add a small margin; if all values are near zero, the axis starts at zero.
    margin = (high - low) * 0.06
    bottom = low - margin
    near_zero = low >= 0 and low < 0.35 * high  # then the axis starts at zero
    return (0.0 if near_zero or bottom < 0 <= low else bottom, high + margin), False


def _axes(
    series: Sequence[Series], limits: tuple[float, float], log: bool, width: int
) -> tuple[Axis, Axis]:
    first = min(curve.steps[0] for curve in series)
    last = max(curve.steps[-1] for curve in series)
    across = Axis(first, last if last > first else first + 1, LEFT, width - RIGHT)
    return across, Axis(*limits, HEIGHT - BOTTOM, TOP, log)


def _points(steps: Sequence[float], values: Sequence[float], across: Axis, up: Axis) -> list[str]:
    pairs = zip(steps, values, strict=True)
    return [f"{across.pixel(step):.1f},{up.pixel(value):.1f}" for step, value in pairs]


def _line(curve: PlottedSeries, across: Axis, up: Axis) -> str:
    line, raw, lows, highs = curve
    fill, stroke = f"fill:var(--{line.color})", f"stroke:var(--{line.color})"
    points = _points(line.steps, line.values, across, up)
    if len(points) == 1:
        x, y = points[0].split(",")
        return f'<circle cx="{x}" cy="{y}" r="3" style="{fill}"/>'
    # Draw the range of the bins, or the raw values, behind the line.
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
        f"{curve.label} from {short_number(curve.values[0])} to {short_number(curve.values[-1])}"
        for curve in series
    )
    return (
        f'<figure class="{kind}" data-chart="{escape(_tooltip_data(series, across, up))}">'
        f"<figcaption><b>{escape(title)}</b><code>{escape(name)}</code></figcaption>"
        f'{_legend(series)}<svg viewBox="0 0 {across.end + RIGHT:.0f} {HEIGHT}" role="img"'
        f' aria-label="{escape(label)}">{_grid(across, up)}{marks}<g class="cursor"></g>'
        "</svg></figure>"
    )


def _legend(series: Sequence[Series]) -> str:
    """Return the legend; dashed lines with the same legend share an entry."""
    items = [
        f'<li style="--c:var(--{curve.color})">{escape(curve.label)}</li>'
        for curve in series
        if not curve.dashed
    ]
    items += [
        f'<li class="dashed" style="--c:var(--soft)">{escape(meaning)}</li>'
        for meaning in dict.fromkeys(curve.dashed for curve in series if curve.dashed)
    ]
    return f'<ul class="key">{"".join(items)}</ul>'


def _grid(across: Axis, up: Axis) -> str:
    parts, right = [], across.end
    for tick in up.ticks(4):
        y = up.pixel(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y + 3.5:.1f}" text-anchor="end">'
            f"{short_number(tick)}</text>"
        )
    # Horizontal axis with its ticks.
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right:.0f}" y1="{base}" y2="{base}"/>')
    for tick in across.ticks(10 if right > NARROW else 5):
        x = across.pixel(tick)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{base + 16}" text-anchor="middle">'
            f"{short_number(tick)}</text>"
        )
    return "".join(parts)


def _tooltip_data(series: Sequence[Series], across: Axis, up: Axis) -> str:
    """Return the tooltip's data as JSON: axes in pixels, and the points of each line."""
    # The script of the page locates values by the axes in pixels.
    data = {
        "x": [across.low, across.high, across.start, across.end],
        "y": [up.low, up.high, up.start, up.end, int(up.log)],
        "series": [
            {
                "label": f"{curve.label}, {curve.dashed}" if curve.dashed else curve.label,
                "color": curve.color,
                "steps": [round(step) for step in curve.steps],
                "values": [float(f"{value:.4g}") for value in curve.values],
            }
            for curve in series
        ],
    }
    return json.dumps(data, separators=(",", ":"))
