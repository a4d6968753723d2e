"""A judge of item pairs: a function of the user's own that says which pairs to keep.

It is named in ``qarm.yaml`` as ``alignment.pairs.judge: "package.module:function"``, gets tables of
at most ``PAIRS_PER_CALL`` pairs with the content of both items, and returns a bool per pair.
May import: pyarrow, numpy.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qarm_feast.errors import ConfigError, DataError
from qarm_feast.schema import ITEM_ID

PAIRS_PER_CALL = 8192
Judge = Callable[[pa.Table], Any]


def load_judge(name: str) -> Judge:
    """Return the function that ``package.module:function`` names.

    Args:
        name: Dotted path of a module on Python's path, a colon, a name in it.

    Returns:
        The function.

    Raises:
        ConfigError: If the module cannot be imported, or has no function of that name.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"alignment.pairs.judge is {name!r}, but {module_name} cannot be imported: {error}; "
            "install its package, or put its folder on PYTHONPATH"
        ) from error
    judge = getattr(module, attribute, None)
    if not callable(judge):
        raise ConfigError(
            f"alignment.pairs.judge is {name!r}, but {module_name} ({module.__file__}) has no "
            f"function {attribute!r}"
        )
    return judge  # type: ignore[no-any-return]  # what the user's function takes is in our words


def judge_pairs(judge: Judge, pairs: pa.Table, items: pa.Table) -> np.ndarray:
    """Return which pairs the judge keeps.

    Args:
        judge: Called with the columns of ``pairs``, and those of ``items`` (but its id) twice:
            ``trigger_title``, ``target_title`` and so on.
        pairs: Rows of ``PAIR_ROWS``.
        items: The catalogue.

    Returns:
        Bool, one per pair.

    Raises:
        DataError: If the judge returns anything but one bool per pair.
    """
    content = items.drop_columns([ITEM_ID])
    # Of all pairs at once: each call would index the whole catalogue anew.
    rows = {
        side: pc.index_in(pairs[f"{side}_item_id"], items[ITEM_ID].combine_chunks())
        for side in ("trigger", "target")
    }
    masks = [np.zeros(0, dtype=bool)]
    for first in range(0, pairs.num_rows, PAIRS_PER_CALL):
        batch = pairs.slice(first, PAIRS_PER_CALL)
        for side, rows_of_side in rows.items():
            of_side = content.take(rows_of_side.slice(first, PAIRS_PER_CALL))
            for column in of_side.column_names:
                batch = batch.append_column(f"{side}_{column}", of_side[column])
        masks.append(_mask(judge(batch), batch.num_rows))
    return np.concatenate(masks)


def _mask(answer: Any, num_pairs: int) -> np.ndarray:
    is_arrow = isinstance(answer, pa.Array | pa.ChunkedArray)
    mask = answer.to_numpy(zero_copy_only=False) if is_arrow else np.asarray(answer)
    if mask.dtype != np.bool_ or mask.shape != (num_pairs,):
        raise DataError(
            f"alignment.pairs.judge returned {mask.dtype} of shape {mask.shape} for {num_pairs} "
            f"pairs; it must return {num_pairs} bools, True for a pair to keep"
        )
    return mask
