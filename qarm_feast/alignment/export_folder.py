"""A folder of exported vectors: parts that stand, parts that are missing, and how it gets its name.

Parts are written into ``.<name>.partial`` beside it, whose manifest names each that is done. When
all are there it gets the name by a rename; a folder of another export that has the name steps aside
first: between the two renames there is none, never a mixture, and the next export mends that.
May import: the form of an export's parts.
"""

import shutil
from pathlib import Path

from qarm_feast.alignment.export_parts import ExportManifest, PartResult, read_export_manifest
from qarm_feast.artifact import sync_folder


class ExportFolder:
    """A folder of parts: the one that has the name, and the one that is being filled.

    Args:
        folder: Where readers look.
        wanted: The manifest that it shall have, without parts.
    """

    def __init__(self, folder: Path, wanted: ExportManifest) -> None:
        self.folder = folder
        self._partial = folder.with_name(f".{folder.name}.partial")
        self._names = wanted.part_names()
        standing = _same_export(folder, wanted)
        # Readers refuse a folder with a part too many just as one with a part too few.
        names = {path.name for path in folder.glob("*.parquet")}
        self._is_published = standing is not None and names == {*standing.parts} == {*self._names}
        self.manifest = standing if standing and self._is_published else wanted
        if not self._is_published and (begun := _same_export(self._partial, wanted)):
            wanted.add(begun.parts)
        elif not self._is_published:
            shutil.rmtree(self._partial, ignore_errors=True)

    def missing(self, number: int) -> Path | None:
        """Return where a part is to be written; None if it is there.

        Args:
            number: Of the part, from 0.

        Returns:
            A path in the folder that is being filled, which is made.
        """
        name = self._names[number]
        if self._is_published or name in self.manifest.parts:
            return None
        self._partial.mkdir(parents=True, exist_ok=True)
        return self._partial / name

    def note(self, result: PartResult) -> None:
        """Name the parts that are written, if they are of this folder."""
        own = {path.name: facts for path, facts in result.items() if path.parent == self._partial}
        if own:
            self.manifest.add(own)
            self.manifest.write(self._partial)

    def publish(self) -> None:
        """Give the folder its name."""
        replaced = self.folder.with_name(f".{self.folder.name}.replaced")
        if not self._is_published:
            # Once more: one that was killed may have come to the end with other gates ignored.
            self.manifest.write(self._partial)
            for killed in self._partial.glob(".*.tmp"):
                killed.unlink()
            sync_folder(self._partial)
            shutil.rmtree(replaced, ignore_errors=True)
            if self.folder.exists():
                self.folder.rename(replaced)
            self._partial.rename(self.folder)
            sync_folder(self.folder.parent)
            self._is_published = True
        for left_over in (self._partial, replaced):
            shutil.rmtree(left_over, ignore_errors=True)


def _same_export(folder: Path, wanted: ExportManifest) -> ExportManifest | None:
    """Return the manifest in ``folder`` if it is of the wanted export, without parts that are gone.

    Args:
        folder: A folder of parts; it need not exist.
        wanted: What to compare with.

    Returns:
        The manifest, or None.
    """
    found = read_export_manifest(folder)
    if found is None or found.key != wanted.key:
        return None
    there = {name: facts for name, facts in found.parts.items() if (folder / name).is_file()}
    found.parts = {}
    found.add(there)
    return found
