"""Initial queries of the decoder, where they are the encoder's best proposals (two stages)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from msdetr.boxes import at_least_float32
from msdetr.config import ModelConfig
from msdetr.model.geometry import cell_centers
from msdetr.model.heads import DetectionHeads
from msdetr.model.position_embedding import box_position_code
from msdetr.model.proposal_nms import select_by_level
from msdetr.model.query_selection import Queries, QuerySelection
from msdetr.model.query_sets import num_encoder_groups
from msdetr.ops.ms_deform_attn import padding_mask
from msdetr.structures import Branch, FeaturePyramid, Predictions, SpatialShapes


class Candidates(NamedTuple):
    """The encoder's tokens, before proposals are selected."""

    tokens: Tensor
    """[B, S, C], zero where a token proposes nothing."""
    anchor_logits: Tensor
    """[B, S, 4], see `proposal_anchors`."""
    spatial_shapes: SpatialShapes
    """L pairs (height, width)."""


class Selected(NamedTuple):
    """Selected proposals, best first."""

    reference: Tensor
    """[B, Q, 4] boxes (cxcywh), without gradient."""
    tokens: Tensor
    """[B, Q, C] as the encoder's heads read them."""
    branches: dict[str, Branch]
    """Supervised proposals by branch, in training."""


class ProposalQueries(QuerySelection):
    """Two-stage: every token proposes a box around itself, the best become queries.

    `proposal_score='first_class'`: the published code of Deformable-DETR ranks proposals by the
    first class logit and trains that class as "object" for all targets; the other channels learn
    background. Checkpoints depend on it.

    `best_class`: proposals are ranked by their best class, and the selected ones are supervised
    with real labels. Each group of queries has its own projection, normalisation and heads, and
    selects its own proposals.

    With `proposal_nms_iou_threshold`, duplicates are removed before the selection, and the levels
    share the queries equally (DETA); see `msdetr.model.proposal_nms`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        hidden_dim = config.hidden_dim
        self.by_best_class = config.proposal_score == "best_class"
        self.nms_iou_threshold = config.proposal_nms_iou_threshold
        self.enc_output = nn.Linear(hidden_dim, hidden_dim)
        self.enc_output_norm = nn.LayerNorm(hidden_dim)
        nn.init.xavier_uniform_(self.enc_output.weight)
        self.pos_trans: nn.Linear | None = None
        self.pos_trans_norm: nn.LayerNorm | None = None
        if config.query_position == "initial":
            self.pos_trans = nn.Linear(hidden_dim * 2, hidden_dim * 2)
            self.pos_trans_norm = nn.LayerNorm(hidden_dim * 2)
            nn.init.xavier_uniform_(self.pos_trans.weight)
        self.pix_trans: nn.Linear | None = None
        self.pix_trans_norm: nn.LayerNorm | None = None
        if config.proposal_content:
            self.pix_trans = nn.Linear(hidden_dim, hidden_dim)
            self.pix_trans_norm = nn.LayerNorm(hidden_dim)
            nn.init.xavier_uniform_(self.pix_trans.weight)
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
        candidates = Candidates(tokens, anchor_logits, memory.spatial_shapes)
        if self.by_best_class:
            selected = self._select_by_best_class(candidates, heads, num_selected)
        else:
            selected = self._select_by_first_class(candidates, heads, num_selected)
        content = query_pos = None
        if self.pos_trans is not None:
            query_pos, content = self.code(selected.reference)
        if self.query_embed is not None:
            content = self.weight_of(self.query_embed).expand(len(tokens), -1, -1)
        assert content is not None  # `ModelConfig` refuses the combination
        if self.pix_trans is not None and self.pix_trans_norm is not None:
            content = content + self.pix_trans_norm(self.pix_trans(selected.tokens.detach()))
        return Queries(content, query_pos, selected.reference, sets, selected.branches)

    def code(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Position code and content [B, Q, C] of boxes [B, Q, 4] (`query_position='initial'`)."""
        assert self.pos_trans is not None
        assert self.pos_trans_norm is not None
        code = box_position_code(boxes, self.enc_output.out_features // 2)
        embedding = self.pos_trans_norm(self.pos_trans(code.to(self.pos_trans.weight.dtype)))
        query_pos, content = embedding.chunk(2, dim=-1)
        return query_pos, content

    def _select_by_first_class(
        self, candidates: Candidates, heads: DetectionHeads, num_selected: int
    ) -> Selected:
        """The proposals, and in training the branch of all of them."""
        class_head, box_head = heads.of_encoder()
        tokens = self._project(candidates.tokens)
        logits = class_head(tokens)  # [B, S, K]
        if not self.training and self.nms_iou_threshold is None:
            best = logits[..., 0].topk(num_selected, dim=1).indices
            chosen = _gather(tokens, best)
            # Only the chosen boxes are needed.
            return Selected(_boxes(candidates, best, box_head(chosen)).detach(), chosen, {})
        boxes = (at_least_float32(box_head(tokens)) + candidates.anchor_logits).sigmoid()
        best = self._best(logits[..., 0].detach(), boxes.detach(), candidates, num_selected)
        branches = {}
        if self.training:
            predictions = Predictions(logits[None], boxes[None])
            branches["encoder"] = Branch(predictions, candidates.anchor_logits.sigmoid())
        return Selected(_gather(boxes.detach(), best), _gather(tokens, best), branches)

    def _best(
        self, scores: Tensor, boxes: Tensor, candidates: Candidates, num_selected: int
    ) -> Tensor:
        """[B, Q] indices of the proposals to select, best first."""
        if self.nms_iou_threshold is None:
            return scores.topk(num_selected, dim=1).indices
        return select_by_level(
            scores,
            boxes,
            candidates.spatial_shapes,
            num_selected,
            iou_threshold=self.nms_iou_threshold,
            # Inference may read from the device, and torchvision's suppression takes any dtype.
            impl="auto" if self.training else "reference",
        )

    def _select_by_best_class(
        self, candidates: Candidates, heads: DetectionHeads, num_selected: int
    ) -> Selected:
        """The proposals, and in training the branch of those of the primary set.

        Only selected tokens have gradients, so that the others leave nothing for the backward pass.
        """
        logits, boxes, chosen = [], [], []
        for group in range(self.sets.primary.num_groups):
            class_head, box_head = heads.of_encoder(group)
            with torch.no_grad():
                score = class_head(self._project(candidates.tokens, group)).amax(-1)
                best = score.topk(num_selected, dim=1).indices
            tokens = self._project(_gather(candidates.tokens, best), group)
            chosen.append(tokens)
            boxes.append(_boxes(candidates, best, box_head(tokens)))
            if self.training:
                logits.append(class_head(tokens))
        selected = Selected(torch.cat(boxes, dim=1).detach(), torch.cat(chosen, dim=1), {})
        if not self.training:
            return selected
        group_size = self.sets.primary.group_size
        predictions = Predictions(
            *(
                torch.cat([group[:, :group_size] for group in groups], dim=1)[None]
                for groups in (logits, boxes)
            )
        )
        branch = Branch(predictions, num_groups=len(boxes))
        return selected._replace(branches={"encoder_selected": branch})

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
