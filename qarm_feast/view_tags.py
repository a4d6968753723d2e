"""Tags by which a view, and the batch source below it, tell our stores what its rows are.

Feast hands an offline store the source alone when it materializes, and the view when it joins, so
both carry the same tags. Values are strings, as Feast's tags are. May import: nothing.
"""

KIND = "qarm.kind"
"""What the rows are: one of the ``*_KIND`` values below; absent: ordinary feature rows."""
ITEM_CODES_KIND = "item_codes"
ITEM_VECTORS_KIND = "item_vectors"
RECENT_ITEMS_KIND = "recent_items"
"""The source holds raw interactions; the view's rows are lists computed from them."""
USER_PROFILE_KIND = "user_profile"

DEDUP_KEY = "qarm.dedup_key"
"""Comma-separated columns; rows equal in all of them are one row, written more than once."""
HISTORY_LENGTH = "qarm.history_length"
"""How many of a user's latest positives a list holds."""
POSITIVE_LABEL = "qarm.positive_label"
"""Task column that makes an interaction positive; ``auto`` is the first one."""
SPLIT = "qarm.split"
"""Only interactions of this split enter the lists; absent: all of them."""
MERGE = "qarm.merge"
"""``recent_items``: the online store merges a written list into the stored one."""

CODEBOOK_VERSION = "qarm.codebook_version"
ENCODER_VERSION = "qarm.encoder_version"
NUM_LEVELS = "qarm.num_levels"
NUM_NEIGHBORS = "qarm.num_neighbors"
EMBEDDING_DIM = "qarm.embedding_dim"
"""Numbers in each vector of a view of vectors."""
