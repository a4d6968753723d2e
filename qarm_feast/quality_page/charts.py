"""Charts as inline SVG: bars and curves with axes, coloured by the page's style sheet.

Every text is escaped here; numbers come as they are. May import: NumPy, the standard library.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 380, 240
LEFT, RIGHT, TOP, BOTTOM = 50, 22, 34, 48
PLOT_WIDTH, PLOT_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
TIMES = "\N{MULTIPLICATION SIGN}"
_GROUP_SHARE = 0.72
"""Part of a category's width that its bars take."""


@dataclass(frozen=True)
class Series:
    """One row of bars or one curve; ``labels`` stand over the bars."""

    name: str
    values: Sequence[float]
    labels: Sequence[str] = ()


def bar_chart(
    categories: Sequence[str],
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_max: float | None = None,
) -> str:
    """Return grouped bars as SVG.

    Args:
        categories: Names below the groups.
        series: One bar per category each; none of their values is below 0.
        x_label: What the categories are.
        y_label: What the height is, with its unit.
        y_max: Value at the top; None takes the largest, rounded up.

    Returns:
        An ``<svg>`` element; with more than one series, a legend in it.
    """
    top = y_max or _round_up(max((v for each in series for v in each.values), default=1.0))
    step = PLOT_WIDTH / max(len(categories), 1)
    width = step * _GROUP_SHARE / len(series)
    parts = [_value_axis(top), _axis_titles(x_label, y_label)]
    for column, category in enumerate(categories):
        parts.append(_text(LEFT + (column + 0.5) * step, HEIGHT - BOTTOM + 15, category))
        for row, each in enumerate(series):
            x = LEFT + column * step + step * (1 - _GROUP_SHARE) / 2 + row * width
            label = each.labels[column] if each.labels else ""
            parts.append(_bar(x, width, min(each.values[column] / top, 1.0), row, label))
    return _svg([*parts, _legend([each.name for each in series])], f"{y_label} by {x_label}")


def load_chart(series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """Return curves over 0 ... 100 % on a logarithmic axis, with a dashed line at 1.

    Args:
        series: Values from the left edge to the right one, at least one each; those below a
            sixteenth lie on the lower edge.
        x_label: What runs from 0 to 100 %.
        y_label: What the height is.

    Returns:
        An ``<svg>`` element with a legend in it.
    """
    low = -4
    high = max(1, math.ceil(math.log2(max(max(each.values) for each in series))))
    ticks = range(low, high + 1, max(1, math.ceil((high - low) / 8)))
    parts = [_axis_titles(x_label, y_label)]
    for exponent in ticks:
        y = _height(exponent, low, high)
        label = f"{2**exponent}{TIMES}" if exponent >= 0 else f"1/{2**-exponent}{TIMES}"
        parts += [_grid_line(y), _text(LEFT - 6, y + 4, label, "end")]
    for percent in (0, 25, 50, 75, 100):
        x = LEFT + PLOT_WIDTH * percent / 100
        parts.append(_text(x, HEIGHT - BOTTOM + 15, f"{percent} %"))
    even = _height(0, low, high)
    parts.append(f'<line class="even" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{even}" y2="{even}"/>')
    for row, each in enumerate(series):
        parts.append(_curve(each.values, row, low, high))
    return _svg([*parts, _legend([each.name for each in series])], f"{y_label} by {x_label}")


def _height(exponent: float, low: float, high: float) -> float:
    return round(TOP + PLOT_HEIGHT * (high - exponent) / (high - low), 1)


def _curve(values: Sequence[float], row: int, low: float, high: float) -> str:
    points = []
    for number, value in enumerate(values):
        x = LEFT + PLOT_WIDTH * number / max(len(values) - 1, 1)
        exponent = max(math.log2(value), low) if value > 0 else low
        points.append(f"{x:.1f},{_height(exponent, low, high)}")
    return f'<polyline class="curve s{row}" points="{" ".join(points)}"/>'


def _bar(x: float, width: float, share: float, row: int, label: str) -> str:
    height = PLOT_HEIGHT * share
    y = TOP + PLOT_HEIGHT - height
    bar = (
        f'<rect class="bar s{row}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}" rx="2"/>'
    )
    return bar + (_text(x + width / 2, y - 4, label, small=True) if label else "")


def _value_axis(top: float) -> str:
    parts = []
    for number in range(5):
        y = TOP + PLOT_HEIGHT * (1 - number / 4)
        parts += [_grid_line(y), _text(LEFT - 6, y + 4, f"{top * number / 4:.3g}", "end")]
    return "".join(parts)


def _axis_titles(x_label: str, y_label: str) -> str:
    middle = TOP + PLOT_HEIGHT / 2
    return _text(LEFT + PLOT_WIDTH / 2, HEIGHT - 12, x_label) + (
        f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    parts, x = [], float(LEFT)
    for row, name in enumerate(names):
        parts.append(f'<rect class="bar s{row}" x="{x}" y="3" width="10" height="10" rx="2"/>')
        parts.append(_text(x + 14, 12, name, "start"))
        x += 26 + 7 * len(name)
    return "".join(parts)


def _grid_line(y: float) -> str:
    return f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", small: bool = False) -> str:
    kind = ' class="small"' if small else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], name: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">'
        f"{''.join(parts)}</svg>"
    )


def _round_up(value: float) -> float:
    """Return the next 1, 2, 4 or 8 times a power of ten: quarters of it read well."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 8, 10) if step * power >= value)
