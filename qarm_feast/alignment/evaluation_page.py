"""The page of `qarm align evaluate`: gates, protocols by kind of vectors, gains with intervals.

One file without any outside resource, in the style of the codebook's quality page.
May import: the charts of that page, the gates.
"""

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any, NamedTuple

from qarm_feast.alignment.evaluate import (
    ITEM_CF,
    MEASURES,
    NEIGHBOR_AUC,
    RAW,
    SLICES,
    ZERO_SHOT,
    vector_names,
)
from qarm_feast.alignment.gates import EncoderGateReading
from qarm_feast.quality_page.charts import Series, bar_chart

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW_HEIGHT, _BOTTOM = 860, 190, 210, 12, 24, 40
_STEPS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_MAX_TICKS = 9
_GATE_TITLES = {
    "min_neighbor_auc_gain": "Neighbour AUC over raw, all",
    "min_neighbor_auc_gain_warm": "Neighbour AUC over raw, warm",
    "min_neighbor_auc_gain_cold": "Neighbour AUC over raw, cold",
    "min_zero_shot_gain": "Zero-shot Recall@10 over raw",
    "min_item_cf_gain": "Item-CF Recall@10 over raw",
}
_MEASURE_TEXTS = {
    NEIGHBOR_AUC: (
        "Neighbour AUC",
        "Chance that one of the five items that share most users with an item is nearer to it than "
        "a random other item; 0.5 is blind.",
    ),
    ZERO_SHOT: (
        "Zero-shot Recall@10",
        "Share of users whose next item is among the ten nearest to the mean of their history.",
    ),
    ITEM_CF: (
        "Item-CF Recall@10",
        "Share of items whose best neighbour by item-CF is among the ten nearest by vectors.",
    ),
}


def evaluation_page(report: Mapping[str, Any], readings: Sequence[EncoderGateReading]) -> str:
    """Return the evaluation of an encoder as a whole HTML document.

    Args:
        report: What `qarm align evaluate` stores.
        readings: What each gate says of it.

    Returns:
        A document of some tens of kilobytes.
    """
    version = report["encoder_version"]
    sections = [_head(report), _verdict(readings), _gate_cards(readings)]
    if report["counts"]["num_queries_all"] or report["counts"]["num_users_all"]:
        sections += [
            "<h2>Protocols</h2>",
            f'<div class="charts">{"".join(_charts(report))}</div>',
            _gain_plots(report),
            _mask_charts(report),
            "<h2>All figures</h2>",
            _figure_table(report),
        ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(f'Encoder {version}: evaluation')}</title>{_style()}</head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _style() -> str:
    template = files("qarm_feast.quality_page").joinpath("template.html").read_text("utf-8")
    shared = template[template.index("<style>") : template.index("</style>")]
    own = (
        ".cards { grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); } "
        ".zero { stroke: var(--soft); stroke-width: 1.5; } .whisker { stroke: var(--c); "
        "stroke-width: 2; } .dot { fill: var(--c); } .plot { padding: 10px 14px; }"
    )
    return f"{shared}{own}</style>"


def _head(report: Mapping[str, Any]) -> str:
    counts, facts = report["counts"], report["data"]
    cutoff = facts["behaviour_cutoff"][:16].replace("T", " ")
    codebook = report["codebook_version"]
    codes = f"; codes of codebook {escape(codebook)}" if codebook else "; no codebook of it yet"
    return (
        f"<h1>Encoder {escape(report['encoder_version'])}: evaluation</h1>"
        f"<p>Data {escape(facts['directory'])}, {facts['num_items']:,} items, positives "
        f"{escape(facts['positive_label'])}, trained up to {cutoff}"
        f"{codes}.</p>"
        f"<p>Measured on validation rows: {counts['num_queries_all']:,} items "
        f"({counts['num_queries_cold']:,} cold: without a train row) and "
        f"{counts['num_users_all']:,} users ({counts['num_users_cold']:,} with a cold next item). "
        "Intervals are 95 %, items or users drawn with replacement.</p>"
    )


