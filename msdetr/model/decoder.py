"""Deformable decoder with mixed supervision (MS-DETR, sections 3.2 and 3.3, figure 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from msdetr.config import ModelConfig
from msdetr.model.attention import MSDeformAttn, SelfAttention
from msdetr.model.geometry import level_valid_ratios
from msdetr.model.heads import DetectionHeads
from msdetr.model.layers import Dropout, FeedForward, call_module, refine_boxes
from msdetr.model.query_selection import Queries
from msdetr.structures import FeaturePyramid, Predictions


class DecoderLayer(nn.Module):
    """Cross-attention to the image, self-attention among queries, feed-forward network.

    `cross_self` attends to the image first: each query then holds a candidate of its own before
    the queries settle which of them answers, so one-to-many supervision is taken in between.
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
    ) -> tuple[Tensor, Tensor]:
        """One layer.

        Args:
            x: [B, Q, C] queries.
            query_pos: [B, Q, C]
            reference: [B, Q, 2 or 4] points or boxes, fractions of the valid image.
            valid_ratios: [B, L, 2], valid share of (width, height) of the padded maps.
            memory: encoded tokens.

        Returns:
            [B, Q, C] the layer's output, and [B, Q, C] what one-to-many supervision reads: the
            state after the first attention if it is internal, else the output again.
        """
        repeats = reference.shape[-1] // 2
        reference_points = reference[:, :, None] * valid_ratios.repeat(1, 1, repeats)[:, None]
        if self.cross_first:
            first = self._attend_image(x, query_pos, reference_points, memory)
            second = self._attend_queries(first, query_pos)
        else:
            first = self._attend_queries(x, query_pos)
            second = self._attend_image(first, query_pos, reference_points, memory)
        output = self.ffn(second)
        if not (self.training and self.internal_one_to_many):
            return output, output
        return output, first if self.one_to_many_ffn is None else self.one_to_many_ffn(first)

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

    def _attend_queries(self, x: Tensor, query_pos: Tensor) -> Tensor:
        attended = self.self_attn(x, query_pos)
        output: Tensor = self.self_attn_norm(x + self.self_attn_dropout(attended))
        return output


class LayerPredictions(NamedTuple):
    """What one layer predicts."""

    logits: Tensor
    """[B, Q, K]"""
    boxes: Tensor
    """[B, Q, 4]"""


class Decoder(nn.Module):
    """A stack of decoder layers that refines boxes on the way."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_decoder_layers))
        self.dropout = config.dropout
        self.recompute = False
        """Compute the layers again in the backward pass; see `Detector.checkpoint_activations`."""
        self.one_to_many = config.one_to_many
        self.box_refine = config.box_refine
        self.look_forward_twice = config.look_forward_twice

    def forward(
        self, queries: Queries, memory: FeaturePyramid, heads: DetectionHeads
    ) -> tuple[Predictions, Predictions | None]:
        """Predictions of all layers: one-to-one, and one-to-many in training if configured."""
        ratios = level_valid_ratios(memory.spatial_shapes, memory.valid_sizes)
        x = queries.content
        # Boxes are predicted from `loss_reference`, equal in value to `reference`, which is cut off
        # from the layers before. Looking forward twice, it is not: a layer's box loss then also
        # trains the refinement one layer earlier.
        reference = loss_reference = queries.reference
        one_to_one: list[LayerPredictions] = []
        one_to_many: list[LayerPredictions] = []
        for index, layer in enumerate(self.layers):
            x, x_one_to_many = call_module(
                layer,
                x,
                queries.query_pos,
                reference,
                ratios,
                memory,
                recompute=self.recompute,
                has_dropout=self.dropout > 0,
            )
            one, many, reference, loss_reference = self.predict(
                *heads.of_layer(index), x, x_one_to_many, reference, loss_reference
            )
            one_to_one.append(one)
            if many is not None:
                one_to_many.append(many)
        return _stack(one_to_one), _stack(one_to_many) if one_to_many else None

    def predict(
        self,
        class_head: nn.Module,
        box_head: nn.Module,
        one_to_many_class_head: nn.Module,
        x: Tensor,
        x_one_to_many: Tensor,
        reference: Tensor,
        loss_reference: Tensor,
    ) -> tuple[LayerPredictions, LayerPredictions | None, Tensor, Tensor]:
        """What a layer predicts, and where the next one starts.

        Args:
            class_head, box_head, one_to_many_class_head: of the layer.
            x: [B, Q, C] the layer's output.
            x_one_to_many: [B, Q, C] what one-to-many supervision reads.
            reference: [B, Q, 2 or 4] where the layer started.
            loss_reference: [B, Q, 2 or 4] the same values, with the gradient of the box losses.

        Returns:
            One-to-one and one-to-many predictions, and the next layer's `reference` and
            `loss_reference`.
        """
        delta = box_head(x)
        boxes = refine_boxes(delta, loss_reference)
        one_to_one = LayerPredictions(class_head(x), boxes)
        one_to_many: LayerPredictions | None = None
        if self.training and self.one_to_many != "none":
            # At the output: same hidden state, same box head, the same boxes.
            many_boxes = boxes
            if self.one_to_many == "internal":
                many_boxes = refine_boxes(box_head(x_one_to_many), loss_reference)
            one_to_many = LayerPredictions(one_to_many_class_head(x_one_to_many), many_boxes)
        if not self.box_refine:
            return one_to_one, one_to_many, reference, loss_reference
        if self.look_forward_twice:
            loss_reference = refine_boxes(delta, reference)
            return one_to_one, one_to_many, loss_reference.detach(), loss_reference
        return one_to_one, one_to_many, boxes.detach(), boxes.detach()


def _stack(layers: list[LayerPredictions]) -> Predictions:
    logits, boxes = zip(*layers, strict=True)
    return Predictions(torch.stack(logits), torch.stack(boxes))
