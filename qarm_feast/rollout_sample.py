"""A sample of the items of one version's view, held against the rows of another version.

For each item that the old view holds online, the new one must hold a row: of the same content
event or a later one, taken down where the old one is taken down. Where a vector of the row's very
content is at hand (exported, or sent ready and kept in the content log), the codes must be those
that the codebook gives for it.

Shape letters in this file: N items, D embedding width.
May import: feast, pyarrow, the codebook.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.dataset as pads
from feast import FeatureStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.code_log import CodeLog
from qarm_feast.codebook import Codebook, ItemIds
from qarm_feast.codebook_config import CodebookConfig
from qarm_feast.config import load_section
from qarm_feast.offline_store import open_code_log
from qarm_feast.quantizers.base import Embeddings
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import CONTENT_LOG, ITEM_ID, code_view_name
from qarm_feast.vector_files import VectorFiles

SAMPLE_SIZE = 10_000
MAX_OTHER_CODES_SHARE = 0.001
"""Vectors that were made from content in another batch may fall on the other side of a border:
fixed padding keeps the share of such items below this. Ready vectors give equal codes."""

_KEYS_PER_READ = 1000
_NUM_LOOKS = 5
_PAUSE_SECONDS = 1.0
_NUM_EXAMPLES = 5
_FEATURES = ("is_deleted", "content_hash", "rq_code", "vq_code")
_EMBEDDING = "embedding"

Content = tuple[int, str]
"""Item and content hash."""
Vectors = Mapping[Content, Embeddings]


class StoredRow(NamedTuple):
    """A row of codes as the online store has it, takedowns too."""

    event_timestamp: datetime
    is_deleted: bool
    content_hash: str
    codes: tuple[int, ...]


Rows = Mapping[int, StoredRow]


@dataclass(frozen=True)
class Comparison:
    """How many of ``num_items`` rows of the old view are wrong in the new one, and how.

    ``num_coded`` rows had a vector at hand, the codes of ``num_other_codes`` are others;
    ``examples`` are items that are wrong, a few of each kind.
    """

    num_items: int
    num_missing: int
    num_older: int
    num_other_flags: int
    num_coded: int
    num_other_codes: int
    examples: tuple[int, ...] = ()

    def faults(self) -> list[str]:
        """Return what is wrong, each with its figure and its limit; none: all is right."""
        counts = {
            "have no row in it": self.num_missing,
            "have a row of an older event in it": self.num_older,
            "are taken down in one of the two only": self.num_other_flags,
        }
        faults = [
            f"{n} of {self.num_items} items {what}, limit 0" for what, n in counts.items() if n
        ]
        share = self.num_other_codes / max(1, self.num_coded)
        if share > MAX_OTHER_CODES_SHARE:
            faults.append(
                f"{self.num_other_codes} of {self.num_coded} items ({share:.2%}) have other codes "
                f"than the codebook gives, limit {MAX_OTHER_CODES_SHARE:.2%}"
            )
        if faults and self.examples:
            faults.append(f"items among them: {', '.join(map(str, self.examples))}")
        return faults

    def __str__(self) -> str:
        return (
            f"{self.num_items} items compared: {self.num_missing} missing, {self.num_older} older, "
            f"{self.num_other_flags} with another takedown flag; of {self.num_coded} with a vector "
            f"at hand {self.num_other_codes} with other codes"
        )


def compare_versions(
    config_path: str | Path, version: str, previous: str, sample_size: int = SAMPLE_SIZE
) -> Comparison:
    """Hold the new version's rows online against the old one's; nothing is written.

    Args:
        config_path: Path of ``qarm.yaml``.
        version: The new version.
        previous: The old one.
        sample_size: Most items to compare, drawn from those in the old version's log.

    Returns:
        The counts.

    Raises:
        ConfigError: If the online store has no view of a version.
        CodebookError: If the new codebook is damaged.
        ServiceUnavailableError: If the store does not answer.
    """
    store = open_feature_store(Path(config_path).resolve().parent)
    log = open_code_log(store.config)
    codebook = Codebook.load(load_section(config_path, "codebook", CodebookConfig).uri, version)
    item_ids_N = sample_items(log, previous, sample_size)
    rows, faults = compare_rows(
        lambda ids: (read_rows(store, previous, ids), read_rows(store, version, ids)),
        item_ids_N.tolist(),
    )
    folder = Path(load_section(config_path, "alignment", AlignmentConfig).vectors_uri)
    encoder_version = codebook.manifest.encoder_version
    vectors = read_vectors(log, folder / encoder_version, encoder_version, item_ids_N)
    num_coded, others = find_other_codes(codebook, rows, vectors)
    counts = Counter(faults.values())
    return Comparison(
        num_items=len(rows) + counts["missing"],
        num_missing=counts["missing"],
        num_older=counts["older"],
        num_other_flags=counts["flag"],
        num_coded=num_coded,
        num_other_codes=len(others),
        examples=(*sorted(faults)[:_NUM_EXAMPLES], *others[:_NUM_EXAMPLES]),
    )


def sample_items(log: CodeLog, version: str, sample_size: int, seed: int = 0) -> ItemIds:
    """Return some of the items that a version's log names, each once; all of them if they are few.

    Part by part, in memory for the sample and one part.

    Args:
        log: The offline logs.
        version: Codebook version.
        sample_size: How many at most.
        seed: Which ones.

    Returns:
        Item ids, int64, ascending.
    """
    name = code_view_name(version)
    kept_N = np.empty(0, dtype=np.int64)
    if not log.exists(name):
        return kept_N
    for table in log.tables(name, [ITEM_ID]):
        ids_N = np.union1d(kept_N, table[ITEM_ID].to_numpy())
        # Of a hash the least ones: an order of the parts and repeated rows change nothing.
        kept_N = ids_N[np.argsort(_hashes(ids_N, seed), kind="stable")[:sample_size]]
    return np.sort(kept_N)


def _hashes(ids_N: ItemIds, seed: int) -> npt.NDArray[np.uint64]:
    """Return 64 mixed bits per id (the finalizer of SplitMix64, a bijection)."""
    mixed_N = ids_N.view(np.uint64) + np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed_N = (mixed_N ^ (mixed_N >> np.uint64(shift))) * np.uint64(factor)
    return mixed_N


def compare_rows(
    read: Callable[[Sequence[int]], tuple[Rows, Rows]],
    item_ids: Sequence[int],
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[dict[int, StoredRow], dict[int, str]]:
    """Return the new rows of items that the old view holds, and what is wrong with which item.

    A worker writes one view after the other, so what looks wrong is looked at again.

    Args:
        read: Gives the old and the new rows of items.
        item_ids: The sample.
        sleep: Waits between two looks.

    Returns:
        Rows of the new view by item; and per item ``missing``, ``older`` or ``flag``.
    """
    rows: dict[int, StoredRow] = {}
    faults: dict[int, str] = {}
    suspects = list(item_ids)
    for look in range(_NUM_LOOKS):
        if look:
            sleep(_PAUSE_SECONDS)
        old, new = read(suspects)
        rows |= {item: new[item] for item in old if item in new}
        found = {item: _fault(row, new.get(item)) for item, row in old.items()}
        faults = {item: fault for item, fault in found.items() if fault is not None}
        suspects = list(faults)
        if not suspects:
            break
    return rows, faults


def _fault(old: StoredRow, new: StoredRow | None) -> str | None:
    if new is None:
        return "missing"
    if new.is_deleted != old.is_deleted:
        return "flag"
    return "older" if new.event_timestamp < old.event_timestamp else None


def read_rows(store: FeatureStore, version: str, item_ids: Sequence[int]) -> dict[int, StoredRow]:
    """Return what the online store holds of items, as Feast's own reader gives it.

    Args:
        store: The feature repository.
        version: Codebook version.
        item_ids: Items, each once.

    Returns:
        Rows by item; of codes first those of RQ, then those of VQ.
    """
    view, online = store.get_feature_view(code_view_name(version)), store.provider.online_store
    rows: dict[int, StoredRow] = {}
    for start in range(0, len(item_ids), _KEYS_PER_READ):
        part = item_ids[start : start + _KEYS_PER_READ]
        keys = [
            EntityKey(join_keys=[ITEM_ID], entity_values=[Value(int64_val=item)]) for item in part
        ]
        # Feast's redis store adds to the list of names that it is given.
        found = online.online_read(store.config, view, keys, [*_FEATURES])
        for item, (moment, values) in zip(part, found, strict=True):
            # Redis reads an absent row as unset values.
            if values and all(value.WhichOneof("val") for value in values.values()):
                codes = (
                    *values["rq_code"].int64_list_val.val,
                    *values["vq_code"].int64_list_val.val,
                )
                flag, text = values["is_deleted"].bool_val, values["content_hash"].string_val
                rows[item] = StoredRow(moment, flag, text, codes)
    return rows


def read_vectors(
    log: CodeLog, folder: Path, encoder_version: str, item_ids_N: ItemIds
) -> dict[Content, Embeddings]:
    """Return the vectors of items that are stored: exported ones, and ready ones that events bore.

    Args:
        log: The offline logs.
        folder: Vectors that `qarm align export` wrote; it need not exist.
        encoder_version: The encoder that they must come from.
        item_ids_N: The items.

    Returns:
        Vectors, float32 ``[D]``, by item and content hash; of an item there may be several.
    """
    vectors: dict[Content, Embeddings] = {}
    if any(folder.glob("*.parquet")):
        files = VectorFiles.open(folder).only(item_ids_N)
        if len(files.item_ids()):
            stored = files.read()
            contents = zip(stored.item_ids_N.tolist(), stored.content_hashes_N, strict=True)
            vectors |= dict(zip(contents, stored.x_ND, strict=True))
    if log.exists(CONTENT_LOG):
        is_wanted = pads.field(ITEM_ID).isin(item_ids_N) & pads.field(_EMBEDDING).is_valid()
        is_wanted &= pads.field("encoder_version") == encoder_version
        table = log.read(CONTENT_LOG, [ITEM_ID, "content_hash", _EMBEDDING], is_wanted)
        for row in table.to_pylist():
            vector_D = np.array(row[_EMBEDDING], dtype=np.float32)
            vectors[row[ITEM_ID], row["content_hash"]] = vector_D
    return vectors


def find_other_codes(codebook: Codebook, rows: Rows, vectors: Vectors) -> tuple[int, list[int]]:
    """Return how many rows have a vector of their content at hand, and which have other codes.

    Args:
        codebook: The codebook of the rows.
        rows: Rows by item.
        vectors: Vectors by item and content hash.

    Returns:
        The count and the items; takedowns have no codes and are not counted.
    """
    items = [item for item, row in rows.items() if (item, row.content_hash) in vectors]
    items = [item for item in items if not rows[item].is_deleted]
    if not items:
        return 0, []
    hashes = [rows[item].content_hash for item in items]
    x_ND = np.stack([vectors[content] for content in zip(items, hashes, strict=True)])
    codes = codebook.encode(np.array(items, dtype=np.int64), hashes, x_ND)
    expected = np.hstack([codes.rq_NL, codes.vq_NV]).tolist()
    pairs = zip(items, expected, strict=True)
    return len(items), [item for item, wanted in pairs if list(rows[item].codes) != wanted]
