"""The trainer against plain loops: same bits alone, same gradients in chunks and over ranks."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.features import features_of_vectors
from qarm_feast.alignment.fusion import AlignmentHead
from qarm_feast.alignment.pair_rows import PairRows
from qarm_feast.alignment.train import train_head

NUM_ITEMS, NUM_PAIRS = 60, 300
SMALL = AlignmentConfig(
    embedding_dim=16, hidden_dim=16, batch_size=64, learning_rate=3e-3, num_epochs=3
)
CENTRED_WITHOUT_LOGQ = {"center_content": True, "logq_weight": 0.0}


def made_features() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(NUM_ITEMS, 32)).astype(np.float32)


def made_pairs() -> PairRows:
    """Pairs of items whose numbers lie near each other."""
    generator = np.random.default_rng(2)
    triggers = generator.integers(0, NUM_ITEMS, NUM_PAIRS)
    targets = (triggers + generator.integers(1, 4, NUM_PAIRS)) % NUM_ITEMS
    weights = generator.random(NUM_PAIRS).astype(np.float32) + 0.1
    return PairRows(triggers, targets, generator.integers(-1, 20, NUM_PAIRS), weights)


def plain_loop(config: AlignmentConfig) -> dict[str, torch.Tensor]:
    """Train the head on all pairs in the plainest way, one epoch after the other."""
    features, pairs = made_features(), made_pairs()
    tensors = features_of_vectors(features).tensors()
    generator = np.random.default_rng(config.seed)
    torch.manual_seed(config.seed)
    head = AlignmentHead({"embedding": (1, 32)}, config.embedding_dim, config.hidden_dim)
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