def _verdict(readings: Sequence[EncoderGateReading]) -> str:
    missed = [_GATE_TITLES[each.name] for each in readings if each.verdict == "missed"]
    if missed:
        text = f"Export is refused, worse than raw vectors: {', '.join(missed)}."
        return f'<div class="verdict missed">{escape(text)}</div>'
    if all(each.verdict == "off" for each in readings):
        return '<div class="verdict missed">Every gate is switched off: export asks nothing.</div>'
    if not any(each.verdict == "kept" for each in readings):
        text = (
            "No gate could be read. Export is refused while alignment.gates.allow_unmeasured is "
            "false."
        )
        return f'<div class="verdict missed">{text}</div>'
    return '<div class="verdict kept">All gates that could be read are kept.</div>'


def _gate_cards(readings: Sequence[EncoderGateReading]) -> str:
    return f'<div class="cards">{"".join(_gate_card(reading) for reading in readings)}</div>'


def _gate_card(reading: EncoderGateReading) -> str:
    value, note = "-", "nothing to measure"
    if reading.raw is not None and reading.aligned is not None:
        value = f"{reading.aligned - reading.raw:+.4f}"
        note = f"[{reading.low:+.4f}, {reading.high:+.4f}]"
    word = {"kept": "kept", "missed": "missed", "off": "gate off", "unmeasured": "not read"}
    kind = reading.verdict if reading.verdict in ("kept", "missed") else ""
    return (
        f'<div class="card"><span>{_GATE_TITLES[reading.name]}</span><b>{value}</b>'
        f'<span class="chip {kind}">{word[reading.verdict]}: {note}</span></div>'
    )


def _charts(report: Mapping[str, Any]) -> list[str]:
    names = vector_names(report)
    charts = []
    for measure in MEASURES:
        keys = [key for key in SLICES if f"{measure}_{key}" in report[names[0]]]
        if not keys:
            continue
        is_share = measure != NEIGHBOR_AUC
        series = []
        for name in names:
            values = [report[name][f"{measure}_{key}"] * (100 if is_share else 1) for key in keys]
            # Four bars stand side by side, so a label has room for three characters.
            labels = [f"{v:.1f}" if is_share else f"{v:.2f}".removeprefix("0") for v in values]
            series.append(Series(name.replace("_", " "), values, labels))
        title, text = _MEASURE_TEXTS[measure]
        sample = "users by next item" if measure == ZERO_SHOT else "items"
        y_label = f"% of {sample.partition(' ')[0]}" if is_share else "AUC"
        y_max = None if is_share else 1.0
        chart = bar_chart(keys, series, x_label=sample, y_label=y_label, y_max=y_max)
        charts.append(
            f"<figure><figcaption>{title}<small>{text}</small></figcaption>{chart}</figure>"
        )
    return charts


def _mask_charts(report: Mapping[str, Any]) -> str:
    charts = []
    for modality, by_share in report["masked"].items():
        shares = ["0 %", *map(_percent, by_share)]
        for measure in (NEIGHBOR_AUC, ZERO_SHOT):
            series = []
            for name in vector_names(report):
                values = [report[name][f"{measure}_all"]]
                values += [figures[name][f"{measure}_all"] for figures in by_share.values()]
                labels = [f"{value:.2f}".removeprefix("0") for value in values]
                series.append(Series(name.replace("_", " "), values, labels))
            title = _MEASURE_TEXTS[measure][0]
            y_max = 1.0 if measure == NEIGHBOR_AUC else None
            chart = bar_chart(
                shares, series, x_label="items without it", y_label=title, y_max=y_max
            )
            charts.append(
                f"<figure><figcaption>{title}, {escape(modality)} masked</figcaption>{chart}"
                "</figure>"
            )
    if not charts:
        return ""
    note = "Items lose one modality; one that loses its last gets the vector of no content."
    return (
        f'<h2>Mask-modality</h2><p>{note}</p><div class="charts">{"".join(charts)}</div>'
        f"{_mask_table(report)}"
    )


