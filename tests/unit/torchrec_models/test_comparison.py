import pytest

from qarm_feast.errors import ConfigError
from torchrec_models.comparison import ArmConfig, ComparisonConfig, compare
from torchrec_models.config import RankerConfig
from torchrec_models.inputs import TrainInputs
from torchrec_models.sharding import Ranks

GOOD = ArmConfig(name="ids", overrides={"features": ["user_id", "item_id"]})


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        (ArmConfig(name="typo", overrides={"id_droput": 0.1}), "arm 'typo' is wrong"),
        (ArmConfig(name="other", overrides={"codebook_version": "v2"}), r"\['codebook_version'\]"),
        (ArmConfig(name="ids", overrides={}), "a name twice"),
    ],
    ids=["unknown key", "key that all arms share", "name twice"],
)
def test_a_wrong_arm_is_refused_before_the_first_one_is_trained(
    inputs: TrainInputs, arm: ArmConfig, message: str
) -> None:
    comparison = ComparisonConfig(arms=(GOOD, arm))

    # No process group was joined: a training would raise another error.
    with pytest.raises(ConfigError, match=message):
        compare(RankerConfig(), comparison, inputs, is_first=True)


def test_every_arm_is_trained_with_every_seed(inputs: TrainInputs, ranks: Ranks) -> None:
    codes = ArmConfig(name="codes", overrides={"features": ["rq_code"]})
    comparison = ComparisonConfig(arms=(GOOD, codes), seeds=(0, 1))
    config = RankerConfig(batch_size=400, num_epochs=1, embedding_dim=8)

    runs = compare(config, comparison, inputs, is_first=False)

    assert [(run["arm"], run["seed"]) for run in runs] == [
        ("ids", 0),
        ("codes", 0),
        ("ids", 1),
        ("codes", 1),
    ]
    assert runs[0]["metrics"] != runs[2]["metrics"]
