"""Deformable decoder with mixed supervision (MS-DETR, sections 3.2 and 3.3, figure 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from msdetr.config import ModelConfig
from msdetr.model.activation_checkpointing import call_module
from msdetr.model.attention import MSDeformAttn, SelfAttention
from msdetr.model.geometry import level_valid_ratios, refine_boxes
from msdetr.model.heads import DetectionHeads, LayerHeads
from msdetr.model.layers import Dropout, FeedForward
from msdetr.model.query_position import BoxPosition
from msdetr.model.query_selection import Queries
from msdetr.model.query_sets import QuerySets
from msdetr.structures import Branch, FeaturePyramid, Predictions


class LayerOutput(NamedTuple):
    """Hidden states of one decoder layer."""

    x: Tensor
    """[B, Q, C], all queries."""
    one_to_many: Tensor | None
    """[B, primary Q, C], taken after the first attention; None without internal one-to-many
    supervision, and in inference."""


class DecoderLayer(nn.Module):
    """Cross-attention to the image, self-attention among queries, feed-forward network.

    `cross_self` attends to the image first. Each query then holds a candidate before self-attention
    removes duplicates, and one-to-many supervision is taken in between.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.cross_first = config.decoder_order == "cross_self"
        self.internal_one_to_many = config.one_to_many == "internal"
        self.cross_attn = MSDeformAttn(
            config.hidden_dim, config.num_levels, config.num_heads, config.num_decoder_points
        )
        self.cross_attn_dropout = Dropout(config.dropout)
        self.cross_attn_norm = nn.LayerNorm(config.hidden_dim)
        self.self_attn = SelfAttention(config.hidden_dim, config.num_heads, config.dropout)
        self.self_attn_dropout = Dropout(config.dropout)
        self.self_attn_norm = nn.LayerNorm(config.hidden_dim)
        self.ffn = FeedForward(config.hidden_dim, config.feedforward_dim, config.dropout)
        self.one_to_many_ffn: FeedForward | None = None
        if config.one_to_many_ffn:
            self.one_to_many_ffn = FeedForward(
                config.hidden_dim, config.feedforward_dim, config.dropout
            )

    def forward(
        self,
        x: Tensor,
        query_pos: Tensor,
        reference: Tensor,
        valid_ratios: Tensor,
        memory: FeaturePyramid,
        sets: QuerySets,
    ) -> LayerOutput:
        """One layer.

        Args:
            x: [B, Q, C] queries of all sets.
            query_pos: [B, Q, C]
            reference: [B, Q, 2 or 4] points or boxes, fractions of the valid image.
            valid_ratios: [B, L, 2], valid share of (width, height) of the padded maps.
            memory: encoded tokens.
            sets: of the queries.
        """
        repeats = reference.shape[-1] // 2
        reference_points = reference[:, :, None] * valid_ratios.repeat(1, 1, repeats)[:, None]
        if self.cross_first:
            first = self._attend_image(x, query_pos, reference_points, memory)
            second = self._attend_queries(first, query_pos, sets)
        else:
            first = self._attend_queries(x, query_pos, sets)
            second = self._attend_image(first, query_pos, reference_points, memory)
        output = self.ffn(second)
        one_to_many = None
        if self.training and self.internal_one_to_many:
            primary = sets.of_primary(first)
            ffn = self.one_to_many_ffn
            one_to_many = primary if ffn is None else ffn(primary)
        return LayerOutput(output, one_to_many)

    def _attend_image(
        self, x: Tensor, query_pos: Tensor, reference_points: Tensor, memory: FeaturePyramid
    ) -> Tensor:
        attended = self.cross_attn(
            x + query_pos,
            reference_points,
            memory.tokens,
            memory.spatial_shapes,
            memory.valid_sizes,
        )
        output: Tensor = self.cross_attn_norm(x + self.cross_attn_dropout(attended))
        return output

    def _attend_queries(self, x: Tensor, query_pos: Tensor, sets: QuerySets) -> Tensor:
        attended = self.self_attn(x, query_pos, sets)
        output: Tensor = self.self_attn_norm(x + self.self_attn_dropout(attended))
        return output


class Reference(NamedTuple):
    """Boxes or points from which a decoder layer starts: twice the same values."""

    start: Tensor
    """[B, Q, 2 or 4] without the gradients of earlier layers: attention and refinement start
    here."""
    loss: Tensor
    """[B, Q, 2 or 4] predictions start here. Looking forward twice, it has the gradient of the
    layer before: a layer's box loss then also trains the refinement of that layer."""


