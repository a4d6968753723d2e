"""The configuration that the repository ships, read by every section's owner."""

from pathlib import Path

import pytest

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.codebook import QuantizerConfig
from qarm_feast.codebook_config import CodebookConfig
from qarm_feast.config import Section, load_section, read_yaml
from qarm_feast.feature_views import read_repository_facts
from qarm_feast.input_data import DataConfig
from qarm_feast.observability import ObservabilityConfig
from streaming.config import StreamConfig
from torchrec_models.config import RankerConfig

REPO_DIR = Path(__file__).parents[2] / "feature_repo"
OWNERS: dict[str, type[Section]] = {
    "data": DataConfig,
    "codebook": CodebookConfig,
    "quantizer": QuantizerConfig,
    "alignment": AlignmentConfig,
    "stream": StreamConfig,
    "ranker": RankerConfig,
    "observability": ObservabilityConfig,
}


def test_the_shipped_file_has_every_section_and_no_other() -> None:
    assert list(read_yaml(REPO_DIR / "qarm.yaml")) == list(OWNERS)


@pytest.mark.parametrize("name", OWNERS)
def test_every_shipped_key_is_known_to_its_owner(name: str) -> None:
    section = load_section(REPO_DIR / "qarm.yaml", name, OWNERS[name])

    assert set(read_yaml(REPO_DIR / "qarm.yaml")[name]) <= section.model_fields_set


def test_feature_services_are_named_after_the_name_that_the_ranker_reads(tmp_path: Path) -> None:
    (tmp_path / "qarm.yaml").write_text("{}")

    facts = read_repository_facts(tmp_path)

    assert facts.ranker_name == RankerConfig().name
