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
    """Class and box heads, shared as `ModelConfig.head_sharing` says.

    `none`: heads 0 ... N - 1 are those of the decoder layers, and with two stages head N is the
    encoder's. `decoder`: head 0 is that of all decoder layers, head 1 the encoder's. `all`: head 0.
    The further groups of Group DETR have heads of their own for the encoder, which exist in
    training only.
    """

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        hidden_dim = config.hidden_dim
        sharing = config.shared_heads
        num_decoder_heads = config.num_decoder_layers if sharing == "none" else 1
        self.encoder_head = 0 if sharing == "all" else num_decoder_heads
        has_encoder_head = config.two_stage and sharing != "all"
        num_heads = num_decoder_heads + int(has_encoder_head)
        self.shared = sharing != "none"

        class_head = nn.Linear(hidden_dim, num_classes)
        nn.init.constant_(class_head.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        box_head = MLP(hidden_dim, hidden_dim, 4, 3)
        nn.init.zeros_(box_head.last.weight)
        nn.init.zeros_(box_head.last.bias)
        self.class_embed = nn.ModuleList(copy.deepcopy(class_head) for _ in range(num_heads))
        self.bbox_embed = nn.ModuleList(copy.deepcopy(box_head) for _ in range(num_heads))
        if not config.two_stage and not (self.shared and config.box_refine):
            # Boxes start small where no proposal gives them a size. A head that refines all layers
            # would make them smaller in each.
            first_head = cast(MLP, self.bbox_embed[0])
            with torch.no_grad():
                first_head.last.bias[2:].fill_(-2.0)
        self.one_to_many_class_embed: nn.ModuleList | None = None
        if config.one_to_many == "output":
            self.one_to_many_class_embed = nn.ModuleList(
                copy.deepcopy(class_head) for _ in range(num_decoder_heads)
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
        return EncoderHeads(self.class_embed[self.encoder_head], self.bbox_embed[self.encoder_head])

    def of_layer(self, layer: int) -> LayerHeads:
        """Heads of a decoder layer. Branches share the class head unless they have their own."""
        index = 0 if self.shared else layer
        one_to_one = one_to_many = self.class_embed[index]
        if self.one_to_many_class_embed is not None:
            one_to_many = self.one_to_many_class_embed[index]
        classes = {"one_to_one": one_to_one, "one_to_many": one_to_many}
        return LayerHeads(classes, self.bbox_embed[index])
