"""What the main job prints at its end: the table of arms, seconds per stage, and places."""

import statistics
from typing import Any

from examples.quickstart.layout import RunLayout, StageRecord

_MEASURES = ("auc", "gauc", "uauc")
_COLD_PREFIX = "cold_"


def print_report(layout: RunLayout, record: StageRecord) -> None:
    """Print the comparison as mean ± standard deviation over seeds, then times and places."""
    compared = record.result("compare")
    scored = record.result("score")
    assert compared is not None, "the report follows the last stage"
    assert scored is not None, "the report follows the last stage"
    print(f"\nUser {scored['user_id']}, scored from the online store:")
    for line in scored["top"]:
        print(f"  {line}")
    _print_arms(compared["comparison"]["runs"])
    _print_seconds(record.seconds)
    _print_places(layout)


def _print_arms(runs: list[dict[str, Any]]) -> None:
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    seeds = {run["seed"] for run in runs}
    print(f"\nTest rows, mean ± standard deviation over {len(seeds)} seeds (no arm was tuned):")
    print(f"  {'task':<8}{'items':<6}{'measure':<8}" + "".join(f"{arm:>20}" for arm in arms))
    for key in runs[0]["metrics"]:
        name, _, task = key.partition("/")
        measure = name.removeprefix(_COLD_PREFIX)
        if measure not in _MEASURES:
            continue
        items = "cold" if name.startswith(_COLD_PREFIX) else "all"
        cells = [_cell([r["metrics"][key] for r in runs if r["arm"] == arm]) for arm in arms]
        row = f"  {task:<8}{items:<6}{measure.upper():<8}"
        print(row + "".join(f"{cell:>20}" for cell in cells))
    counts = runs[0]["metrics"]
    print(f"  {counts['rows']:,.0f} rows, {counts['cold_rows']:,.0f} of them of cold items")


def _cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "no both classes"
    spread = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{statistics.mean(known):.4f} ± {spread:.4f}"


def _print_seconds(seconds: dict[str, float]) -> None:
    print("\nSeconds per stage:")
    for name, value in seconds.items():
        print(f"  {name:<12} {value:7.1f}")
    print(f"  {'total':<12} {sum(seconds.values()):7.1f}")


def _print_places(layout: RunLayout) -> None:
    print("\nArtifacts:")
    for name, folder in (
        ("input data", layout.input_dir),
        ("encoder", layout.data_dir / "encoders"),
        ("aligned vectors", layout.data_dir / "vectors"),
        ("codebooks", layout.data_dir / "codebooks"),
        ("offline store", layout.data_dir / "offline"),
        ("online store", layout.data_dir / "online.db"),
        ("Feast registry", layout.data_dir / "registry.db"),
        ("training rows", layout.data_dir / "rows"),
        ("checkpoints", layout.data_dir / "checkpoints"),
        ("logs", layout.log_dir),
    ):
        print(f"  {name:<16} {folder}")
    print(f"\nNext: feast -c {layout.repo_dir} feature-views list")
