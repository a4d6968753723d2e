"""Pages of differences with their intervals: the document, and the plot of them.

One file without any outside resource, in the style of the codebook's quality page.
May import: the standard library.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from typing import NamedTuple

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW_HEIGHT, _BOTTOM = 860, 190, 210, 12, 24, 46
_STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_MAX_TICKS = 9
_PLOT_STYLE = (
    ".zero { stroke: var(--soft); stroke-width: 1.5; } .whisker { stroke: var(--c); "
    "stroke-width: 2; } .dot { fill: var(--c); } .plot { padding: 10px 14px; }"
)


class Interval(NamedTuple):
    """One line of a plot: a difference and its interval."""

    name: str
    value: float
    low: float
    high: float


def html_page(title: str, sections: Sequence[str], style: str = "") -> str:
    """Return a page in the style of the codebook's.

    Args:
        title: Plain text.
        sections: HTML of the body, in order.
        style: Rules beside those of the quality page and of the plots.

    Returns:
        A whole HTML document.
    """
    template = files("qarm_feast.quality_page").joinpath("template.html").read_text("utf-8")
    shared = template[template.index("<style>") : template.index("</style>")]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>{shared}{_PLOT_STYLE} {style}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def interval_plot(lines: Sequence[Interval], x_label: str, most_left: float = -math.inf) -> str:
    """Return differences as dots with whiskers.

    Args:
        lines: From above to below; one above zero by its whole interval has another colour than
            one below zero, or one of which that cannot be said.
        x_label: What the axis means.
        most_left: The axis begins no further left; what lies below is drawn there.

    Returns:
        A panel of HTML.
    """
    low = max(most_left, min([0.0, *(line.low for line in lines)]))
    high = max([0.0, *(line.high for line in lines)])
    span = max(high - low, 1e-6)
    height = _TOP + _ROW_HEIGHT * len(lines) + _BOTTOM

    def place(value: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * (max(value, low) - low) / span, 1)

    parts = [
        *_axis(low, high, height, place),
        _text(place((low + high) / 2), height - 8, x_label),
        *(_row(line, _TOP + _ROW_HEIGHT * (row + 0.5), place) for row, line in enumerate(lines)),
    ]
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(x_label)}">'
        f"{''.join(parts)}</svg>"
    )
    return f'<div class="panel plot">{svg}</div>'


def _axis(low: float, high: float, height: int, place: Callable[[float], float]) -> list[str]:
    step = next((step for step in _STEPS if (high - low) / step <= _MAX_TICKS), 1.0)
    bottom = height - _BOTTOM + 4
    parts = []
    for number in range(math.ceil(low / step), math.floor(high / step) + 1):
        x, kind = place(number * step), "grid" if number else "zero"
        parts.append(f'<line class="{kind}" x1="{x}" x2="{x}" y1="{_TOP - 6}" y2="{bottom}"/>')
        parts.append(_text(x, bottom + 14, f"{number * step:+.3g}" if number else "0"))
    return parts


def _row(line: Interval, y: float, place: Callable[[float], float]) -> str:
    kind = "s2" if line.low > 0 else "s4" if line.high < 0 else "s0"
    shown = f"{line.value:+.4f} [{line.low:+.4f}, {line.high:+.4f}]"
    return (
        f"{_text(_LEFT - 10, y + 4, line.name, 'end')}"
        f'<g class="{kind}"><line class="whisker" x1="{place(line.low)}" '
        f'x2="{place(line.high)}" y1="{y}" y2="{y}"/>'
        f'<circle class="dot" cx="{place(line.value)}" cy="{y}" r="4.5"/></g>'
        f"{_text(_WIDTH - _RIGHT + 12, y + 4, shown, 'start')}"
    )


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
