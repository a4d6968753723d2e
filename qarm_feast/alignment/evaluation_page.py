"""The page of `qarm align evaluate`: gates, protocols by kind of vectors, gains with intervals.

One file without any outside resource, in the style of the codebook's quality page.
May import: the charts and the plot of such pages, the gates.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

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
from qarm_feast.quality_page.intervals import Interval, html_page, interval_plot

_CARDS_STYLE = ".cards { grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); }"
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
    return html_page(f"Encoder {version}: evaluation", sections, _CARDS_STYLE)


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


def _gain_plots(report: Mapping[str, Any]) -> str:
    parts = []
    for name, gains in report["gains"].items():
        lines = [
            Interval(_shown(key), gain["gain"], gain["low"], gain["high"])
            for key, gain in gains.items()
        ]
        title = escape(name.replace("_", " "))
        plot = interval_plot(lines, "gain over raw vectors")
        parts.append(f"<h2>What {title} vectors gain over raw ones</h2>{plot}")
    return "".join(parts)


def _shown(key: str) -> str:
    measure = next(each for each in MEASURES if key.startswith(each))
    return f"{_MEASURE_TEXTS[measure][0]}, {key.removeprefix(f'{measure}_')}"


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
