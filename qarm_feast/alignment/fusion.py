"""Fusions: feature tokens of some modalities become one aligned embedding per item.

They start as the content geometry itself: a linear map holds the principal directions of the
training items' unit features, and what is added to it is zero before any training.

Shape letters in this file: N items, T feature tokens of a modality, E their width, C width of all
modalities side by side, D embedding width, H hidden width, Q queries, S tokens of all modalities,
W their width inside the Q-Former, A attention heads, L rows of a sequence (Q + S).
May import: torch.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from qarm_feast.alignment.config import AlignmentConfig, QFormerConfig
from qarm_feast.config import Section

Shapes = Mapping[str, tuple[int, int]]
"""Feature tokens and their width, ``(T, E)``, by modality."""
Features = Mapping[str, Tensor]
"""Feature tokens by modality: float32 ``[N, T, E]``, not normalised."""
Present = Mapping[str, Tensor]
"""Which items have a modality: bool ``[N]``, by modality."""


class FusionSizes(Section):
    """Kind and sizes of a fusion, as an encoder's manifest holds them."""

    kind: Literal["concat", "q_former"] = Field(
        default="concat", description="How modalities are fused."
    )
    hidden_dim: int = Field(default=256, description="concat: width of the hidden layer.")
    q_former: QFormerConfig = Field(default=QFormerConfig(), description="q_former: its sizes.")


def fusion_sizes(config: AlignmentConfig) -> FusionSizes:
    """Return what the configuration says of the fusion."""
    return FusionSizes(kind=config.fusion, hidden_dim=config.hidden_dim, q_former=config.q_former)


def build_fusion(shapes: Shapes, embedding_dim: int, sizes: FusionSizes) -> "ContentFusion":
    """Return an untrained fusion.

    Args:
        shapes: What it reads.
        embedding_dim: D.
        sizes: Its kind and sizes.

    Returns:
        The fusion, its linear map still random: see :meth:`ContentFusion.start_from_content`.
    """
    if sizes.kind == "q_former":
        return FusionQFormer(shapes, embedding_dim, sizes.q_former)
    return AlignmentHead(shapes, embedding_dim, sizes.hidden_dim)


class ContentFusion(nn.Module):
    """A linear map of the content, centred or not, to which a subclass adds a correction.

    Args:
        shapes: What is read.
        embedding_dim: D.

    Attributes:
        mean_E: What is taken off unit features, modalities side by side: the training items' means,
            or zero.
    """

    mean_E: Tensor

    def __init__(self, shapes: Shapes, embedding_dim: int) -> None:
        super().__init__()
        width = content_width(shapes)
        self.register_buffer("mean_E", torch.zeros(width))
        self.linear = nn.Linear(width, embedding_dim, bias=False)

    @torch.no_grad()
    def start_from_content(
        self, features: Features, present: Present, *, is_centred: bool = False
    ) -> None:
        """Set mean and linear map from the features of the training items.

        Args:
            features: Feature tokens.
            present: Which items have them.
            is_centred: Whether the mean is taken off first; what all items share then counts for
                nothing, and popular items are often nearest to that.
        """
        num_directions = self.linear.out_features
        mean_C, map_DC = principal_map(features, present, num_directions, is_centred=is_centred)
        self.mean_E.copy_(mean_C)
        self.linear.weight.copy_(map_DC)

    def forward(self, features: Features, present: Present) -> Tensor:
        """Return L2-normalised embeddings ``[N, D]``."""
        centred_NC = centred_content(features, present, self.mean_E)
        corrected_ND = self.linear(centred_NC) + self.correct(centred_NC, features, present)
        # Content of zeros (a broken picture, and nothing else) has no direction, so no code, and a
        # gradient divided by no length. It stands on the first axis, in which most content lies.
        is_bare_N1 = ~(centred_NC != 0).any(dim=1, keepdim=True)
        num_others = self.linear.out_features - 1
        bare_ND = functional.pad(is_bare_N1.to(corrected_ND.dtype), (0, num_others))
        return functional.normalize(corrected_ND + bare_ND, dim=1)

    def correct(self, centred_NC: Tensor, features: Features, present: Present) -> Tensor:
        """Return what is added to the linear map: ``[N, D]``, zero before any training."""
        raise NotImplementedError


