import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import torchrec_models
from qarm_feast.errors import ConfigError, MissingDependencyError
from torchrec_models.cli import qarm_rank
from torchrec_models.options import load_ranker_config


@pytest.mark.parametrize("arguments", [["--help"], ["rows", "--help"], ["score", "--help"]])
def test_help_ends_with_a_worked_example(arguments: list[str]) -> None:
    result = CliRunner().invoke(qarm_rank, arguments)

    assert result.exit_code == 0
    assert "qarm-rank" in result.output.split("Example:")[-1]


def test_without_torchrec_the_command_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchrec", None)
    monkeypatch.delitem(sys.modules, "torchrec_models.ranker", raising=False)

    result = CliRunner().invoke(qarm_rank, ["score", "--user-id", "1", "--items", "2"])

    assert isinstance(result.exception, MissingDependencyError)
    assert "pip install --no-deps torchrec==1.8.0" in str(result.exception)
    with pytest.raises(MissingDependencyError, match="--no-deps"):
        _ = torchrec_models.MultiTaskRanker


def test_items_that_are_no_integers_are_refused_before_anything_is_opened() -> None:
    result = CliRunner().invoke(
        qarm_rank, ["score", "--user-id", "1", "--items", "2,x", "--config", "missing.yaml"]
    )

    assert result.exit_code == 2
    assert "'2,x' is no list of integers" in result.output


def test_public_names_are_the_documented_ones() -> None:
    assert torchrec_models.__all__ == [
        "MultiTaskRanker",
        "RankerConfig",
        "RankerTrainTask",
        "RankingBatch",
        "TaskConfig",
        "build_ranker",
        "code_tables",
        "shard_ranker",
        "train",
    ]


def test_set_overrides_keys_of_the_ranker_only(tmp_path: Path) -> None:
    path = tmp_path / "qarm.yaml"
    path.write_text("ranker: {batch_size: 7}\n")

    config = load_ranker_config(str(path), ("ranker.num_epochs=2",))

    assert (config.batch_size, config.num_epochs) == (7, 2)
    assert config.rows_uri == str(tmp_path / "data" / "rows")
    with pytest.raises(ConfigError, match=r"not of \['stream'\]"):
        load_ranker_config(str(path), ("stream.consumer_group=x",))


@pytest.mark.parametrize(
    "text", ["{over_arch_layer_sizes: [8]}", "{features: [vector]}", "{id_dropout: 1.0}"]
)
def test_a_ranker_that_cannot_be_built_is_refused_by_its_section(tmp_path: Path, text: str) -> None:
    path = tmp_path / "qarm.yaml"
    path.write_text(f"ranker: {text}\n")

    with pytest.raises(ConfigError, match=r"qarm\.yaml is wrong:\n  - ranker[.:]"):
        load_ranker_config(str(path))
