"""The trainer against plain loops: same bits alone, same gradients in chunks and over ranks."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from made_training import (
    NUM_ITEMS,
    NUM_PAIRS,
    SMALL,
    WIDTH,
    made_features,
    made_pairs,
    one_step,
    rank_job,
    trained,
)
from torch import nn
from torch.nn import functional

from qarm_feast.alignment import gradient_cache, trainable
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.features import features_of_vectors
from qarm_feast.alignment.fusion import AlignmentHead
from qarm_feast.alignment.gathering import current_ranks
from qarm_feast.alignment.held_out import PairSplit
from qarm_feast.alignment.pair_rows import BatchNegatives, PairRows
from qarm_feast.alignment.progress import StepProgress
from qarm_feast.alignment.train import start_head, train_head
from qarm_feast.alignment.trainable import HeadItems
from qarm_feast.alignment.trainer import PairTask, PairTrainer, embeddings
from qarm_feast.metrics_log import NoMetricsLog

CENTRED_WITHOUT_LOGQ = {"center_content": True, "logq_weight": 0.0}


class _CountedItems:
    """300 items; ``passes`` tells how many were embedded at a time."""

    def __init__(
        self, network: nn.Module, is_tuned: bool, embed: Callable[[np.ndarray], torch.Tensor]
    ) -> None:
        self.module = network
        self.passes: list[int] = []
        self._is_tuned = is_tuned
        self._embed = embed

    def __len__(self) -> int:
        return 300

    def backbone_parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters()) if self._is_tuned else []

    def embed(self, rows: np.ndarray) -> torch.Tensor:
        self.passes.append(len(rows))
        return self._embed(rows)


def plain_loop(config: AlignmentConfig) -> dict[str, torch.Tensor]:
    """Train the head on all pairs in the plainest way, one epoch after the other."""
    features, pairs = made_features(), made_pairs()
    tensors = features_of_vectors(features).tensors()
    generator = np.random.default_rng(config.seed)
    torch.manual_seed(config.seed)
    head = AlignmentHead({"embedding": (1, WIDTH)}, config.embedding_dim, config.hidden_dim)
    head.start_from_content(*tensors, is_centred=config.center_content)
    with torch.no_grad():
        content = head(*tensors)
    optimizer = torch.optim.Adam(head.parameters(), lr=config.learning_rate)
    is_near = np.eye(NUM_ITEMS, dtype=bool)
    is_near[pairs.triggers, pairs.targets] = is_near[pairs.targets, pairs.triggers] = True
    counts = np.bincount(np.concatenate([pairs.triggers, pairs.targets]), minlength=NUM_ITEMS) + 1.0
    log_shares = torch.from_numpy(np.log(counts / counts.sum())).float()
    for _ in range(config.num_epochs):
        order = generator.permutation(NUM_PAIRS)
        for begin in range(0, NUM_PAIRS, config.batch_size):
            batch = pairs.take(order[begin : begin + config.batch_size])
            drawn = generator.choice(NUM_ITEMS, NUM_ITEMS, replace=False)
            wanted = np.concatenate([batch.triggers, batch.targets, drawn])
            items, places = np.unique(wanted, return_inverse=True)
            embeddings = head(
                {"embedding": tensors[0]["embedding"][items]},
                {"embedding": torch.ones(len(items), dtype=torch.bool)},
            )[places]
            size = len(batch)
            logits = embeddings[:size] @ embeddings[size : 2 * size].T / config.temperature
            blocked = is_near[batch.triggers][:, batch.targets]
            blocked |= (batch.users[:, None] == batch.users) & (batch.users >= 0)
            np.fill_diagonal(blocked, False)
            logits = logits.masked_fill(torch.from_numpy(blocked), -torch.inf)
            sides = [(logits, batch.targets), (logits.T, batch.triggers)]
            if config.logq_weight:
                sides = [
                    (side - config.logq_weight * log_shares[answers], answers)
                    for side, answers in sides
                ]
            own = torch.arange(size)
            losses = [functional.cross_entropy(side, own, reduction="none") for side, _ in sides]
            weights = torch.from_numpy(batch.weights)
            loss = (weights * (losses[0] + losses[1])).sum() / (2.0 * weights.sum())
            drawn_SD, content_SD = embeddings[2 * size :], content[drawn]
            change = functional.mse_loss(drawn_SD @ drawn_SD.T, content_SD @ content_SD.T)
            optimizer.zero_grad()
            (loss + config.geometry_weight * change).backward()
            optimizer.step()
    return head.state_dict()


@pytest.mark.parametrize("changed", [{}, CENTRED_WITHOUT_LOGQ], ids=["default", "centred"])
def test_training_is_the_plain_loop_to_the_last_bit(changed: dict[str, object]) -> None:
    # With no item held out the training pairs choose the epoch, and that is the last one.
    config = SMALL.model_copy(update={"valid_item_share": 1e-9, **changed})

    head, run = train_head(features_of_vectors(made_features()), made_pairs(), config)

    assert run.best_epoch == config.num_epochs
    expected = plain_loop(config)
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(("is_tuned", "expected"), [(False, [300]), (True, [128, 128, 44])])
def test_backbones_that_are_tuned_read_few_items_at_a_time(
    is_tuned: bool, expected: list[int]
) -> None:
    network = nn.Linear(1, 2)

    items = _CountedItems(network, is_tuned, lambda rows: torch.from_numpy(rows[:, None]).float())

    found = embeddings(items, np.arange(300))

    assert items.passes == expected
    assert found[:, 0].tolist() == list(range(300))


def test_all_items_are_embedded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    features = features_of_vectors(made_features())
    items = HeadItems(start_head(features, SMALL), features, torch.device("cpu"))
    expected = items.module(*features.tensors())

    monkeypatch.setattr(trainable, "_ROWS", 7)

    torch.testing.assert_close(items.embeddings(), expected.detach())


def test_gradients_in_chunks_are_those_of_the_whole_batch() -> None:
    whole = one_step(None)

    for chunk_size in (1, 7, 1000):
        chunked = one_step(chunk_size)
        for name, tensor in whole.items():
            torch.testing.assert_close(chunked[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("is_tuned", "chunk_size", "expected"),
    [
        (False, None, [300]),
        (True, None, [128, 128, 44] * 2),
        (True, 200, [200, 100] * 2),
        (True, 1000, [300]),
    ],
)
def test_a_step_of_tuned_backbones_holds_few_items_at_a_time_unless_told_otherwise(
    is_tuned: bool, chunk_size: int | None, expected: list[int]
) -> None:
    network = nn.Linear(4, 8)
    x_ME = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))

    items = _CountedItems(
        network, is_tuned, lambda rows: nn.functional.normalize(network(x_ME[rows]), dim=1)
    )

    pairs = PairRows(np.arange(299), np.arange(1, 300), np.full(299, -1), np.ones(299, np.float32))
    split = PairSplit(pairs, pairs, np.zeros(300, dtype=bool))
    content_MD = nn.functional.normalize(x_ME, dim=1)
    task = PairTask(items, content_MD, split, BatchNegatives(pairs, 300), 10.0)
    config = SMALL.model_copy(update={"batch_size": 299, "chunk_size": chunk_size})
    trainer = PairTrainer(task, config, StepProgress(NoMetricsLog(), current_ranks()))

    trainer.train_epoch(np.random.default_rng(0))

    assert items.passes == expected


def test_mixed_precision_trains_float32_weights_to_nearly_the_same_place() -> None:
    start, full, mixed = trained(num_epochs=0), trained(), trained(enable_bf16=True)

    for name in ("linear.weight", "hidden.weight", "correction.weight"):
        assert mixed[name].dtype == torch.float32
        way = torch.linalg.norm(full[name] - start[name])
        assert 0 < torch.linalg.norm(mixed[name] - full[name]) < 0.05 * way


def test_gradients_and_training_of_two_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        rank_job, args=(str(tmp_path),), nprocs=2, start_method="spawn"
    )

    ranks = [safetensors.torch.load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)]
    alone = {"plain": one_step(None), "chunks": one_step(None), "head": trained()}
    for name, tensor in ranks[0].items():
        part, _, key = name.partition(".")
        assert torch.equal(tensor, ranks[1][name]), name
        tolerance = 2e-3 if part == "head" else 1e-4
        torch.testing.assert_close(tensor, alone[part][key], rtol=tolerance, atol=tolerance / 100)


def test_dropout_draws_the_same_when_a_chunk_is_embedded_again() -> None:
    layer = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    x_NE = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    rows = np.arange(10)

    def embed(rows_N: np.ndarray) -> torch.Tensor:
        return layer(x_NE[rows_N])

    def loss_of(embedded_ND: torch.Tensor) -> torch.Tensor:
        return (embedded_ND @ embedded_ND.T).square().sum()

    with torch.random.fork_rng(devices=[]):
        cached = gradient_cache.backward(embed, rows, loss_of, chunk_size=4, seed=5)
        found = [parameter.grad for parameter in layer.parameters()]
        layer.zero_grad()
        # The same draws in one graph: chunk by chunk under the chunk's seed.
        parts = list(gradient_cache.embedded(embed, [rows[:4], rows[4:8], rows[8:]], seed=5))
        expected = loss_of(torch.cat(parts))
        expected.backward()

    torch.testing.assert_close(cached, expected.detach())
    for gradient, parameter in zip(found, layer.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