class AlignmentHead(ContentFusion):
    """Concatenation and a multilayer perceptron; of several tokens of a modality it sees the mean.

    Args:
        shapes: What is read.
        embedding_dim: D.
        hidden_dim: H.
    """

    def __init__(self, shapes: Shapes, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__(shapes, embedding_dim)
        self.hidden = nn.Linear(content_width(shapes), hidden_dim)
        self.correction = nn.Linear(hidden_dim, embedding_dim, bias=False)
        nn.init.zeros_(self.correction.weight)

    def correct(self, centred_NC: Tensor, features: Features, present: Present) -> Tensor:
        """Return the hidden layer's output ``[N, D]``."""
        # Components of unit vectors are small; the hidden layer gets them near unit variance.
        hidden_NH = functional.gelu(self.hidden(centred_NC * centred_NC.shape[1] ** 0.5))
        corrected_ND: Tensor = self.correction(hidden_NH)
        return corrected_ND


class FusionQFormer(ContentFusion):
    """Learned queries attend to the tokens of all modalities (EM3's Fusion-Q-Former).

    The queries stand before the tokens in one sequence; after the self-attention layers their
    outputs are flattened and projected. Tokens of an absent modality are no keys. Unlike the
    paper's, the projection starts at zero and is added to the content's linear map, so that
    training starts from the content geometry.

    Args:
        shapes: What is read.
        embedding_dim: D.
        sizes: Sizes of the Q-Former.
    """

    def __init__(self, shapes: Shapes, embedding_dim: int, sizes: QFormerConfig) -> None:
        super().__init__(shapes, embedding_dim)
        width = sizes.width
        self.projections = nn.ModuleDict(
            {name: nn.Linear(token_width, width) for name, (_, token_width) in shapes.items()}
        )
        # One learned vector per token tells both its modality and its place in it.
        self.places = nn.ParameterDict(
            {name: 0.02 * torch.randn(count, width) for name, (count, _) in shapes.items()}
        )
        self.queries = nn.Parameter(torch.randn(sizes.num_queries, width))
        self.layers = nn.ModuleList(
            [_AttentionLayer(width, sizes.num_heads) for _ in range(sizes.num_layers)]
        )
        self.norm = nn.LayerNorm(width)
        self.correction = nn.Linear(sizes.num_queries * width, embedding_dim, bias=False)
        nn.init.zeros_(self.correction.weight)

    def correct(self, centred_NC: Tensor, features: Features, present: Present) -> Tensor:
        """Return the projected outputs of the queries ``[N, D]``."""
        num_items, num_queries = len(centred_NC), len(self.queries)
        rows = [self.queries.expand(num_items, -1, -1)]
        is_key = [torch.ones(num_items, num_queries, dtype=torch.bool, device=centred_NC.device)]
        for name, tokens_NTE in features.items():
            scaled_NTE = functional.normalize(tokens_NTE, dim=2) * tokens_NTE.shape[2] ** 0.5
            rows.append(self.projections[name](scaled_NTE) + self.places[name])
            is_key.append(present[name][:, None].expand(-1, tokens_NTE.shape[1]))
        x_NLW, is_key_NL = torch.cat(rows, dim=1), torch.cat(is_key, dim=1)
        for layer in self.layers:
            x_NLW = layer(x_NLW, is_key_NL)
        corrected_ND: Tensor = self.correction(self.norm(x_NLW[:, :num_queries]).flatten(1))
        return corrected_ND


class _AttentionLayer(nn.Module):
    """Self-attention and a two-layer perceptron, each after a normalisation and with a residual."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self._num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.hidden_norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 2 * width)
        self.hidden_output = nn.Linear(2 * width, width)

    def forward(self, x_NLW: Tensor, is_key_NL: Tensor) -> Tensor:
        x_NLW = x_NLW + self.output(self._attend(self.attention_norm(x_NLW), is_key_NL))
        hidden_NLH = functional.gelu(self.hidden(self.hidden_norm(x_NLW)))
        mixed_NLW: Tensor = x_NLW + self.hidden_output(hidden_NLH)
        return mixed_NLW

    def _attend(self, x_NLW: Tensor, is_key_NL: Tensor) -> Tensor:
        num_items, length, width = x_NLW.shape
        parts = self.queries_keys_values(x_NLW).view(num_items, length, 3, self._num_heads, -1)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        # Always given, also where every token is present: else the kernel would depend on it.
        mask_N1LL = is_key_NL[:, None, None, :].expand(num_items, 1, length, length)
        attended_NALV = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask_N1LL
        )
        return attended_NALV.transpose(1, 2).reshape(num_items, length, width)


def content_width(shapes: Shapes) -> int:
    """Return the width of all modalities side by side, C."""
    return sum(width for _, width in shapes.values())


def centred_content(features: Features, present: Present, mean_C: Tensor) -> Tensor:
    """Return the unit means of each modality's tokens, centred, side by side.

    An absent modality counts as the mean of those who have it, so it says nothing; the rest is
    divided by the root of the number of modalities that an item has.

    Args:
        features: Feature tokens.
        present: Which items have them.
        mean_C: Means of the unit vectors, modalities side by side in the order of ``features``.

    Returns:
        Float32 ``[N, C]``, of length 2 at most.
    """
    blocks, begin = [], 0
    for name, tokens_NTE in features.items():
        unit_NE = functional.normalize(tokens_NTE.mean(dim=1), dim=1)
        centred_NE = unit_NE - mean_C[begin : begin + unit_NE.shape[1]]
        blocks.append(centred_NE * present[name][:, None])
        begin += unit_NE.shape[1]
    count_N = torch.stack([present[name] for name in features]).sum(dim=0)
    return torch.cat(blocks, dim=1) / count_N.clamp(min=1).sqrt()[:, None]


def principal_map(
    features: Features, present: Present, num_directions: int, *, is_centred: bool
) -> tuple[Tensor, Tensor]:
    """Return what is taken off unit features, and the directions in which they then lie most.

    Args:
        features: Feature tokens of the training items.
        present: Which of them have each modality; a modality that none has keeps a mean of zero.
        num_directions: D, at most C.
        is_centred: Whether the means are taken off; else ``mean_C`` is zero.

    Returns:
        ``mean_C`` and ``map_DC``, float64, directions by falling second moment.
    """
    doubles = {name: tokens.double() for name, tokens in features.items()}
    means = []
    for name, tokens_NTE in doubles.items():
        unit_NE = functional.normalize(tokens_NTE.mean(dim=1), dim=1)[present[name]]
        means.append(unit_NE.mean(dim=0) if len(unit_NE) else unit_NE.sum(dim=0))
    mean_C = torch.cat(means) * is_centred
    centred_NC = centred_content(doubles, present, mean_C)
    _, directions_CC = torch.linalg.eigh(centred_NC.T @ centred_NC)
    # eigh sorts by rising moment; the map keeps the directions of most.
    return mean_C, directions_CC.T.flip(0)[:num_directions]
