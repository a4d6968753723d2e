import pytest
import torch

from torchrec_models.archs import EmbeddingDropout


def test_the_share_reads_as_zero_and_the_rest_is_scaled_so_that_the_mean_stays() -> None:
    torch.manual_seed(0)

    found = EmbeddingDropout(0.3)(torch.ones(400, 25, 20))

    values, counts = found.unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.7]), atol=1e-4, rtol=0)
    # Four standard errors of 200,000 draws.
    assert counts[0].item() / found.numel() == pytest.approx(0.3, abs=0.0041)


def test_each_number_is_dropped_by_a_draw_of_its_own() -> None:
    torch.manual_seed(0)
    module = EmbeddingDropout(0.5)

    is_kept = torch.stack([module(torch.ones(5, 1001)) for _ in range(40)]) != 0

    # Neighbours share a draw of torch's generator, rows and batches do not.
    correlations = torch.corrcoef(is_kept.flatten(0, 1)[:, :8].T.float())
    assert (correlations - torch.eye(8)).abs().max() < 0.3
    assert len(is_kept.flatten(0, 1).unique(dim=0)) == 200


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 5), (0, 4)])
def test_the_shape_stays(shape: tuple[int, ...]) -> None:
    assert EmbeddingDropout(0.5)(torch.ones(shape)).shape == shape


def test_evaluation_and_a_share_of_none_leave_embeddings_as_they_are() -> None:
    embeddings = torch.randn(3, 4)

    assert EmbeddingDropout(0.5).eval()(embeddings) is embeddings
    assert EmbeddingDropout(0.0)(embeddings) is embeddings


def test_a_share_near_one_stays_finite() -> None:
    assert EmbeddingDropout(0.999_999)(torch.ones(1000)).isfinite().all()


def test_the_same_state_of_torch_s_generator_drops_the_same() -> None:
    module, embeddings = EmbeddingDropout(0.4), torch.ones(50, 8)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = module(embeddings), module(embeddings)
    torch.set_rng_state(state)

    assert torch.equal(module(embeddings), first)
    assert not torch.equal(second, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_where_numbers_do(dtype: torch.dtype) -> None:
    embeddings = torch.randn(50, 8, dtype=dtype).requires_grad_()

    found = EmbeddingDropout(0.4)(embeddings)
    found.sum().backward()

    assert found.dtype == dtype
    assert embeddings.grad is not None
    torch.testing.assert_close(embeddings.grad * embeddings, found)
