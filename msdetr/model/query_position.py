"""Position codes of queries from the boxes at which a decoder layer starts.

`ModelConfig.query_position` is `box` or `box_content`. With `initial`, the codes belong to the
initial queries (`msdetr.model.query_selection`), and no module of this kind exists.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msdetr.config import ModelConfig
from msdetr.model.layers import MLP
from msdetr.model.position_embedding import box_position_code


class BoxPosition(nn.Module):
    """Codes of boxes by an MLP of their sine codes (DAB-DETR, arXiv:2201.12329, section 4.2).

    `box_content` multiplies them by an MLP of the content from the second layer on.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden_dim = config.hidden_dim
        self.num_features = hidden_dim // 2
        self.ref_point_head = MLP(2 * hidden_dim, hidden_dim, hidden_dim, 2)
        self.query_scale: MLP | None = None
        if config.query_position == "box_content":
            self.query_scale = MLP(hidden_dim, hidden_dim, hidden_dim, 2)

    def forward(
        self, content: Tensor, boxes: Tensor, valid_ratios: Tensor, *, is_first: bool
    ) -> Tensor:
        """Codes of one decoder layer.

        Args:
            content: [B, Q, C]
            boxes: [B, Q, 4] cxcywh, fractions of the valid image.
            valid_ratios: [B, L, 2], valid share of (width, height) of the padded maps; the codes
                are those of positions on the first level.
            is_first: whether this is the first layer.

        Returns:
            [B, Q, C]
        """
        x, y, width, height = (boxes * valid_ratios[:, :1].repeat(1, 1, 2)).unbind(-1)
        code = box_position_code(torch.stack((y, x, width, height), dim=-1), self.num_features)
        weight = self.ref_point_head.last.weight
        position: Tensor = self.ref_point_head(code.to(weight.dtype))
        if self.query_scale is None or is_first:
            return position
        scaled: Tensor = self.query_scale(content) * position
        return scaled
