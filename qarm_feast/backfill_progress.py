"""How far a backfill has come: one small file per version, replaced as a whole.

``<offline root>/.backfill/<version>.json`` is written after the stores are, so a kill in between
repeats a piece and never skips one. May import: pydantic.
"""

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from qarm_feast.artifact import replace_file
from qarm_feast.backfill_parts import Offsets, Source
from qarm_feast.errors import DataError
from qarm_feast.object_store import Place

_FOLDER = ".backfill"
"""Hidden, as no log's name is."""


class _Content(BaseModel):
    """What the file holds; sources are written ``topic:partition``, ends are exclusive."""

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = 1
    codebook_version: str
    is_finished: bool = False
    ends: dict[str, int] = {}
    done: list[str] = []


class BackfillProgress:
    """What is done of one version's backfill.

    ``done`` are names of pieces, see ``backfill_parts``; they outlive no compaction, the ends do:
    below them every offset is done. :meth:`finish` moves the ends to where the pieces reached.

    Args:
        root: Folder of the logs.
        codebook_version: The version that is filled.
    """

    def __init__(self, root: Place, codebook_version: str) -> None:
        self.path = progress_path(root, codebook_version)
        self._content = self._read(codebook_version)

    @property
    def done(self) -> frozenset[str]:
        """Names of pieces."""
        return frozenset(self._content.done)

    @property
    def is_finished(self) -> bool:
        """Whether the last backfill came to its end, so that parts of ``done`` need no look."""
        return self._content.is_finished

    @property
    def ends(self) -> dict[Source, int]:
        """Per source, the offset below which all rows are done."""
        return {_source(text): end for text, end in self._content.ends.items()}

    def forget(self) -> None:
        """Begin anew: the rows that were written are not there any more."""
        self._content = _Content(codebook_version=self._content.codebook_version)
        self._write()

    def add(self, names: tuple[str, ...]) -> None:
        """Note that pieces are in both stores."""
        self._content.done.extend(names)
        self._content.is_finished = False
        self._write()

    def finish(self, offsets: Mapping[Source, Offsets], listed: frozenset[str]) -> None:
        """Note that every wanted row is in both stores.

        Args:
            offsets: What was wanted, by source.
            listed: Names of the parts that are there still; others are forgotten.
        """
        ends = self._content.ends
        for (topic, partition), wanted in offsets.items():
            if partition < 0:
                # Rows of no known source have no order: what is done of them, names alone tell.
                continue
            text = f"{topic}:{partition}"
            ends[text] = max(ends.get(text, 0), wanted.end)
        names = self._content.done
        self._content.done = [name for name in names if name.partition("#")[0] in listed]
        self._content.is_finished = True
        self._write()

    def _read(self, codebook_version: str) -> _Content:
        try:
            content = _Content.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return _Content(codebook_version=codebook_version)
        except ValidationError as error:
            raise DataError(
                f"{self.path} is no progress of a backfill: {error}; remove it and run `qarm "
                f"codebook backfill --codebook-version {codebook_version}` again, which begins anew"
            ) from error
        return content

    def _write(self) -> None:
        replace_file(self.path, self._content.model_dump_json().encode())


def progress_path(root: Place, codebook_version: str) -> Place:
    """Return where the progress of a version's backfill lies."""
    return root / _FOLDER / f"{codebook_version}.json"


def _source(text: str) -> Source:
    topic, _, partition = text.rpartition(":")
    return topic, int(partition)
