import re

import pytest

from qarm_feast.quality_page.intervals import Interval, html_page, interval_plot

LINES = [Interval("up <b>", 0.1, 0.05, 0.2), Interval("down", -0.3, -0.4, -0.2)]


def whiskers(plot: str) -> list[tuple[float, float]]:
    found = re.findall(r'class="whisker" x1="([\d.]+)" x2="([\d.]+)"', plot)
    return [(float(left), float(right)) for left, right in found]


def test_intervals_lie_at_scale_and_are_coloured_by_their_side_of_zero() -> None:
    plot = interval_plot([*LINES, Interval("both", 0.0, -0.1, 0.1)], "AUC")

    # 860 less 190 and 210 pixels stand for -.4 to .2: 766.67 per 1.
    assert whiskers(plot) == [(535.0, 650.0), (190.0, 343.3), (420.0, 573.3)]
    assert re.findall(r'<g class="(s\d)">', plot) == ["s2", "s4", "s0"]
    assert "+0.1000 [+0.0500, +0.2000]" in plot
    assert "up &lt;b&gt;" in plot
    ticks = re.findall(r">([+-]0\.\d+|0)</text>", plot)
    assert ticks == ["-0.4", "-0.3", "-0.2", "-0.1", "0", "+0.1", "+0.2"]


def test_what_lies_far_to_the_left_is_cut() -> None:
    plot = interval_plot(LINES, "AUC", most_left=-0.05)

    # -.05 to .2 are 1840 pixels per 1.
    assert whiskers(plot) == [(374.0, 650.0), (190.0, 190.0)]


def test_a_plot_of_nothing_is_an_axis_with_zero() -> None:
    assert re.findall(r">([^<]+)</text>", interval_plot([], "AUC")) == ["0", "AUC"]


@pytest.mark.parametrize("style", ["", ".own { color: red; }"])
def test_a_page_is_a_whole_document_without_outside_resources(style: str) -> None:
    page = html_page("A & B", ["<h1>one</h1>", "<p>two</p>"], style)

    assert page.startswith("<!doctype html>")
    assert "<title>A &amp; B</title>" in page
    assert "<main><h1>one</h1><p>two</p></main>" in page
    assert f"{style}</style>" in page
    assert not re.search(r"https?://|<script|<link", page)
