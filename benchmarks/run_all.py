"""Run every benchmark with ``--quick`` and print one table: figure, value, target, whether met.

    uv run --frozen --extra cpu python benchmarks/run_all.py [--data DIR]

A benchmark is a script beside this one whose last line of output is a JSON object with
``benchmark``, ``figures`` and ``targets``; the other files here are parts of them. Figures without
a target are counted, not listed. Progress goes to stderr. A missed target is shown; the exit status
tells only whether all ran.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
COLUMNS = "{:<18}{:<42}{:>12}{:>14}  {}"
PASSES_TARGET = {
    "le": lambda value, limit: value <= limit,
    "ge": lambda value, limit: value >= limit,
}
SIGNS = {"le": "<=", "ge": ">="}


def main() -> None:
    """Run all benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="Folder in the input contract; default: ML-100K.")
    data = parser.parse_args().data
    lines, failed = [], []
    for script in benchmark_scripts():
        print(f"== {script.name}", file=sys.stderr, flush=True)
        status, output = run(script, data)
        if status:
            failed.append(script.name)
            lines.append(
                COLUMNS.format(script.stem, f"ended with status {status}", "", "", "FAILED")
            )
        else:
            lines += table_lines(json.loads(output.splitlines()[-1]))
    print(COLUMNS.format("benchmark", "figure", "value", "target", "met"))
    print("\n".join(lines))
    if failed:
        sys.exit(f"did not run: {', '.join(failed)}")


def benchmark_scripts() -> list[Path]:
    """Return the scripts of this folder that print a result, by name."""
    paths = sorted(set(FOLDER.glob("*.py")) - {Path(__file__).resolve()})
    return [path for path in paths if '"benchmark":' in path.read_text("utf-8")]


def run(script: Path, data: str | None) -> tuple[int, str]:
    """Return exit status and output of one benchmark; its last line is the result."""
    # One that makes its own vectors has no use for a data folder.
    takes_data = data is not None and '"--data"' in script.read_text("utf-8")
    command = [sys.executable, "-W", "ignore", str(script), "--quick"]
    command += ["--data", str(data)] if takes_data else []
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return finished.returncode, finished.stdout


def table_lines(result: dict[str, Any]) -> list[str]:
    """Return one line per target, and one that says how many figures have none."""
    name, figures, targets = result["benchmark"], result["figures"], result["targets"]
    lines = [_line(name, figure, figures.get(figure), target) for figure, target in targets.items()]
    num_others = len(figures.keys() - targets.keys())
    note = f"{num_others} more, on {result['device']}"
    return [*lines, COLUMNS.format(name, note, "", "", "")]


def _line(name: str, figure: str, value: float | None, target: dict[str, Any]) -> str:
    limit = f"{SIGNS[target['op']]} {target['value']:g}"
    if value is None:
        return COLUMNS.format(name, figure, "-", limit, "not measured in this run")
    is_met = PASSES_TARGET[target["op"]](value, target["value"])
    return COLUMNS.format(name, figure, f"{value:.4g}", limit, "yes" if is_met else "MISSED")


if __name__ == "__main__":
    main()
