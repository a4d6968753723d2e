from dataclasses import replace

import pytest
import torch
from test_dataset import make_dataset

from qarm_feast.errors import ConfigError
from torchrec_models.archs import InteractionArch
from torchrec_models.batch import RankingBatch
from torchrec_models.config import RankerConfig, TaskConfig, resolve_tasks
from torchrec_models.dataset import RowDataset
from torchrec_models.heads import Mmoe
from torchrec_models.inputs import TrainInputs
from torchrec_models.ranker import RankerTrainTask, build_ranker
from torchrec_models.row_store import code_sizes
from torchrec_models.sharding import Ranks


def _batch(inputs: TrainInputs, config: RankerConfig) -> RankingBatch:
    dataset: RowDataset = make_dataset(inputs, "test", config, Ranks(0, 1))
    return next(dataset.eval_batches())


def test_interaction_is_the_embeddings_and_each_pair_once() -> None:
    features_BFE = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])

    arch = InteractionArch(num_features=3, embedding_dim=2)

    assert arch(features_BFE).tolist() == [[1, 2, 3, 4, 5, 6, 11, 17, 39]]
    assert arch.out_features == 9


@pytest.mark.parametrize("layer_sizes", [(2,), (5, 2)])
def test_mmoe_mixes_experts_by_each_tasks_gate(layer_sizes: tuple[int, ...]) -> None:
    mmoe = Mmoe(in_features=3, expert_layer_sizes=layer_sizes, num_experts=2, num_tasks=3)
    with torch.no_grad():
        # The gates of task 0 choose expert 0, of task 1 expert 1; task 2 takes half of each.
        mmoe.gates.weight.zero_()
        mmoe.gates.bias.copy_(torch.tensor([100.0, -100.0, -100.0, 100.0, 0.0, 0.0]))
    shared_BX = torch.randn(4, 3)

    first_BY, second_BY, both_BY = mmoe(shared_BX)

    linear, width = mmoe.first_layers[0], layer_sizes[0]
    weights, biases = linear.weight.split(width), linear.bias.split(width)
    for expert, mixture_BY in enumerate((first_BY, second_BY)):
        hidden = torch.relu(shared_BX @ weights[expert].T + biases[expert])
        torch.testing.assert_close(mixture_BY, mmoe.later_layers[expert](hidden))
    torch.testing.assert_close(both_BY, (first_BY + second_BY) / 2)


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
