from pathlib import Path
from typing import Any

import pytest

from qarm_feast.errors import ConfigError
from streaming.assembly import watch_codebooks
from streaming.config import StreamConfig
from tests.stream_repo import publish_codebook


class AppliedViews:
    """What `feast apply` has made."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def has_view(self, view_name: str) -> bool:
        return view_name in self.names


@pytest.mark.parametrize(
    ("features", "applied", "is_ready"),
    [
        ("[item_id]", ["item_codes_v1"], True),
        ("[item_id, vector]", ["item_codes_v1"], False),
        ("[item_id, long_history]", ["item_codes_v1", "item_vectors_e1"], True),
        ("[item_id, vector]", ["item_vectors_e1"], False),
    ],
)
def test_a_worker_starts_once_all_views_of_its_rows_are_applied(
    tmp_path: Path, features: str, applied: list[str], is_ready: bool
) -> None:
    config_path = tmp_path / "qarm.yaml"
    config_path.write_text(f"codebook: {{uri: codebooks}}\nranker: {{features: {features}}}\n")
    publish_codebook(tmp_path, "v1", encoder_version="e1")
    online: Any = AppliedViews(*applied)
    config = StreamConfig(bootstrap_servers="nobody:1")

    if is_ready:
        watch = watch_codebooks(str(config_path), config, online)
        assert list(watch.current().codebooks) == ["v1"]
    else:
        with pytest.raises(ConfigError, match="v1 have no view yet; run `feast apply`"):
            watch_codebooks(str(config_path), config, online)
