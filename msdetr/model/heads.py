"""Class and box heads of the decoder layers, the encoder and the one-to-many branch."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from msdetr.config import ModelConfig
from msdetr.model.layers import MLP

PRIOR_PROBABILITY = 0.01
"""Initial class probability, so that the focal loss of background starts low (RetinaNet, 4.1)."""


class LayerHeads(NamedTuple):
    """Heads of one decoder layer."""

    classes: dict[str, nn.Module]
    """Class head by branch: [..., C] to logits [..., K]."""
    box: nn.Module
    """[..., C] to box steps [..., 4] for `refine_boxes`; shared by all branches."""


class DetectionHeads(nn.Module):
    """Heads per decoder layer with box refinement, one shared pair of heads without it.

    With two stages, index `num_decoder_layers` is the encoder's.
    """

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        hidden_dim = config.hidden_dim
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

    def class_logits(self, layer: int, hidden_state: Tensor) -> Tensor:
        """[..., C] to class logits [..., K]."""
        logits: Tensor = _of_layer(self.class_embed, layer)(hidden_state)
        return logits

    def box_delta(self, layer: int, hidden_state: Tensor) -> Tensor:
        """[..., C] to box steps [..., 4] for `refine_boxes`."""
        delta: Tensor = _of_layer(self.bbox_embed, layer)(hidden_state)
        return delta

    def of_layer(self, layer: int) -> LayerHeads:
        """Heads of a decoder layer. Branches share the class head unless they have their own."""
        one_to_one = one_to_many = _of_layer(self.class_embed, layer)
        if self.one_to_many_class_embed is not None:
            one_to_many = _of_layer(self.one_to_many_class_embed, layer)
        classes = {"one_to_one": one_to_one, "one_to_many": one_to_many}
        return LayerHeads(classes, _of_layer(self.bbox_embed, layer))


def _of_layer(heads: nn.ModuleList, layer: int) -> nn.Module:
    return heads[layer] if len(heads) > 1 else heads[0]
