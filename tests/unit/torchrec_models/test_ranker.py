from dataclasses import replace

import pytest
import torch
from test_dataset import make_dataset

from qarm_feast.errors import ConfigError
from torchrec_models.batch import RankingBatch
from torchrec_models.config import RankerConfig, TaskConfig, resolve_tasks
from torchrec_models.dataset import RowDataset
from torchrec_models.inputs import TrainInputs
from torchrec_models.losses import build_content_id_loss
from torchrec_models.ranker import RankerTrainTask, build_ranker, ranker_logits
from torchrec_models.row_store import code_sizes
from torchrec_models.sharding import Ranks


def _batch(inputs: TrainInputs, config: RankerConfig) -> RankingBatch:
    dataset: RowDataset = make_dataset(inputs, "test", config, Ranks(0, 1))
    return next(dataset.eval_batches())


def test_the_loss_is_the_weighted_sum_of_the_tasks_losses(inputs: TrainInputs) -> None:
    config = RankerConfig()
    tasks = resolve_tasks(config, inputs.store.manifest.label_names)
    sizes = code_sizes(inputs.store.manifest)
    ranker = build_ranker(config, tasks, inputs.store.vocabularies(), sizes, torch.device("cpu"))
    batch = _batch(inputs, config)

    loss, (logits_BT, labels_BT) = RankerTrainTask(ranker, [2.0, 0.5])(batch)

    loss_of = torch.nn.functional.binary_cross_entropy_with_logits
    expected = 2.0 * loss_of(logits_BT[:, 0], labels_BT[:, 0])
    expected += 0.5 * loss_of(logits_BT[:, 1], labels_BT[:, 1])
    torch.testing.assert_close(loss, expected.reshape(1))


def test_embedding_dropout_changes_scores_in_training_and_never_in_evaluation(
    inputs: TrainInputs,
) -> None:
    config = RankerConfig()
    tasks = resolve_tasks(config, inputs.store.manifest.label_names)
    sizes = code_sizes(inputs.store.manifest)
    ranker = build_ranker(config, tasks, inputs.store.vocabularies(), sizes, torch.device("cpu"))
    batch = _batch(inputs, config)
    task = RankerTrainTask(ranker, [1.0, 1.0], embedding_dropout=0.5)

    in_training = task.train()(batch)[1][0]
    in_evaluation = task.eval()(batch)[1][0]

    assert not torch.equal(in_training, in_evaluation)
    torch.testing.assert_close(in_evaluation, ranker_logits(ranker, batch))


def test_a_ranker_with_vectors_has_a_dense_arch_and_one_without_has_none(
    inputs: TrainInputs,
) -> None:
    tasks = (TaskConfig(name="like", label_name="is_like"),)
    sizes, vocabularies = code_sizes(inputs.store.manifest), inputs.store.vocabularies()
    for features in (("item_id",), ("item_id", "vector")):
        config = RankerConfig(features=features, embedding_dim=8)
        ranker = build_ranker(config, tasks, vocabularies, sizes, torch.device("cpu"))
        batch = _batch(inputs, config)

        logits_BT = ranker(batch.sparse_features, batch.dense_features)

        assert logits_BT.shape == (200, 1)
        assert (ranker.dense_arch is not None) == ("vector" in features)


def test_tasks_default_to_the_labels_in_file_order() -> None:
    tasks = resolve_tasks(RankerConfig(), ["is_like", "clicked"])

    assert [(task.name, task.label_name, task.weight) for task in tasks] == [
        ("like", "is_like", 1.0),
        ("clicked", "clicked", 1.0),
    ]


def test_labels_that_give_two_tasks_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a name twice: \['like', 'like'\]"):
        resolve_tasks(RankerConfig(), ["is_like", "like"])


def test_features_without_any_table_are_refused(inputs: TrainInputs) -> None:
    config = RankerConfig(features=("user_columns", "vector"))
    bare = replace(inputs.store.vocabularies(), user_columns={})
    tasks = (TaskConfig(name="like", label_name="is_like"),)

    with pytest.raises(ConfigError, match="none of them has a table"):
        build_ranker(config, tasks, bare, code_sizes(inputs.store.manifest))


