"""What ``feast apply`` declares.

    entities   item, user
    views      user_recent_items, user_train_items, user_profile (with users.parquet), and one
               item_codes_<version> per staged, live or default codebook version; with `cross`
               in ranker.features also cross_features_<version>, on demand
    services   <ranker>_<version>

Publish or retire a codebook version and run ``feast apply`` again: the views follow the registry.
"""

from pathlib import Path

from qarm_feast.feature_views import declare_views, read_repository_facts

# Feast collects the module's attributes; how many there are depends on the codebook registry.
globals().update(declare_views(read_repository_facts(Path(__file__).resolve().parent)))
