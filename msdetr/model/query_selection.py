"""Initial queries of the decoder: learned embeddings, or the encoder's best proposals."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from msdetr.boxes import at_least_float32
from msdetr.config import ModelConfig
from msdetr.model.geometry import cell_centers
from msdetr.model.heads import DetectionHeads
from msdetr.model.position_embedding import proposal_position_code
from msdetr.ops.ms_deform_attn import padding_mask
from msdetr.structures import Branch, FeaturePyramid, Predictions, SpatialShapes


class Queries(NamedTuple):
    """The decoder's input."""

    content: Tensor
    """[B, Q, C]"""
    query_pos: Tensor
    """[B, Q, C]"""
    reference: Tensor
    """[B, Q, 2] points or [B, Q, 4] boxes (cxcywh), fractions of the valid image."""
    proposals: Branch | None = None
    """All encoder proposals (N = 1, Q = S) with their anchors, in training with two stages."""


class EmbeddedQueries(nn.Module):
    """One-stage: learned content, position and, from the position, reference points."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.query_embed = nn.Embedding(config.num_queries, config.hidden_dim * 2)
        self.reference_points = nn.Linear(config.hidden_dim, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, memory: FeaturePyramid, heads: DetectionHeads) -> Queries:
        """The same queries for every image of `memory`."""
        query_pos, content = self.query_embed.weight.chunk(2, dim=-1)
        reference = at_least_float32(self.reference_points(query_pos)).sigmoid()
        batch = memory.tokens.shape[0]

        def repeat(x: Tensor) -> Tensor:
            return x.expand(batch, -1, -1)

        return Queries(repeat(content), repeat(query_pos), repeat(reference))


class ProposalQueries(nn.Module):
    """Two-stage: every token proposes a box around itself, the best become queries.

    The published code ranks proposals by the first class logit and trains that class as "object"
    for all targets; the other channels learn background. Checkpoints depend on it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden_dim = config.hidden_dim
        self.num_queries = config.num_queries
        self.encoder_head = config.num_decoder_layers
        self.reference_points = None
        self.enc_output = nn.Linear(hidden_dim, hidden_dim)
        self.enc_output_norm = nn.LayerNorm(hidden_dim)
        self.pos_trans = nn.Linear(hidden_dim * 2, hidden_dim * 2)
        self.pos_trans_norm = nn.LayerNorm(hidden_dim * 2)
        nn.init.xavier_uniform_(self.enc_output.weight)
        nn.init.xavier_uniform_(self.pos_trans.weight)
        self.query_embed: nn.Embedding | None = None
        if config.mixed_selection:
            self.query_embed = nn.Embedding(config.num_queries, hidden_dim)

    def forward(self, memory: FeaturePyramid, heads: DetectionHeads) -> Queries:
        """The `num_queries` best proposals of each image of `memory`.

        Raises:
            ValueError: the image has fewer tokens than there are queries.
        """
        num_tokens = memory.tokens.shape[1]
        if num_tokens < self.num_queries:
            raise ValueError(
                f"{self.num_queries} queries cannot be chosen from {num_tokens} tokens "
                f"(levels {memory.spatial_shapes}): use larger images or fewer num_queries"
            )
        anchor_logits, valid = proposal_anchors(memory.spatial_shapes, memory.valid_sizes)
        tokens = self.enc_output_norm(
            self.enc_output(memory.tokens.masked_fill(~valid[..., None], 0.0))
        )
        logits = heads.class_logits(self.encoder_head, tokens)  # [B, S, K]
        best = logits[..., 0].topk(self.num_queries, dim=1).indices[..., None]

        proposals = None
        if self.training:
            delta = heads.box_delta(self.encoder_head, tokens)
            boxes = (at_least_float32(delta) + anchor_logits).sigmoid()  # [B, S, 4]
            reference = boxes.detach().gather(1, best.expand(-1, -1, 4))
            proposals = Branch(Predictions(logits[None], boxes[None]), anchor_logits.sigmoid())
        else:  # Only the chosen boxes are needed.
            chosen = tokens.gather(1, best.expand(-1, -1, tokens.shape[-1]))
            delta = heads.box_delta(self.encoder_head, chosen)
            reference = at_least_float32(delta) + anchor_logits.gather(1, best.expand(-1, -1, 4))
            reference = reference.sigmoid()

        code = proposal_position_code(reference, self.enc_output.out_features // 2)
        embedding = self.pos_trans_norm(self.pos_trans(code.to(self.pos_trans.weight.dtype)))
        query_pos, content = embedding.chunk(2, dim=-1)
        if self.query_embed is not None:
            content = self.query_embed.weight.expand(len(tokens), -1, -1)
        return Queries(content, query_pos, reference, proposals)


def proposal_anchors(spatial_shapes: SpatialShapes, valid_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """A box around each token, as wide as 0.05 * 2 ** level of the image.

    Returns:
        [B, S, 4] float32 logits of the boxes (cxcywh), infinite where the token proposes nothing;
        [B, S] bool, True where it does: within the image and not at its very edge.
    """
    centers = cell_centers(spatial_shapes, valid_sizes)  # [B, S, 2]
    sides = torch.cat(
        [
            torch.full((height * width,), 0.05 * 2.0**level, device=centers.device)
            for level, (height, width) in enumerate(spatial_shapes)
        ]
    )
    boxes = torch.cat((centers, sides[None, :, None].expand(len(centers), -1, 2)), dim=-1)
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1)
    valid = valid & ~padding_mask(spatial_shapes, valid_sizes)
    logits = torch.log(boxes / (1.0 - boxes))
    return logits.masked_fill(~valid[..., None], float("inf")), valid