def _mask_table(report: Mapping[str, Any]) -> str:
    names = vector_names(report)
    rows = [
        (
            f"{escape(modality)}, {_percent(share)}",
            _shown(key),
            *(f"{figures[name][key]:.4f}" for name in names),
        )
        for modality, by_share in report["masked"].items()
        for share, figures in by_share.items()
        for key in figures[RAW]
    ]
    return _panel(("masked, of items", "measure, slice", *map(_titled, names)), rows, num_left=2)


def _percent(share: str) -> str:
    return f"{float(share) * 100:.0f} %"


def _titled(name: str) -> str:
    return escape(name.replace("_", " "))


class _Line(NamedTuple):
    name: str
    value: float
    low: float
    high: float


def _gain_plots(report: Mapping[str, Any]) -> str:
    parts = []
    for name, gains in report["gains"].items():
        lines = [
            _Line(_shown(key), gain["gain"], gain["low"], gain["high"])
            for key, gain in gains.items()
        ]
        title = escape(name.replace("_", " "))
        parts.append(f"<h2>What {title} vectors gain over raw ones</h2>{_plot(lines)}")
    return "".join(parts)


def _shown(key: str) -> str:
    measure = next(each for each in MEASURES if key.startswith(each))
    return f"{_MEASURE_TEXTS[measure][0]}, {key.removeprefix(f'{measure}_')}"


def _plot(lines: Sequence[_Line]) -> str:
    low = min(0.0, *(line.low for line in lines))
    high = max(0.0, *(line.high for line in lines))
    span = max(high - low, 1e-6)
    height = _TOP + _ROW_HEIGHT * len(lines) + _BOTTOM

    def place(value: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - low) / span, 1)

    parts = []
    step = next((step for step in _STEPS if span / step <= _MAX_TICKS), 1.0)
    for number in range(-int(-low / step), int(high / step) + 1):
        x, kind = place(number * step), "grid" if number else "zero"
        bottom = height - _BOTTOM + 4
        parts.append(f'<line class="{kind}" x1="{x}" x2="{x}" y1="{_TOP - 6}" y2="{bottom}"/>')
        parts.append(_text(x, bottom + 14, f"{number * step:+.3g}" if number else "0"))
    for row, line in enumerate(lines):
        y = _TOP + _ROW_HEIGHT * (row + 0.5)
        kind = "s2" if line.low > 0 else "s4" if line.high < 0 else "s0"
        shown = f"{line.value:+.4f} [{line.low:+.4f}, {line.high:+.4f}]"
        parts += [
            _text(_LEFT - 10, y + 4, line.name, "end"),
            f'<g class="{kind}"><line class="whisker" x1="{place(line.low)}" '
            f'x2="{place(line.high)}" y1="{y}" y2="{y}"/>'
            f'<circle class="dot" cx="{place(line.value)}" cy="{y}" r="4.5"/></g>',
            _text(_WIDTH - _RIGHT + 12, y + 4, shown, "start"),
        ]
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="gain over raw vectors">'
        f"{''.join(parts)}</svg>"
    )
    return f'<div class="panel plot">{svg}</div>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _figure_table(report: Mapping[str, Any]) -> str:
    names = vector_names(report)
    rows = []
    for key in report[RAW]:
        cells = []
        for name in names:
            low, high = report["intervals"][name][key]
            cells.append(f"{report[name][key]:.4f} [{low:.3f}, {high:.3f}]")
        rows.append((_shown(key), *cells))
    return _panel(("measure, slice", *map(_titled, names)), rows, num_left=1)


def _panel(head: Sequence[str], rows: Sequence[Sequence[str]], num_left: int) -> str:
    """Return a table of cells that are HTML; the first ``num_left`` columns stand at the left."""
    kinds = [' class="left"' if number < num_left else "" for number in range(len(head))]
    lines = [
        "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        for tag, cells in (("th", head), *(("td", row) for row in rows))
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="panel scroll"><table>{body}</table></div>'
