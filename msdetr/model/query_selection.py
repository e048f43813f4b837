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
from msdetr.model.query_sets import QuerySets, num_encoder_groups, query_sets
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

    @property
    def sets(self) -> QuerySets:
        """The sets of the module's mode."""
        return self._training_sets if self.training else self._inference_sets

    def weight_of(self, embeddings: nn.Embedding) -> Tensor:
        """Embeddings of the sets of the module's mode, [Q, ...] of [num_embeddings, ...]."""
        return embeddings.weight[: self.sets.num_queries]


class EmbeddedQueries(QuerySelection):
    """One-stage: learned content, position and, from the position, reference points."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.query_embed = nn.Embedding(self.num_embeddings, config.hidden_dim * 2)
        self.reference_points = nn.Linear(config.hidden_dim, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, memory: FeaturePyramid, heads: DetectionHeads) -> Queries:
        """The same queries for every image of `memory`."""
        query_pos, content = self.weight_of(self.query_embed).chunk(2, dim=-1)
        reference = at_least_float32(self.reference_points(query_pos)).sigmoid()
        batch = memory.tokens.shape[0]

        def repeat(x: Tensor) -> Tensor:
            return x.expand(batch, -1, -1)

        return Queries(repeat(content), repeat(query_pos), repeat(reference), self.sets, {})


class Candidates(NamedTuple):
    """The encoder's tokens, before proposals are selected."""

    tokens: Tensor
    """[B, S, C], zero where a token proposes nothing."""
    anchor_logits: Tensor
    """[B, S, 4], see `proposal_anchors`."""


class ProposalQueries(QuerySelection):
    """Two-stage: every token proposes a box around itself, the best become queries.

    `proposal_score='first_class'`: the published code of Deformable-DETR ranks proposals by the
    first class logit and trains that class as "object" for all targets; the other channels learn
    background. Checkpoints depend on it.

    `best_class`: proposals are ranked by their best class, and the selected ones are supervised
    with real labels. Each group of queries has its own projection, normalisation and heads, and
    selects its own proposals.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        hidden_dim = config.hidden_dim
        self.by_best_class = config.proposal_score == "best_class"
        self.reference_points = None
        self.enc_output = nn.Linear(hidden_dim, hidden_dim)
        self.enc_output_norm = nn.LayerNorm(hidden_dim)
        self.pos_trans = nn.Linear(hidden_dim * 2, hidden_dim * 2)
        self.pos_trans_norm = nn.LayerNorm(hidden_dim * 2)
        nn.init.xavier_uniform_(self.enc_output.weight)
        nn.init.xavier_uniform_(self.pos_trans.weight)
        self.query_embed: nn.Embedding | None = None
        if config.mixed_selection:
            self.query_embed = nn.Embedding(self.num_embeddings, hidden_dim)
        self.group_enc_output, self.group_enc_output_norm = nn.ModuleList(), nn.ModuleList()
        for _ in range(num_encoder_groups(config) - 1):
            linear = nn.Linear(hidden_dim, hidden_dim)
            nn.init.xavier_uniform_(linear.weight)
            self.group_enc_output.append(linear)
            self.group_enc_output_norm.append(nn.LayerNorm(hidden_dim))

    def forward(self, memory: FeaturePyramid, heads: DetectionHeads) -> Queries:
        """The best proposals of each image of `memory`, in the order of their rank. The primary
        set has the first ones, the next set those that follow.

        Raises:
            ValueError: the image has fewer tokens than a selection needs.
        """
        sets = self.sets
        num_tokens = memory.tokens.shape[1]
        num_selected = sets.num_queries // sets.primary.num_groups
        if num_tokens < num_selected:
            raise ValueError(
                f"{num_selected} queries cannot be chosen from {num_tokens} tokens "
                f"(levels {memory.spatial_shapes}): use larger images or fewer "
                + " and ".join(["num_queries", "num_hybrid_queries"][: len(sets.sets)])
            )
        anchor_logits, valid = proposal_anchors(memory.spatial_shapes, memory.valid_sizes)
        tokens = memory.tokens.masked_fill(~valid[..., None], 0.0)
        candidates = Candidates(tokens, anchor_logits)
        if self.by_best_class:
            reference, branches = self._select_by_best_class(candidates, heads, num_selected)
        else:
            reference, branches = self._select_by_first_class(candidates, heads, num_selected)

        code = proposal_position_code(reference, self.enc_output.out_features // 2)
        embedding = self.pos_trans_norm(self.pos_trans(code.to(self.pos_trans.weight.dtype)))
        query_pos, content = embedding.chunk(2, dim=-1)
        if self.query_embed is not None:
            content = self.weight_of(self.query_embed).expand(len(tokens), -1, -1)
        return Queries(content, query_pos, reference, sets, branches)

    def _select_by_first_class(
        self, candidates: Candidates, heads: DetectionHeads, num_selected: int
    ) -> tuple[Tensor, dict[str, Branch]]:
        """References [B, Q, 4], and in training the branch of all proposals."""
        class_head, box_head = heads.of_encoder()
        tokens = self._project(candidates.tokens)
        logits = class_head(tokens)  # [B, S, K]
        best = logits[..., 0].topk(num_selected, dim=1).indices
        if not self.training:
            # Only the chosen boxes are needed.
            return _boxes(candidates, best, box_head(_gather(tokens, best))), {}
        boxes = (at_least_float32(box_head(tokens)) + candidates.anchor_logits).sigmoid()
        branch = Branch(Predictions(logits[None], boxes[None]), candidates.anchor_logits.sigmoid())
        return _gather(boxes.detach(), best), {"encoder": branch}

    def _select_by_best_class(
        self, candidates: Candidates, heads: DetectionHeads, num_selected: int
    ) -> tuple[Tensor, dict[str, Branch]]:
        """References [B, Q, 4], and in training the branch of the proposals of the primary set.

        Only selected tokens have gradients, so that the others leave nothing for the backward pass.
        """
        logits, boxes = [], []
        for group in range(self.sets.primary.num_groups):
            class_head, box_head = heads.of_encoder(group)
            with torch.no_grad():
                score = class_head(self._project(candidates.tokens, group)).amax(-1)
                best = score.topk(num_selected, dim=1).indices
            tokens = self._project(_gather(candidates.tokens, best), group)
            boxes.append(_boxes(candidates, best, box_head(tokens)))
            if self.training:
                logits.append(class_head(tokens))
        reference = torch.cat(boxes, dim=1).detach()
        if not self.training:
            return reference, {}
        group_size = self.sets.primary.group_size
        selected = Predictions(
            *(
                torch.cat([group[:, :group_size] for group in groups], dim=1)[None]
                for groups in (logits, boxes)
            )
        )
        return reference, {"encoder_selected": Branch(selected, num_groups=len(boxes))}

    def _project(self, tokens: Tensor, group: int = 0) -> Tensor:
        """Tokens [B, S, C] as the heads of a group read them."""
        linear: nn.Module = self.enc_output
        norm: nn.Module = self.enc_output_norm
        if group > 0:
            linear, norm = self.group_enc_output[group - 1], self.group_enc_output_norm[group - 1]
        output: Tensor = norm(linear(tokens))
        return output


def _boxes(candidates: Candidates, index: Tensor, delta: Tensor) -> Tensor:
    """Boxes [B, Q, 4] of tokens `index` [B, Q], from their predicted steps [B, Q, 4]."""
    return (at_least_float32(delta) + _gather(candidates.anchor_logits, index)).sigmoid()


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` [B, Q] of `x` [B, S, C]: [B, Q, C]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


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
