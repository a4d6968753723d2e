"""The prefix tree that the quality page lets one browse: c1, c1c2, items; bounded in size.

Shape letters in this file: N items, L levels.
May import: NumPy.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qarm_feast.quantizers.base import Codes

MAX_ITEMS = 6000
"""Most items that the page lists in its tree."""
MAX_ITEMS_PER_PREFIX = 8
MAX_TITLE_LENGTH = 90
NUM_WORDS = 4
_Item = tuple[int, str, str]
_Prefix = tuple[int, int, list[_Item]]
_WORD = re.compile(r"[^\W\d_]{3,}")


def prefix_tree(
    item_ids_N: npt.NDArray[np.int64], rq_NL: Codes, titles_N: Sequence[str]
) -> dict[str, Any]:
    """Return the tree of codes, the fullest branches first.

    Every c1 in use is there; each lists its fullest prefixes and a few items of them, as many as
    its share of ``MAX_ITEMS`` allows (at least one), so that the page stays small.

    Args:
        item_ids_N: The items.
        rq_NL: Their codes.
        titles_N: Their titles.

    Returns:
        ``num_items``, ``num_listed`` and ``branches``: tuples of code, number of items, words that
        tell the branch from others, number of its prefixes, and the listed prefixes (code, number
        of items, items as tuples of id, title and the rest of the code). A codebook of one level
        has a single prefix per branch.
    """
    words_N = [sorted(set(_WORD.findall(title.lower()))) for title in titles_N]
    in_all = Counter(word for words in words_N for word in words)
    second_N = rq_NL[:, 1] if rq_NL.shape[1] > 1 else np.zeros(len(rq_NL), dtype=np.int64)
    branches: list[tuple[int, int, list[str], int, list[_Prefix]]] = []
    for rows in _groups(rq_NL[:, 0]):
        budget = max(1, MAX_ITEMS * len(rows) // len(rq_NL))
        prefixes: list[_Prefix] = []
        groups = [rows[group] for group in _groups(second_N[rows])]
        for group in groups:
            if budget <= 0:
                break
            listed = group[: min(budget, MAX_ITEMS_PER_PREFIX)]
            budget -= len(listed)
            items = [_item(row, item_ids_N, rq_NL, titles_N) for row in listed.tolist()]
            prefixes.append((int(second_N[group[0]]), len(group), items))
        words = _telling_words([words_N[row] for row in rows.tolist()], in_all, len(words_N))
        branches.append((int(rq_NL[rows[0], 0]), len(rows), words, len(groups), prefixes))
    num_listed = sum(len(prefix[2]) for branch in branches for prefix in branch[4])
    return {"num_items": len(rq_NL), "num_listed": num_listed, "branches": branches}


def _groups(codes_N: Codes) -> list[npt.NDArray[np.int64]]:
    """Return the rows of each code, the fullest code first, of equal ones the lowest."""
    order_N = np.argsort(codes_N, kind="stable")
    starts = np.flatnonzero(np.diff(codes_N[order_N])) + 1
    groups = np.split(order_N, starts)
    return sorted(groups, key=lambda rows: -len(rows))


def _item(
    row: int, item_ids_N: npt.NDArray[np.int64], rq_NL: Codes, titles_N: Sequence[str]
) -> _Item:
    rest = "-".join(map(str, rq_NL[row, 2:].tolist()))
    return int(item_ids_N[row]), titles_N[row][:MAX_TITLE_LENGTH], rest


def _telling_words(
    words: Sequence[Sequence[str]], in_all: Counter[str], num_items: int
) -> list[str]:
    """Return words that stand in many of these titles and in few others: count x log lift."""
    inside = Counter(word for each in words for word in each)

    def score(word: str) -> float:
        lift = inside[word] / len(words) * num_items / in_all[word]
        return float(inside[word] * np.log(lift))

    ranked = sorted(inside, key=lambda word: (-score(word), word))
    return [word for word in ranked[:NUM_WORDS] if score(word) > 0]
