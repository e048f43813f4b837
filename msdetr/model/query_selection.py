"""Initial queries of the decoder, where they are learned.

`msdetr.model.proposal_queries` has those that come from the encoder. Denoising queries precede both
(`Detector.with_denoising`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from msdetr.boxes import at_least_float32
from msdetr.config import ModelConfig
from msdetr.model.heads import DetectionHeads
from msdetr.model.query_sets import QuerySets, query_sets
from msdetr.structures import Branch, FeaturePyramid


class Queries(NamedTuple):
    """The decoder's input."""

    content: Tensor
    """[B, Q, C]"""
    query_pos: Tensor | None
    """[B, Q, C]; None where each layer codes its boxes (`ModelConfig.query_position`)."""
    reference: Tensor
    """[B, Q, 2] points or [B, Q, 4] boxes (cxcywh), fractions of the valid image."""
    sets: QuerySets
    """How the queries are grouped."""
    proposals: dict[str, Branch]
    """Supervised proposals of the encoder by branch, in training with two stages."""


class QuerySelection(nn.Module):
    """The sets of queries of a configuration: all in training, the primary one in inference."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._training_sets, self._inference_sets = (
            query_sets(config, training=training) for training in (True, False)
        )
        self.num_embeddings = self._training_sets.num_queries
        self.reference_points: nn.Linear | None = None
        """From position codes to points, where these are learned."""

    @property
    def sets(self) -> QuerySets:
        """The sets of the module's mode."""
        return self._training_sets if self.training else self._inference_sets

    def weight_of(self, embeddings: nn.Embedding) -> Tensor:
        """Embeddings of the sets of the module's mode, [Q, ...] of [num_embeddings, ...]."""
        return embeddings.weight[: self.sets.num_queries]


class AnchorQueries(QuerySelection):
    """One-stage: learned content and learned boxes (DAB-DETR, arXiv:2201.12329).

    With `denoising='dn'`, the last channel of the content is 0: it is 1 in denoising queries.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.has_indicator = config.denoising == "dn"
        self.query_embed = nn.Embedding(self.num_embeddings, config.hidden_dim - self.has_indicator)
        self.anchors = nn.Embedding(self.num_embeddings, 4)
        """Logits of the boxes (cxcywh)."""

    def forward(self, memory: FeaturePyramid, heads: DetectionHeads) -> Queries:
        """The same queries for every image of `memory`."""
        content = self.weight_of(self.query_embed)
        if self.has_indicator:
            content = torch.cat((content, content.new_zeros(len(content), 1)), dim=1)
        reference = at_least_float32(self.weight_of(self.anchors)).sigmoid()
        batch = len(memory.tokens)
        content, reference = (x.expand(batch, -1, -1) for x in (content, reference))
        return Queries(content, None, reference, self.sets, {})


class EmbeddedQueries(QuerySelection):
    """One-stage: learned content, position and, from the position, reference points."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.query_embed = nn.Embedding(self.num_embeddings, config.hidden_dim * 2)
        linear = nn.Linear(config.hidden_dim, 2)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.reference_points = linear

    def forward(self, memory: FeaturePyramid, heads: DetectionHeads) -> Queries:
        """The same queries for every image of `memory`."""
        query_pos, content = self.weight_of(self.query_embed).chunk(2, dim=-1)
        assert self.reference_points is not None
        reference = at_least_float32(self.reference_points(query_pos)).sigmoid()
        batch = memory.tokens.shape[0]

        def repeat(x: Tensor) -> Tensor:
            return x.expand(batch, -1, -1)

        return Queries(repeat(content), repeat(query_pos), repeat(reference), self.sets, {})
