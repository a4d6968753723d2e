"""Stage "score": one user's candidates, scored from the online store, the best ten with codes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from examples.quickstart.layout import RunLayout
from examples.quickstart.processes import Processes
from qarm_feast.config import load_section
from qarm_feast.input_data import DataConfig, InputData, load_input_data
from qarm_feast.reader import CodeReader
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import ITEM_ID, USER_ID

_NUM_CANDIDATES = 1000
_NUM_SHOWN = 10
_TITLE_WIDTH = 48
_NUM_NEIGHBORS_SHOWN = 3


def run_score(
    layout: RunLayout,
    processes: Processes,
    bin_dir: Path,
    codebook_version: str,
    show: Callable[[str], None],
) -> dict[str, Any]:
    """Score up to 1000 items that the user has not met, through ``qarm-rank score``."""
    input_data = load_input_data(load_section(layout.config_path, "data", DataConfig))
    user_id = _typical_user(input_data)
    candidates = _candidates(input_data, user_id)
    command = [str(bin_dir / "qarm-rank"), "score", "--config", str(layout.config_path)]
    ids = ",".join(str(item_id) for item_id in candidates)
    output = processes.run("rank-score", [*command, "--user-id", str(user_id), "--items", ids])
    scored = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    task = next(iter(scored[0]["scores"]))
    best = sorted(scored, key=lambda entry: -entry["scores"][task])[:_NUM_SHOWN]
    show(f"user {user_id}: best {len(best)} of {len(candidates):,} candidates by {task}")
    lines = _lines(layout, input_data, codebook_version, best, task)
    for line in lines:
        show(line)
    return {"user_id": user_id, "top": lines}


def _typical_user(input_data: InputData) -> int:
    """Return the user whose number of train positives is the median."""
    counts = pc.value_counts(input_data.train_positives()[USER_ID])
    ordered = sorted(counts.to_pylist(), key=lambda entry: (entry["counts"], entry["values"]))
    user_id: int = ordered[len(ordered) // 2]["values"]
    return user_id


def _candidates(input_data: InputData, user_id: int) -> list[int]:
    train = input_data.train_interactions()
    met = train.filter(pc.equal(train[USER_ID], user_id))[ITEM_ID]
    newest_first = input_data.items.sort_by([("upload_timestamp", "descending")])[ITEM_ID]
    is_new = pc.invert(pc.is_in(newest_first, met.combine_chunks()))
    item_ids: list[int] = newest_first.filter(is_new)[:_NUM_CANDIDATES].to_pylist()
    return item_ids


def _lines(
    layout: RunLayout,
    input_data: InputData,
    codebook_version: str,
    best: list[dict[str, Any]],
    task: str,
) -> list[str]:
    ids_N = np.array([entry["item_id"] for entry in best], dtype=np.int64)
    reader = CodeReader(open_feature_store(layout.repo_dir), codebook_version)
    codes, _ = reader.read_codes(ids_N)
    titles = _titles(input_data, ids_N)
    lines = [f"{task:>7}  {'title':<{_TITLE_WIDTH}}  {'RQ code':<28}  VQ code"]
    for row, entry in enumerate(best):
        rq = "-".join(str(code) for code in codes.rq_NL[row])
        vq = ", ".join(str(code) for code in codes.vq_NV[row, :_NUM_NEIGHBORS_SHOWN])
        title = titles[row][:_TITLE_WIDTH]
        lines.append(f"{entry['scores'][task]:7.4f}  {title:<{_TITLE_WIDTH}}  {rq:<28}  {vq}, …")
    return lines


def _titles(input_data: InputData, ids_N: np.ndarray) -> list[str]:
    items = input_data.items
    if "title" not in items.column_names:
        return [f"item {item_id}" for item_id in ids_N]
    rows = pc.index_in(pa.array(ids_N), items[ITEM_ID].combine_chunks())
    return [title or "" for title in items["title"].take(rows).to_pylist()]
