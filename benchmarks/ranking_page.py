"""The page of ``ranking_quality.py``: differences with intervals as a plot, all AUCs as a table.

One file without any outside resource, in the style of the codebook's quality page.
"""

from collections.abc import Mapping, Sequence, Set
from html import escape
from typing import Any

import numpy as np

from benchmarks.ranking_arms import ID, RQ, VQ, all_arms, tuned
from benchmarks.ranking_runs import Run
from qarm_feast.quality_page.intervals import Interval, html_page, interval_plot
from torchrec_models.slices import SLICES

MOST_LEFT = -0.05
"""Left end of a plot: an arm far below would press all others together."""
PART_PREFIX = "worth_of_"
NAMED_DIFFERENCES = {
    "full_minus_fixed": "full less fixed",
    "trainable_minus_frozen": "trained less frozen codes",
    "aligned_minus_raw_codes": "aligned less raw codes",
}
CODE_FEATURES = {"code_cf", "cross", *RQ, *VQ}
"""Of these each arm that depends on codes reads one."""


def ranking_page(result: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """Return a result and its runs as a whole HTML document.

    Args:
        result: What the benchmark prints.
        runs: Every run, for seconds and AUCs on valid rows.
    """
    settings, tasks = result["settings"], result["tasks"]
    body = [
        f"<h1>Ranking quality: {escape(settings['data'])}</h1>",
        f"<p>Seeds per arm: {settings['seeds']}, paired. {_part_of(settings)}Intervals are 95 %, "
        "users of the test rows drawn with replacement; a plot's left end is cut at "
        f"{MOST_LEFT:g}. Arms, tuning and slices: benchmarks/ranking_protocol.md.</p>",
        _cards(result),
    ]
    for task, figures in tasks.items():
        if named := _named_lines(figures):
            body += [
                f"<h2>{escape(task)}: what codes, their training and alignment are worth</h2>",
                _plot(named, "difference in AUC, all rows and by train positives of the item"),
            ]
        body += [
            f"<h2>{escape(task)}: arms against ID + fixed vector</h2>",
            _plot(_lines(figures, "", "_minus_fixed_auc"), "AUC less that of arm fixed"),
        ]
        if parts := _lines(figures, PART_PREFIX, "_auc"):
            body += [
                f"<h2>{escape(task)}: what the full model loses without a part</h2>",
                _plot(parts, "AUC of arm full less that without the part"),
            ]
        body += [f"<h2>{escape(task)}: all arms</h2>", _table(task, figures, runs)]
    body += ["<h2>What the arms are</h2>", _arms_table({run.arm for run in runs})]
    title = f"Ranking quality: {settings['data']}"
    return html_page(title, body, ".arms td { white-space: normal; }")


def _part_of(settings: Mapping[str, Any]) -> str:
    if (moved := settings["moved_back"]) is not None:
        return f"Moved back: trained on the oldest {100 * moved:g} % of the train rows. "
    share = settings["train_share"]
    return f"Train rows of {100 * share:g} % of their users. " if share < 1 else ""


def _cards(result: Mapping[str, Any]) -> str:
    figures = result["figures"]
    cards = []
    for name, target in result["targets"].items():
        if name not in figures:
            continue
        is_met = figures[name] >= target["value"]
        kind, word = ("kept", "met") if is_met else ("missed", "missed")
        chip = f'<span class="chip {kind}">{word}: target ≥ {target["value"]:g}</span>'
        title = escape(name.replace("_", " "))
        cards.append(
            f'<div class="card"><span>{title}</span><b>{figures[name]:+.4f}</b>{chip}</div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _lines(figures: Mapping[str, float], prefix: str, suffix: str) -> list[Interval]:
    """Return the differences of just this kind, slices left out, greatest first."""
    lines = []
    for key, value in figures.items():
        name = key.removeprefix(prefix).removesuffix(suffix)
        if key != f"{prefix}{name}{suffix}" or f"{key}_low" not in figures:
            continue
        if any(name.endswith(f"_{part}") for part in SLICES):
            continue
        lines.append(Interval(name, value, figures[f"{key}_low"], figures[f"{key}_high"]))
    return sorted(lines, key=lambda line: -line.value)


def _named_lines(figures: Mapping[str, float]) -> list[Interval]:
    """Return the differences that the benchmark is about, of all rows and of each slice."""
    lines = []
    for name, title in NAMED_DIFFERENCES.items():
        for part in ("", *SLICES):
            key = f"{name}_{part}_auc" if part else f"{name}_auc"
            if f"{key}_low" in figures:
                shown = f"· {part}" if part else title
                lines.append(
                    Interval(shown, figures[key], figures[f"{key}_low"], figures[f"{key}_high"])
                )
    return lines


def _arms_table(names: Set[str]) -> str:
    """Return what each arm reads beside the arm ``id``, and the settings that it chose."""
    lines = ["".join(f'<th class="left">{name}</th>' for name in ("arm", "codes", "reads", "set"))]
    for arm in all_arms(has_third_party_codes=True):
        if arm.name not in names:
            continue
        own = [name for name in arm.features if name not in ID]
        reads = ", ".join(["id's", *own] if own else ID)
        chosen = {**tuned(arm.name), **arm.overrides}
        settings = ", ".join(f"{key} {value}" for key, value in chosen.items())
        codes = arm.codes if CODE_FEATURES & set(own) else "-"
        cells = [arm.name, codes, reads, settings]
        lines.append("".join(f'<td class="left">{escape(cell)}</td>' for cell in cells))
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="panel scroll"><table class="arms">{rows}</table></div>'


def _plot(lines: Sequence[Interval], x_label: str) -> str:
    return interval_plot(lines, x_label, MOST_LEFT)


def _table(task: str, figures: Mapping[str, float], runs: Sequence[Run]) -> str:
    head = ["arm", "AUC", *SLICES, "less fixed", "95 % interval", "valid AUC", "steps", "seconds"]
    lines = ["".join(f"<th{_left(name)}>{name}</th>" for name in head)]
    for arm in sorted({run.arm for run in runs}, key=lambda arm: -figures[f"auc_{arm}"]):
        own = [run for run in runs if run.arm == arm]
        valid = [run.valid_metrics.get(_valid_key(task), np.nan) for run in own]
        cells = [
            escape(arm),
            f"{figures[f'auc_{arm}']:.4f}",
            *(_shown(figures, f"{part}_auc_{arm}", "{:.4f}") for part in SLICES),
            _shown(figures, f"{arm}_minus_fixed_auc", "{:+.4f}"),
            _interval(figures, f"{arm}_minus_fixed_auc"),
            f"{np.mean(valid):.4f}",
            f"{np.mean([run.num_steps for run in own]):.0f}",
            f"{np.mean([run.seconds for run in own]):.1f}",
        ]
        lines.append("".join(f"<td{_left(head[n])}>{cell}</td>" for n, cell in enumerate(cells)))
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="panel scroll"><table>{rows}</table></div>'


def _valid_key(label_name: str) -> str:
    return f"auc/{label_name.removeprefix('is_')}"


def _left(name: str) -> str:
    return ' class="left"' if name == "arm" else ""


def _interval(figures: Mapping[str, float], key: str) -> str:
    if f"{key}_low" not in figures:
        return "-"
    return f"{figures[f'{key}_low']:+.4f} … {figures[f'{key}_high']:+.4f}"


def _shown(figures: Mapping[str, float], key: str, form: str) -> str:
    return form.format(figures[key]) if key in figures else "-"
