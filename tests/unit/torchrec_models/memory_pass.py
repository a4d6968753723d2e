"""Reads generated rows: `FOLDER NUM_ROWS MORE_ROWS`.

Prints the peak resident bytes after reading the first number of rows and after the second, and the
bytes of memory that the difference takes as a whole.
"""

import resource
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from synthetic import write_synthetic_rows
from test_dataset import make_dataset

from torchrec_models.config import RankerConfig
from torchrec_models.dataset import RowDataset
from torchrec_models.sharding import Ranks

ROWS_PER_GROUP = 4096


def main() -> None:
    folder, num_rows, more_rows = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    inputs = write_synthetic_rows(folder)
    rows = pq.read_table(inputs.store.split_path("train"))
    part = pa.concat_tables([rows] * (ROWS_PER_GROUP // len(rows) + 1)).slice(0, ROWS_PER_GROUP)
    dataset = make_dataset(inputs, "train", RankerConfig(batch_size=1024), Ranks(0, 1))
    dataset = replace(dataset, num_workers=2)
    peaks = [_peak_of_a_pass(dataset, part, folder, number) for number in (num_rows, more_rows)]
    num_bytes = part.nbytes // ROWS_PER_GROUP * (more_rows - num_rows)
    sys.stdout.write(f"{peaks[0]} {peaks[1]} {num_bytes}\n")


def _peak_of_a_pass(dataset: RowDataset, part: pa.Table, folder: Path, num_rows: int) -> int:
    path = folder / f"{num_rows}.parquet"
    with pq.ParquetWriter(path, part.schema) as writer:
        for _ in range(num_rows // ROWS_PER_GROUP):
            writer.write_table(part, row_group_size=ROWS_PER_GROUP)
    batches = replace(dataset, path=path).train_batches(
        seed=0, epoch=0, window_rows=2 * ROWS_PER_GROUP
    )
    for _ in batches:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
