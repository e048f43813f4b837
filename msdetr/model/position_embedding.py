"""Position codes of feature maps and of boxes, from valid sizes alone, in float32."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdetr.structures import SpatialShapes


def sine_code(position: Tensor, num_features: int, temperature: float = 10000.0) -> Tensor:
    """Sines and cosines of a position at geometric frequencies (Vaswani et al., 2017).

    Args:
        position: [...], in radians of the lowest frequency.
        num_features: even; sines and cosines alternate.

    Returns:
        [..., num_features]
    """
    pair = torch.arange(num_features // 2, dtype=torch.float32, device=position.device)
    angles = position[..., None] / temperature ** (2.0 * pair / num_features)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def box_position_code(boxes: Tensor, num_features: int) -> Tensor:
    """Code of boxes [..., 4] in [0, 1], `num_features` per coordinate: [..., 4 * num_features]."""
    return sine_code(boxes * (2.0 * math.pi), num_features).flatten(-2)


class SinePositionEmbedding(nn.Module):
    """Sine code of the position within the valid part of the image (DETR, appendix A.4)."""

    def __init__(
        self, hidden_dim: int, *, temperature: float = 10000.0, offset: float = 0.5
    ) -> None:
        """`offset` is the position of the first cell, in cells."""
        super().__init__()
        self.num_features = hidden_dim // 2
        self.temperature = temperature
        self.offset = offset

    def forward(self, spatial_shapes: SpatialShapes, valid_sizes: Tensor) -> list[Tensor]:
        """Codes per level.

        Args:
            spatial_shapes: L pairs (height, width).
            valid_sizes: [B, L, 2], valid (height, width).

        Returns:
            L tensors [B, height * width, C]; vertical code first.
        """
        codes = []
        for level, (height, width) in enumerate(spatial_shapes):
            code_y = self._axis_code(height, valid_sizes[:, level, 0])  # [B, H, C / 2]
            code_x = self._axis_code(width, valid_sizes[:, level, 1])
            codes.append(_combine(code_y, code_x))
        return codes

    def _axis_code(self, length: int, valid: Tensor) -> Tensor:
        position = torch.arange(length, dtype=torch.float32, device=valid.device) + self.offset
        fraction = position / (valid[:, None].float() + 1e-6)
        return sine_code(fraction * (2.0 * math.pi), self.num_features, self.temperature)


class LearnedPositionEmbedding(nn.Module):
    """Learned code per row and column, shared by the levels (published `learned`).

    The table has 50 entries; larger maps stretch it linearly (the published code fails there).
    """

    table_size = 50

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(self.table_size, hidden_dim // 2)
        self.col_embed = nn.Embedding(self.table_size, hidden_dim // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, spatial_shapes: SpatialShapes, valid_sizes: Tensor) -> list[Tensor]:
        """L tensors [B, height * width, C]; horizontal code first, as published."""
        batch = valid_sizes.shape[0]
        codes = []
        for height, width in spatial_shapes:
            code_y = self._axis_code(self.row_embed.weight, height).expand(batch, -1, -1)
            code_x = self._axis_code(self.col_embed.weight, width).expand(batch, -1, -1)
            codes.append(_combine(code_y, code_x, horizontal_first=True))
        return codes

    def _axis_code(self, table: Tensor, length: int) -> Tensor:
        if length <= self.table_size:
            return table[:length]
        stretched = F.interpolate(table.T[None], size=length, mode="linear", align_corners=True)
        return stretched[0].T


def _combine(code_y: Tensor, code_x: Tensor, *, horizontal_first: bool = False) -> Tensor:
    height, width = code_y.shape[1], code_x.shape[1]
    rows = code_y[:, :, None].expand(-1, -1, width, -1)
    columns = code_x[:, None].expand(-1, height, -1, -1)
    order = (columns, rows) if horizontal_first else (rows, columns)
    return torch.cat(order, dim=-1).flatten(1, 2)
