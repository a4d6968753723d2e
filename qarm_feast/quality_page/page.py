"""The page itself: headline figures with verdicts, charts, tables, continuity, worst buckets, tree.

One file without any outside resource. Text from the catalogue is escaped everywhere.

Shape letters in this file: N items, L levels, K codes of a level.
May import: NumPy, the registry's manifest and gates.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt

from qarm_feast.quality_page.charts import TIMES, Series, bar_chart, load_chart
from qarm_feast.quality_page.tree import MAX_ITEMS_PER_PREFIX, prefix_tree
from qarm_feast.quantizers.base import Codes
from qarm_feast.registry import GateReading, Manifest

_MAX_CURVE_POINTS = 160
_MAX_CHART_LEVELS = 6
_GATE_TITLES = {
    "max_collision_rate": "Collision rate",
    "min_codebook_coverage": "Codes in use, worst level",
    "min_hr10": "HR@10",
    "max_relative_residual_norm": "Residual norm left",
}


@dataclass(frozen=True)
class PageInput:
    """What the page shows: a version, its figures and gates, and the items with their codes."""

    manifest: Manifest
    quality: Mapping[str, Any]
    gates: Sequence[GateReading]
    item_ids_N: npt.NDArray[np.int64]
    rq_NL: Codes
    titles_N: Sequence[str]


def quality_page(content: PageInput) -> str:
    """Return the quality report of one codebook version as HTML.

    Args:
        content: What the page shows.

    Returns:
        A whole document, a few hundred kilobytes at most: the tree is cut, and says so.
    """
    sections = [
        _head(content),
        _cards(content),
        "<h2>Use of codes, error, meaning</h2>",
        f'<div class="charts">{"".join(_charts(content))}</div>',
        _level_table(content.quality),
        _continuity(content.manifest),
        _worst_buckets(content.quality["worst_buckets"]),
    ]
    tree = prefix_tree(content.item_ids_N, content.rq_NL, content.titles_N)
    # A "<" in a title could end the script element that holds the data.
    branches = json.dumps(tree["branches"], separators=(",", ":")).replace("<", "\\u003c")
    template = files("qarm_feast.quality_page").joinpath("template.html").read_text("utf-8")
    return Template(template).substitute(
        title=escape(f"Codebook {content.manifest.version}: quality"),
        body="\n".join(sections),
        tree_note=_tree_note(tree),
        branches=branches,
    )


def _head(content: PageInput) -> str:
    manifest = content.manifest
    levels = f" {TIMES} ".join(map(str, manifest.level_sizes))
    parent = f", refreshed from {escape(manifest.parent)}" if manifest.parent else ""
    return (
        f"<h1>Codebook {escape(manifest.version)}</h1>"
        f"<p>RQ levels {levels}, VQ pool {manifest.pool_size:,} (top {manifest.num_neighbors}), "
        f"encoder {escape(manifest.encoder_version)}{parent}; trained on "
        f"{manifest.num_training_items:,} items, {manifest.num_overrides:,} stored codes; measured "
        f"on {content.quality['num_items']:,} items; "
        f"created {manifest.created.isoformat(' ', 'minutes')}.</p>{_verdict(content)}"
    )


def _verdict(content: PageInput) -> str:
    forced = content.manifest.forced_gates
    if forced:
        gates = "".join(f"<br>{escape(refusal)}" for refusal in forced)
        return f'<div class="verdict missed">Published by force (--force), against:{gates}</div>'
    missed = [reading for reading in content.gates if reading.missed_by > 0]
    if missed:
        names = ", ".join(_GATE_TITLES[reading.name] for reading in missed)
        return f'<div class="verdict missed">Publishing is refused, not kept: {names}.</div>'
    return '<div class="verdict kept">All gates that are switched on are kept.</div>'


def _cards(content: PageInput) -> str:
    quality = content.quality
    cards = [_gate_card(reading) for reading in content.gates]
    least_even = min(level["entropy_share"] for level in quality["levels"])
    cards += [
        _card("Entropy, worst level", _percent(least_even), "of log2 K; 100 % is even use"),
        _card("Items with a code alone", _percent(quality["singleton_share"]), "no gate"),
        _card("Largest full code", f"{quality['max_bucket']:,} items", "no gate"),
    ]
    behaviour = quality["behaviour"]["levels"]
    if behaviour:
        lift = behaviour[0]["lift"]
        note = "no chance to compare" if lift is None else f"{lift:.1f}{TIMES} chance"
        share = _percent(behaviour[0]["share"])
        cards.append(_card("Behavioural neighbours in one c1", share, note))
    return f'<div class="cards">{"".join(cards)}</div>'


def _gate_card(reading: GateReading) -> str:
    value = f"{reading.value:.3f}"
    if reading.limit is None:
        return _card(_GATE_TITLES[reading.name], value, "gate off")
    sign = "≤" if reading.name.startswith("max_") else "≥"
    if reading.missed_by > 0:
        text = f"limit {sign} {reading.limit:g}, missed by {reading.missed_by:.3f}"
        return _card(_GATE_TITLES[reading.name], value, text, "missed")
    return _card(_GATE_TITLES[reading.name], value, f"kept: limit {sign} {reading.limit:g}", "kept")


def _card(name: str, value: str, note: str, kind: str = "") -> str:
    chip = f'<span class="chip {kind}">{escape(note)}</span>'
    return f'<div class="card"><span>{escape(name)}</span><b>{escape(value)}</b>{chip}</div>'


def _charts(content: PageInput) -> list[str]:
    quality = content.quality
    charts = [
        _figure(
            "Load of codes",
            f"Codes of each level, fullest first. 1{TIMES} is what each would hold if all held the "
            "same; a curve that dives early wastes codes.",
            _load_chart(content),
        ),
        _figure(
            "Use and evenness",
            "Codes with an item, and entropy as a share of log2 K: at 100 % all codes hold alike.",
            _use_chart(quality["levels"]),
        ),
        _figure(
            "Items by size of their bucket",
            "A bucket is a full code; items in one bucket cannot be told apart. "
            "Over the bars: number of buckets.",
            _bucket_chart(content.rq_NL),
        ),
        _figure(
            "What each level leaves over",
            "Root mean square length of the residual; the vector itself has length 1.",
            _residual_chart(quality["levels"]),
        ),
        _figure(
            "Likeness by shared prefix",
            "Mean cosine of pairs of items that share just so many first levels; it should rise.",
            _cosine_chart(quality["mean_cosine_by_shared_prefix"]),
        ),
    ]
    return [*charts, _behaviour_figure(quality["behaviour"])]


def _figure(title: str, text: str, chart: str) -> str:
    return f"<figure><figcaption>{title}<small>{text}</small></figcaption>{chart}</figure>"


def _load_chart(content: PageInput) -> str:
    curves = []
    for number, size in enumerate(content.manifest.level_sizes[:_MAX_CHART_LEVELS]):
        counts_K = np.sort(np.bincount(content.rq_NL[:, number], minlength=size))[::-1]
        picked = np.unique(np.linspace(0, size - 1, _MAX_CURVE_POINTS).round().astype(np.int64))
        loads = counts_K[picked] * size / len(content.rq_NL)
        # Short, so that six names fit side by side.
        curves.append(Series(f"L{number + 1}", loads.tolist()))
    return load_chart(curves, x_label="codes, fullest first", y_label="load")


def _use_chart(levels: Sequence[Mapping[str, Any]]) -> str:
    used = [level["codebook_coverage"] * 100 for level in levels]
    even = [level["entropy_share"] * 100 for level in levels]
    return bar_chart(
        [str(number) for number in range(1, len(levels) + 1)],
        [
            Series("codes in use", used, [f"{value:.0f}" for value in used]),
            Series("entropy", even, [f"{value:.0f}" for value in even]),
        ],
        x_label="level",
        y_label="%",
        y_max=100,
    )


def _bucket_chart(rq_NL: Codes) -> str:
    counts_U = np.unique(rq_NL, axis=0, return_counts=True)[1]
    # Bin b holds the sizes 2^(b-1) + 1 ... 2^b.
    bins_U = np.ceil(np.log2(counts_U)).astype(np.int64)
    items = np.bincount(bins_U, weights=counts_U) / len(rq_NL) * 100
    buckets = np.bincount(bins_U)
    names = ["1", "2"] + [f"{2 ** (b - 1) + 1}-{2**b}" for b in range(2, len(buckets))]
    labels = [f"{count:,}" if count else "" for count in buckets.tolist()]
    return bar_chart(
        names[: len(buckets)],
        [Series("items", items.tolist(), labels)],
        x_label="items in the bucket",
        y_label="% of items",
    )


def _residual_chart(levels: Sequence[Mapping[str, Any]]) -> str:
    norms = [level["relative_residual_norm"] for level in levels]
    names = [str(number) for number in range(1, len(norms) + 1)]
    series = Series("left", norms, [f"{norm:.3f}" for norm in norms])
    return bar_chart(names, [series], x_label="level", y_label="residual norm", y_max=1.0)


def _cosine_chart(means: Sequence[float | None]) -> str:
    names = [str(number) for number in range(len(means))]
    values = [max(0.0, mean or 0.0) for mean in means]
    labels = ["no pair" if mean is None else f"{mean:.3f}" for mean in means]
    series = Series("cosine", values, labels)
    return bar_chart(
        names, [series], x_label="shared first levels", y_label="mean cosine", y_max=1.0
    )


def _behaviour_figure(behaviour: Mapping[str, Any]) -> str:
    levels = behaviour["levels"]
    title = "Neighbours by behaviour"
    if not levels:
        return _figure(title, "No user of the test period took two items with codes.", "")
    shares = [level["share"] * 100 for level in levels]
    chances = [level["chance"] * 100 for level in levels]
    lifts = ["" if level["lift"] is None else f"{level['lift']:.0f}{TIMES}" for level in levels]
    chart = bar_chart(
        [f"c1-c{n}" if n > 1 else "c1" for n in range(1, len(levels) + 1)],
        [
            Series("neighbours", shares, [f"{v:.1f}" for v in shares]),
            Series("chance", chances, [f"{v:.1g}" for v in chances]),
        ],
        x_label="prefix (times chance: " + ", ".join(lifts) + ")",
        y_label="% of pairs",
    )
    text = (
        f"Of {behaviour['num_pairs']:,} pairs that a user took one after the other in the test "
        "period, those that share a prefix; beside it, random pairs of equal popularity."
    )
    return _figure(title, text, chart)


def _level_table(quality: Mapping[str, Any]) -> str:
    head = "level|codes in use|dead|entropy, bits|of log2 K|perplexity|largest|Gini|MSE|residual"
    rows = [
        [
            str(number),
            f"{level['num_used']:,} / {level['codebook_size']:,}",
            f"{level['num_dead']:,}",
            f"{level['code_entropy_bits']:.2f}",
            _percent(level["entropy_share"]),
            f"{level['perplexity']:,.0f}",
            f"{level['largest_bucket']:,}",
            f"{level['gini']:.3f}",
            f"{level['quantization_mse']:.2e}",
            f"{level['relative_residual_norm']:.3f}",
        ]
        for number, level in enumerate(quality["levels"], start=1)
    ]
    vq = quality["vq"]
    return (
        f"<h2>Levels</h2>{_table(head.split('|'), rows)}"
        f'<p class="note">Full codes: {quality["num_unique_codes"]:,} different ones, '
        f"{quality['mean_items_per_shared_code']:.2f} items per shared one, HR@1 "
        f"{quality['hr1']:.3f}. VQ: {vq['num_used']:,} of {vq['codebook_size']:,} pool rows in "
        f"use, mean cosine of the first neighbour {vq['mean_cosine_first']:.3f}, of all "
        f"{vq['mean_cosine_all']:.3f}.</p>"
    )


def _continuity(manifest: Manifest) -> str:
    if manifest.parent is None:
        return ""
    figures = manifest.continuity
    kept, naive = figures["churn"], figures["naive_churn"]
    rows = [("full code", kept["full"], naive["full"])]
    # A prefix of one level is that level, and one of all levels is the full code.
    for n in range(2, len(kept["prefixes"])):
        rows.append((f"prefix of {n} levels", kept["prefixes"][n - 1], naive["prefixes"][n - 1]))
    for n, (one, other) in enumerate(zip(kept["levels"], naive["levels"], strict=True), start=1):
        rows.append((f"level {n}", one, other))
    rows.append(("VQ pool row", figures["pool"]["churn"], figures["pool"]["naive_churn"]))
    # Versions from before lists were kept do not say.
    if lists := figures.get("lists"):
        rows.append(("VQ list (beside: the nearest)", lists["churn"], lists["naive_churn"]))
    cells = [[name, _percent(one), _percent(other)] for name, one, other in rows]
    errors = (figures["quantization_mse"], figures["naive_quantization_mse"])
    cells.append(["MSE on training items", *(f"{error:.3e}" for error in errors)])
    table = _table(["changed since the parent", "this version", "naive refit"], cells, narrow=True)
    change = figures["quantization_mse"] / figures["naive_quantization_mse"] - 1
    served = manifest.caps.get("churn")
    after_cap = (
        '<p class="note">Measured before the cap; after it, as served, '
        f"{_percent(served['full'])} of full codes changed.</p>"
        if served
        else ""
    )
    is_matched = "matched" in figures["level_starts"]
    how = (
        "Of levels that could not go on from their old members, labels were only matched with the "
        "parent's."
        if is_matched
        else f"Hysteresis {figures['hysteresis']:g}, {figures['num_iterations']} k-means "
        "iterations per level."
    )
    goes_on = ", ".join(
        f"level {number}: {sum(code >= 0 for code in codes):,} of {len(codes):,}"
        for number, codes in enumerate(manifest.label_map or (), start=1)
    )
    return (
        f"<h2>Kept from {escape(manifest.parent)}</h2><p>"
        f"{figures['num_items']['compared']:,} items compared. Error on the training items "
        f"{change:+.1%} against the naive refit. {how}</p>{table}{after_cap}"
        f'<p class="note">Codes whose learnt row goes on: {goes_on}. Pool rows that start anew: '
        f"{len(manifest.reset_pool_rows):,} of {manifest.pool_size:,}.</p>"
    )


def _worst_buckets(buckets: Sequence[Mapping[str, Any]]) -> str:
    if not buckets:
        return "<h2>Worst buckets</h2><p>No two items share a full code.</p>"
    rows = []
    for bucket in buckets:
        titles = "".join(f"<li>{escape(title)}</li>" for title in bucket["titles"])
        rest = bucket["num_items"] - len(bucket["titles"])
        more = f"<li>and {rest:,} more</li>" if rest else ""
        code = "-".join(map(str, bucket["rq_code"]))
        cells = (f"<code>{code}</code>", f"{bucket['num_items']:,}", f"{bucket['mean_cosine']:.3f}")
        rows.append([*cells, f"<ul>{titles}{more}</ul>"])
    head = ["full code", "items", "mean cosine", "titles"]
    return (
        "<h2>Worst buckets</h2><p>The full codes that most items share. A high cosine: "
        f"near-copies, no harm done; a low one: codes run short.</p>{_table(head, rows)}"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], narrow: bool = False) -> str:
    """Return a table of ready HTML cells; the first and a last column of lists stand left."""

    def kind(column: int, cell: str) -> str:
        return ' class="left"' if column == 0 or cell.startswith("<ul") or cell == "titles" else ""

    def line(tag: str, cells: Sequence[str]) -> str:
        joined = "".join(f"<{tag}{kind(n, cell)}>{cell}</{tag}>" for n, cell in enumerate(cells))
        return f"<tr>{joined}</tr>"

    body = line("th", head) + "".join(line("td", cells) for cells in rows)
    style = ' style="max-width:560px"' if narrow else ""
    return f'<div class="panel scroll"{style}><table>{body}</table></div>'


def _tree_note(tree: Mapping[str, Any]) -> str:
    note = (
        "c1, then c1-c2, then items with the rest of their code; fullest first. The words beside a "
        "branch are those that tell its titles from the others."
    )
    if tree["num_listed"] == tree["num_items"]:
        return f"{note} All {tree['num_items']:,} items are listed."
    return (
        f"{note} {tree['num_listed']:,} of {tree['num_items']:,} items are listed: at most "
        f"{MAX_ITEMS_PER_PREFIX} per prefix, and of small prefixes the fullest; counts are of all."
    )


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")