def test_a_task_on_a_label_that_the_data_lacks_is_refused() -> None:
    config = RankerConfig(tasks=({"name": "buy", "label_name": "is_buy"},))

    with pytest.raises(ConfigError, match=r"\['is_buy'\], but the data has \['is_like'\]"):
        resolve_tasks(config, ["is_like"])


def _ranker_config(**keys: object) -> RankerConfig:
    chained = (
        {"name": "like", "label_name": "is_like"},
        {"name": "love", "label_name": "is_love", "after": "like"},
    )
    small = {"embedding_dim": 8, "expert_layer_sizes": (8,), "over_arch_layer_sizes": (1,)}
    return RankerConfig.model_validate(small | {"tasks": chained} | keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"head": "shared_bottom"},
        {"head": "ple", "interaction": "dcn", "dcn_rank": 4},
        {"head": "home", "task_groups": (("like",), ("love",))},
        {"interaction": "fgcnn"},
        {
            "enable_esmm": True,
            "features": ("item_id", "user_id", "vector"),
            "content_id_weight": 1e-3,
        },
    ],
)
def test_one_step_moves_every_dense_parameter_of_each_choice(
    inputs: TrainInputs, keys: dict[str, object]
) -> None:
    config = _ranker_config(**keys)
    tasks = resolve_tasks(config, inputs.store.manifest.label_names)
    ranker = build_ranker(
        config, tasks, inputs.store.vocabularies(), code_sizes(inputs.store.manifest)
    )
    sizes = code_sizes(inputs.store.manifest)
    task = RankerTrainTask(ranker, [1.0, 1.0], build_content_id_loss(config, sizes))

    loss, _ = task(_batch(inputs, config))
    loss.sum().backward()

    assert [name for name, p in task.named_parameters() if not p.grad.abs().sum() > 0] == []


def test_a_masked_task_counts_only_where_the_one_before_it_happened(inputs: TrainInputs) -> None:
    config = _ranker_config()
    tasks = resolve_tasks(config, inputs.store.manifest.label_names)
    ranker = build_ranker(
        config, tasks, inputs.store.vocabularies(), code_sizes(inputs.store.manifest)
    )
    batch = _batch(inputs, config)

    loss, (logits_BT, labels_BT) = RankerTrainTask(ranker, [1.0, 1.0])(batch)

    liked_B = batch.labels[:, 0] == 1
    loss_of = torch.nn.functional.binary_cross_entropy_with_logits
    expected = loss_of(logits_BT[:, 0], batch.labels[:, 0])
    expected += loss_of(logits_BT[liked_B, 1], batch.labels[liked_B, 1])
    torch.testing.assert_close(loss, expected.reshape(1))
    assert labels_BT[:, 1].isnan().equal(~liked_B)


def test_the_content_id_term_reads_of_the_dense_features_the_items_vector_alone(
    inputs: TrainInputs,
) -> None:
    config = _ranker_config(features=("item_id", "vector", "popularity"), content_id_weight=1.0)
    tasks = resolve_tasks(config, inputs.store.manifest.label_names)
    sizes = code_sizes(inputs.store.manifest)
    ranker = build_ranker(config, tasks, inputs.store.vocabularies(), sizes)
    plain = RankerTrainTask(ranker, [1.0, 1.0])
    tied = RankerTrainTask(ranker, [1.0, 1.0], build_content_id_loss(config, sizes))
    batch = _batch(inputs, config)

    def term(changed: slice, factor: float) -> float:
        dense_BW = batch.dense_features.clone()
        dense_BW[:, changed] *= factor
        other = replace(batch, dense_features=dense_BW)
        return (tied(other)[0] - plain(other)[0]).item()

    vectors, others = slice(0, sizes.vector_dim), slice(sizes.vector_dim, None)
    assert term(others, 3.0) == pytest.approx(term(others, 1.0), abs=1e-5)
    assert abs(term(vectors, -1.0) - term(vectors, 1.0)) > 0.01
    # Items without a vector have no term.
    assert term(vectors, 0.0) == pytest.approx(0.0, abs=1e-5)
