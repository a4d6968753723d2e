"""Old encoders that refreshes have made, removed when a run is over (``refresh.keep_encoders``).

Kept are the newest ones, the parent's, that of ``qarm.yaml``, every encoder that a codebook of the
registry names, draft or published, whatever its state, and what no refresh made. Of each other one,
under the locks of its training and its export:

1. ``removed.json`` goes into its folder. That stays: the name is never given again, as rows in
   Feast may still say it.
2. What was made from it is removed: vectors, pairs, graphs, logs, its evaluation.
3. Its manifest is removed, then its other files.

Killed at any point, the next end of a run goes on: who is to go still stands in the state, which is
written after this. May import: the registry, the encoder's manifest.
"""

import json
import logging
import shutil
from contextlib import ExitStack
from pathlib import Path

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.encoder import read_encoder_manifest
from qarm_feast.alignment.evaluation_job import evaluation_path
from qarm_feast.alignment.export import raw_vectors_folder
from qarm_feast.alignment.onnx_export import onnx_folder
from qarm_feast.artifact import MANIFEST_NAME, remove_file, replace_file
from qarm_feast.errors import CodebookNotFoundError, DataError
from qarm_feast.refresh.plan import Sections
from qarm_feast.refresh.state import EncoderMade, RefreshState
from qarm_feast.registry import drafts_uri, read_manifest, stored_versions
from qarm_feast.shared_state import LockTakenError, exclusive

logger = logging.getLogger(__name__)

REMOVED_NAME = "removed.json"


def remove_old_encoders(sections: Sections, state: RefreshState) -> None:
    """Remove what ``refresh.keep_encoders`` does not keep, and note it in the state.

    Args:
        sections: What ``qarm.yaml`` says.
        state: The run that is over; the caller writes it.

    Raises:
        CodebookError: If a codebook's manifest cannot be read: it may name any of them.
        ServiceUnavailableError: If the registry's object store does not answer.
    """
    limit = sections.refresh.keep_encoders
    if limit is None:
        return
    own = Path(sections.alignment.encoder_uri)
    standing = [made for made in state.encoders() if _stands(made, own)]
    begun = [made for made in state.earlier_encoders if _is_removed(made, own)]
    in_use = _names_in_use(sections, state)
    old = [made for made in [*begun, *standing[:-limit]] if made.version not in in_use]
    removed = [made for made in old if _remove(made, sections.alignment_of(made.version))]
    state.removed_encoders = [made.version for made in removed]
    there = [*standing, *begun]
    state.earlier_encoders = [
        made for made in state.earlier_encoders if made in there and made not in removed
    ]


def _stands(made: EncoderMade, folder: Path) -> bool:
    """Tell whether the encoder of this name is the one that the refresh made, and whole."""
    if (folder / made.version / REMOVED_NAME).is_file():
        return False
    try:
        return read_encoder_manifest(str(folder), made.version).created == made.started
    except DataError:
        # A run that trained none, or a folder that no refresh may judge.
        return False


def _is_removed(made: EncoderMade, folder: Path) -> bool:
    """Tell whether the removal of just this encoder has begun; it may have come to its end."""
    path = folder / made.version / REMOVED_NAME
    if not path.is_file():
        return False
    return bool(json.loads(path.read_bytes())["created"] == made.started.isoformat())


def _names_in_use(sections: Sections, state: RefreshState) -> set[str]:
    names = {sections.alignment.encoder_version, state.encoder_version}
    if state.parent is not None:
        names.add(state.parent.encoder_version)
    uri = sections.codebook.uri
    # Drafts first: a draft that is published meanwhile is found at the second place.
    for folder in (drafts_uri(uri), uri):
        for version in stored_versions(folder):
            try:
                names.add(read_manifest(folder, version).encoder_version)
            except CodebookNotFoundError:
                # Published or purged by another process since it was listed.
                continue
    return names


def _remove(made: EncoderMade, config: AlignmentConfig) -> bool:
    """Remove an encoder; False if a process trains or exports it just now."""
    version = made.version
    encoders, vectors = Path(config.encoder_uri), Path(config.vectors_uri)
    with ExitStack() as locks:
        try:
            for folder in (encoders, vectors):
                locks.enter_context(exclusive(folder / f".{version}.lock", wait_seconds=0))
        except LockTakenError as error:
            logger.warning("refresh_encoder_in_use encoder_version=%s error=%s", version, error)
            return False
        folder = encoders / version
        note = {"created": made.started.isoformat(), "by": "refresh.keep_encoders"}
        replace_file(folder / REMOVED_NAME, json.dumps(note).encode())
        for path in _made_from(config):
            _delete(path)
        remove_file(folder / MANIFEST_NAME)
        for path in folder.iterdir():
            if path.name != REMOVED_NAME:
                _delete(path)
    logger.info("refresh_encoder_removed encoder_version=%s", version)
    return True


def _made_from(config: AlignmentConfig) -> list[Path]:
    """Return what belongs to an encoder and to nothing else; it need not exist."""
    version = config.encoder_version
    encoders, vectors = Path(config.encoder_uri), Path(config.vectors_uri)
    left_over = [path for each in (encoders, vectors) for path in each.glob(f".{version}.*/")]
    return [
        vectors / version,
        raw_vectors_folder(config.vectors_uri, version),
        *(Path(config.pairs_uri) / f"{version}{suffix}" for suffix in (".parquet", ".json")),
        onnx_folder(config.encoder_uri, version),
        encoders / f"{version}.logs",
        evaluation_path(config).parent,
        *left_over,
    ]


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
