"""Class and box heads of the decoder layers, the encoder and the one-to-many branch."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple, cast

import torch
from torch import nn

from msdetr.config import ModelConfig
from msdetr.model.layers import MLP
from msdetr.model.query_sets import num_encoder_groups

PRIOR_PROBABILITY = 0.01
"""Initial class probability, so that the focal loss of background starts low (RetinaNet, 4.1)."""


class LayerHeads(NamedTuple):
    """Heads of one decoder layer."""

    classes: dict[str, nn.Module]
    """Class head by branch: [..., C] to logits [..., K]."""
    box: nn.Module
    """[..., C] to box steps [..., 4] for `refine_boxes`; shared by all branches."""


class EncoderHeads(NamedTuple):
    """Heads of the encoder's proposals."""

    classes: nn.Module
    """[..., C] to logits [..., K]."""
    box: nn.Module
    """[..., C] to box steps [..., 4] in logit space."""


class DetectionHeads(nn.Module):
    """Heads per decoder layer with box refinement, one shared pair of heads without it.

    With two stages, index `num_decoder_layers` is the encoder's. The further groups of Group DETR
    have heads of their own for the encoder, which exist in training only.
    """

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        hidden_dim = config.hidden_dim
        self.encoder_head = config.num_decoder_layers
        num_heads = config.num_decoder_layers + int(config.two_stage) if config.box_refine else 1

        class_head = nn.Linear(hidden_dim, num_classes)
        nn.init.constant_(class_head.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        box_head = MLP(hidden_dim, hidden_dim, 4, 3)
        nn.init.zeros_(box_head.last.weight)
        nn.init.zeros_(box_head.last.bias)
        self.class_embed = nn.ModuleList(copy.deepcopy(class_head) for _ in range(num_heads))
        self.bbox_embed = nn.ModuleList(copy.deepcopy(box_head) for _ in range(num_heads))
        if not config.two_stage:
            # Boxes start small where no proposal gives them a size.
            first_head = cast(MLP, self.bbox_embed[0])
            with torch.no_grad():
                first_head.last.bias[2:].fill_(-2.0)
        self.one_to_many_class_embed: nn.ModuleList | None = None
        if config.one_to_many == "output":
            num_heads = config.num_decoder_layers if config.box_refine else 1
            self.one_to_many_class_embed = nn.ModuleList(
                copy.deepcopy(class_head) for _ in range(num_heads)
            )

        num_groups = num_encoder_groups(config)
        self.group_class_embed, self.group_bbox_embed = (
            nn.ModuleList(copy.deepcopy(head) for _ in range(num_groups - 1))
            for head in (class_head, box_head)
        )

    def of_encoder(self, group: int = 0) -> EncoderHeads:
        """Heads of the encoder's proposals for a group of queries."""
        if group > 0:
            return EncoderHeads(self.group_class_embed[group - 1], self.group_bbox_embed[group - 1])
        return EncoderHeads(
            _of_layer(self.class_embed, self.encoder_head),
            _of_layer(self.bbox_embed, self.encoder_head),
        )

    def of_layer(self, layer: int) -> LayerHeads:
        """Heads of a decoder layer. Branches share the class head unless they have their own."""
        one_to_one = one_to_many = _of_layer(self.class_embed, layer)
        if self.one_to_many_class_embed is not None:
            one_to_many = _of_layer(self.one_to_many_class_embed, layer)
        classes = {"one_to_one": one_to_one, "one_to_many": one_to_many}
        return LayerHeads(classes, _of_layer(self.bbox_embed, layer))


def _of_layer(heads: nn.ModuleList, layer: int) -> nn.Module:
    return heads[layer] if len(heads) > 1 else heads[0]