class Decoder(nn.Module):
    """A stack of decoder layers with iterative box refinement."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_decoder_layers))
        self.dropout = config.dropout
        self.activation_checkpointing = False
        """Recompute the layers in the backward pass, see `Detector.checkpoint_activations`."""
        self.one_to_many_at_output = config.one_to_many == "output"
        self.box_refine = config.box_refine
        self.look_forward_twice = config.look_forward_twice
        self.logit_eps = config.logit_eps
        self.query_position: BoxPosition | None = None
        if config.query_position != "initial":
            self.query_position = BoxPosition(config)
        self.norm: nn.LayerNorm | None = None
        if config.decoder_norm:
            self.norm = nn.LayerNorm(config.hidden_dim)

    def forward(
        self, queries: Queries, memory: FeaturePyramid, heads: DetectionHeads
    ) -> dict[str, Branch]:
        """Predictions of all layers by branch: one branch per set of queries, and in training
        `one_to_many` where configured."""
        sets = queries.sets
        ratios = level_valid_ratios(memory.spatial_shapes, memory.valid_sizes)
        x = queries.content
        reference = Reference(queries.reference, queries.reference)
        predictions: list[dict[str, Predictions]] = []
        for index, layer in enumerate(self.layers):
            query_pos = queries.query_pos
            if self.query_position is not None:
                query_pos = self.query_position(x, reference.start, ratios, is_first=index == 0)
            output = call_module(
                layer,
                x,
                query_pos,
                reference.start,
                ratios,
                memory,
                sets,
                activation_checkpointing=self.activation_checkpointing,
                has_dropout=self.dropout > 0,
            )
            x = output.x
            branches, reference = self.predict(heads.of_layer(index), output, reference, sets)
            predictions.append(branches)
        num_groups = {query_set.branch: query_set.num_groups for query_set in sets.sets}
        output_branches = {
            name: Branch(
                Predictions(
                    torch.stack([branches[name].logits for branches in predictions]),
                    torch.stack([branches[name].boxes for branches in predictions]),
                ),
                num_groups=num_groups.get(name, sets.primary.num_groups),
            )
            for name in predictions[0]
        }
        if self.training and queries.reference.shape[-1] == 4:
            primary = output_branches["one_to_one"]
            anchors = sets.of_primary(queries.reference)
            output_branches["one_to_one"] = primary._replace(anchors=anchors)
        return output_branches

    def predict(
        self, heads: LayerHeads, output: LayerOutput, reference: Reference, sets: QuerySets
    ) -> tuple[dict[str, Predictions], Reference]:
        """Predictions of one layer, and the reference of the next one.

        Args:
            heads: of the layer.
            output: of the layer.
            reference: where the layer started.
            sets: of the queries.

        Returns:
            Logits [B, Q, K] and boxes [B, Q, 4] by branch, and the next layer's reference.
        """
        state, one_to_many = output
        if self.norm is not None:
            state = self.norm(state)
            one_to_many = None if one_to_many is None else self.norm(one_to_many)
        delta = heads.box(state)
        boxes = refine_boxes(delta, reference.loss, self.logit_eps)
        fields = map(sets.split, (heads.classes["one_to_one"](state), boxes))
        predictions = {
            query_set.branch: Predictions(*prediction)
            for query_set, *prediction in zip(sets.sets, *fields, strict=True)
        }
        if one_to_many is not None:
            start = sets.of_primary(reference.loss)
            predictions["one_to_many"] = Predictions(
                heads.classes["one_to_many"](one_to_many),
                refine_boxes(heads.box(one_to_many), start, self.logit_eps),
            )
        if self.training and self.one_to_many_at_output:
            # The same hidden state and box head give the same boxes.
            predictions["one_to_many"] = Predictions(
                heads.classes["one_to_many"](sets.of_primary(state)),
                predictions["one_to_one"].boxes,
            )
        if not self.box_refine:
            return predictions, reference
        if self.norm is not None:
            delta = heads.box(output.x)  # The next layer starts from the output before the norm.
        if self.norm is not None or self.look_forward_twice:
            boxes = refine_boxes(delta, reference.start, self.logit_eps)
        return predictions, Reference(
            boxes.detach(), boxes if self.look_forward_twice else boxes.detach()
        )
